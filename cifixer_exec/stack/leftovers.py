"""What is left of a stack after it stopped: looked up from outside, not taken from what it says of itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cifixer_exec.stack.parts import STACK_VARIABLE

_CGROUPS = Path("/sys/fs/cgroup")
_GROUP = "cifixer-exec"  # the local backend's directory for groups (backends/local/cgroups.py)


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """Processes by pid, directories by path, and the number of Redis keys when Redis was stopped (None: nobody could count)."""

    processes: tuple[int, ...]
    directories: tuple[str, ...]
    keys: int | None

    @property
    def nothing(self) -> bool:
        """True if all three were looked up and are empty."""
        return not self.processes and not self.directories and self.keys == 0

    def __str__(self) -> str:
        keys = "unknown" if self.keys is None else self.keys
        return f"{len(self.processes)} processes, {len(self.directories)} directories, {keys} Redis keys"


def find_processes(directory: Path) -> tuple[int, ...]:
    """Every process of the stack in ``directory``: its parts by their environment, sandboxes by command line and mounts.

    A command inside a sandbox has neither our environment nor our command line, but its namespace shows files of the directory.
    """
    name = directory.name
    marks = {
        "environ": f"{STACK_VARIABLE}={name}\0".encode(),
        "cmdline": f"{directory}/state/".encode(),
        "mountinfo": f"/{name}/state/".encode(),
    }
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return tuple(pid for pid in pids if pid != os.getpid() and any(_holds(pid, file, mark) for file, mark in marks.items()))


def find_directories(directory: Path, sandbox_ids: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The stack's own directory, and control groups of its sandboxes, as far as they exist."""
    groups = (base / sandbox_id for base in _group_bases() for sandbox_id in sandbox_ids) if sandbox_ids else ()
    return tuple(str(path) for path in (directory, *groups) if path.exists())


def _group_bases() -> list[Path]:
    found = []
    for path, below, _ in os.walk(_CGROUPS):
        if _GROUP in below:
            found.append(Path(path, _GROUP))
            below.remove(_GROUP)
    return found


def _holds(pid: int, file: str, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return False  # it ended meanwhile, or belongs to another user and so is none of ours
