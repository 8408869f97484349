"""The lines of the table: a value, what it should be, and where it was measured."""

from __future__ import annotations

import os
import platform
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def row(what: str, value: float | None, target: str, detail: str) -> Row:
    """One line; ``value`` None: it was not measured, and ``detail`` says why."""
    return {"what": what, "value": None if value is None else round(value, 3), "target": target, "detail": detail}


def ms(seconds: float) -> str:
    """Milliseconds, for people."""
    return f"{seconds * 1000:.2f} ms"


def machine() -> dict[str, Any]:
    """Where this was measured."""
    return {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(), "machine": platform.machine()}


def show(title: str, rows: list[Row]) -> None:
    """As a table."""
    table = Table(title=f"cifixer-exec bench, {title} (ratios within this run)")
    for name in ("what", "value", "target", "detail"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for line in rows:
        table.add_row(line["what"], "not measured" if line["value"] is None else f"{line['value']:g}", line["target"], line["detail"])
    Console(width=180).print(table)
