"""Locks between the processes of one host, held by flock(2): the kernel lets go of them with the process that dies.

A lock file is there only while it is held or was left by a crash: whoever releases it removes it.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_POLL_S = 0.005


def take(path: Path, *, timeout_s: float) -> int | None:
    """Lock the file ``path``, made if it is not there; None when somebody else still had it after ``timeout_s``.

    Raises:
        OSError: the file cannot be made.
    """
    give_up = time.monotonic() + timeout_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        busy = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except BlockingIOError:
            busy = True
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if busy:
            if time.monotonic() >= give_up:
                return None
            time.sleep(_POLL_S)


def release(path: Path, descriptor: int) -> None:
    """Let go of what :func:`take` gave. Whoever waits for the file meanwhile takes a new one."""
    path.unlink(missing_ok=True)
    # Not by closing alone: a child that another thread is just forking may hold the same open file.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the locked file is the one at ``path``: its last holder may have removed it before we got it."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
