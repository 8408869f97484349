"""``cp``: which side is the sandbox, and where a file or directory goes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from cifixer_exec.blocking import SandboxEnvironment
from cifixer_exec.errors import InvalidRequestError, SandboxFileError

#: As in scp(1): a colon makes a side remote, unless a slash comes before it.
_REMOTE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99}):(.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Side:
    """One side of a copy; ``sandbox_id`` None: here."""

    sandbox_id: str | None
    path: str


def parse_side(text: str) -> Side:
    """``ID:path`` is in a sandbox (no path: its workspace), anything else here; ``./a:b`` is a local name with a colon."""
    if match := _REMOTE.match(text):
        return Side(match[1], match[2] or ".")
    return Side(None, text)


def parse_copy(source: str, destination: str) -> tuple[Side, Side]:
    """Both sides.

    Raises:
        InvalidRequestError: not exactly one of them is a sandbox.
    """
    sides = parse_side(source), parse_side(destination)
    if sum(s.sandbox_id is not None for s in sides) != 1:
        raise InvalidRequestError(
            f"{source!r} → {destination!r}: exactly one side must be in a sandbox, written ID:path (./a:b for a file here)"
        )
    return sides


def copy(sandbox: SandboxEnvironment, source: Side, destination: Side) -> None:
    """Copy a file, or the content of a directory. A file goes *into* a destination that is a directory or ends with ``/``."""
    if source.sandbox_id is not None:
        sandbox.download(source.path, destination.path)
        return
    path = destination.path
    if os.path.isfile(source.path) and (path.endswith("/") or _is_directory(sandbox, path)):
        path = f"{path.rstrip('/') or '/'}/{os.path.basename(source.path)}"
    sandbox.upload(source.path, path)


def _is_directory(sandbox: SandboxEnvironment, path: str) -> bool:
    try:
        return sandbox.stat(path).type == "directory"
    except SandboxFileError as error:
        if error.code in ("not_found", "not_a_directory"):
            return False
        raise
