"""Numbers and times that platforms keep for us as text. What cannot be read is no error: others may have written there."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime


def number(text: str | None, otherwise: float) -> float:
    """``otherwise`` where there is none."""
    try:
        return float(text) if text is not None else otherwise
    except ValueError:
        return otherwise


def unix_time(text: str) -> float:
    """Of an RFC 3339 time, also with nanoseconds; 0 where there is none."""
    with suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    return 0.0
