"""How big a sandbox's disk is where files are memory of the sandbox: full must mean "no space left", not out of memory."""

from __future__ import annotations

from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import MIB

#: Of the memory, what files may take at the most unless somebody asks for more; the rest is for programs.
_SHARE = 0.75
_MIN_SPOOL_BYTES, _MAX_SPOOL_BYTES = 128 * MIB, 512 * MIB


def disk_size_bytes(asked_bytes: float | None, *, memory_bytes: float | None, most_bytes: int) -> int:
    """``memory_bytes`` None: no limit on memory, so that ``most_bytes`` is the default.

    Raises:
        InvalidRequestError: files would not fit into the memory that they are.
    """
    if asked_bytes is None:
        return most_bytes if memory_bytes is None else min(most_bytes, int(memory_bytes * _SHARE))
    if memory_bytes is not None and asked_bytes >= memory_bytes:
        raise InvalidRequestError(
            f"disk_bytes={asked_bytes:.0f} does not fit into memory_bytes={memory_bytes:.0f}, and files are memory here: "
            "ask for more memory or a smaller disk (Docker: or set CIFIXER_DOCKER_DISK=volume)"
        )
    return int(asked_bytes)


def spool_size_bytes(disk_bytes: int) -> int:
    """What the runner has for the output of commands, beside a disk of that size."""
    return min(_MAX_SPOOL_BYTES, max(_MIN_SPOOL_BYTES, disk_bytes // 2))
