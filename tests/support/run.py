"""Coroutines in plain pytest."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T], timeout_s: float = 20.0) -> T:
    """The result of ``coroutine`` in an event loop of its own; a test never hangs."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout_s))
