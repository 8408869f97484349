"""``ls``: the sandboxes as a table or as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from cifixer_exec.backends.registry import make_backend
from cifixer_exec.cli.reach import ask
from cifixer_exec.settings import AppConfig
from cifixer_exec.store.records import SandboxRecord

#: Wide enough for every column when the output is no terminal: a cut id is of no use to a script.
_PIPE_WIDTH = 200


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sandbox. Times are Unix seconds."""

    id: str
    backend: str
    state: str
    owner: str
    created_s: float
    expires_s: float


def find_rows(config: AppConfig) -> list[Row]:
    """The sandboxes of the registry, or for direct use those that the backend finds."""
    if config.dispatch == "queue":
        return [_registered(r) for r in ask(config, lambda journal: journal.sandboxes())]
    backend = make_backend(config)
    return [
        Row(
            id=o.handle.sandbox_id,
            backend=backend.name,
            state="ready" if backend.inspect(o.handle).alive else "dead",
            owner="",
            created_s=o.created_at_s,
            expires_s=o.expires_at_s,
        )
        for o in backend.list_owned()
    ]


def show_rows(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print them."""
    if as_json:
        print(json.dumps([asdict(r) for r in rows], indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_WIDTH)
    console.print(make_table(rows, now_s=time.time()))


def make_table(rows: Sequence[Row], *, now_s: float) -> Table:
    """The table of ``ls``."""
    table = Table("id", "backend", "state", "owner", "age", "expires", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for r in rows:
        table.add_row(r.id, r.backend, r.state, r.owner or "-", duration(now_s - r.created_s), _in(r.expires_s - now_s))
    return table


def duration(seconds: float) -> str:
    """``42s``, ``3m10s``, ``2h05m``, ``3d04h``: two units at most."""
    whole = max(0, int(seconds))
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{small_unit}"
    return f"{whole}s"


def _in(seconds: float) -> str:
    return f"in {duration(seconds)}" if seconds > 0 else "over"


def _registered(record: SandboxRecord) -> Row:
    return Row(
        id=record.sandbox_id,
        backend=record.backend,
        state=record.state,
        owner=record.owner,
        created_s=record.created_ms / 1000,
        expires_s=record.expires_ms / 1000,
    )
