"""Host processes by pid *and* start time, because pids are used again (proc(5), /proc/PID/stat)."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_PPID, _START_TIME, _STATE = 1, 19, 0  # positions behind the command name in /proc/PID/stat


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def is_alive(pid: int, start_time: int) -> bool:
    """Whether this very process runs (a zombie does not: nobody may ever reap it)."""
    stat = _stat(pid)
    return stat is not None and stat[_STATE] not in "ZX" and int(stat[_START_TIME]) == start_time


def start_time_of(pid: int) -> int | None:
    """When ``pid`` was started, in ticks since boot; None when it is gone."""
    stat = _stat(pid)
    return None if stat is None else int(stat[_START_TIME])


def descendants(pid: int) -> list[int]:
    """All living descendants of ``pid``, children before grandchildren."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))) is not None and stat[_STATE] not in "ZX":
            children.setdefault(int(stat[_PPID]), []).append(int(entry))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, []))
    return found[1:]


def kill(pid: int) -> None:
    """SIGKILL; a process that is gone is fine."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_and_wait(pid: int, start_time: int, *, timeout_s: float = 5.0) -> bool:
    """Kill one process, for a namespace's init: the kernel ends the whole namespace with it, fork bombs too. False when it is left."""
    deadline = time.monotonic() + timeout_s
    while is_alive(pid, start_time):
        kill(pid)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def kill_tree(pid: int, start_time: int, *, timeout_s: float = 5.0) -> bool:
    """Kill ``pid`` with all descendants, the root last (it is the subreaper, or its child is the namespace's init).

    Returns False when something is left after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while is_alive(pid, start_time):
        below = descendants(pid)
        for child in below:
            kill(child)
        if not below:
            kill(pid)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    # Where this process is PID 1 of a container, the dead one was given to it to reap; elsewhere it is not ours.
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return True
