"""What holds for the runner of every sandbox, and for the user that its commands are, whatever the backend."""

from __future__ import annotations

import hashlib

from cifixer_exec.model import SandboxSpec

DEFAULT_MAX_PROCESSES = 512
MAX_OPEN_FILES = 65_536
#: At once in one sandbox; each has a supervisor with about a dozen threads.
MAX_COMMANDS = 64


def max_processes(spec: SandboxSpec) -> int:
    return int(spec.max_processes or DEFAULT_MAX_PROCESSES)


def limit_arguments(spec: SandboxSpec) -> list[str]:
    """Of ``runner serve``, with the sandbox's lifetime as its own lease."""
    return [
        *("--max-processes", str(max_processes(spec))),
        *("--max-commands", str(MAX_COMMANDS)),
        *("--max-open-files", str(MAX_OPEN_FILES)),
        *("--expires-in", f"{spec.lifetime_s:.3f}"),
    ]


def root_arguments(*roots: str) -> list[str]:
    """Of ``runner serve``: what its file verbs may touch."""
    return [argument for root in roots for argument in ("--allow-root", root)]


def user_id(what: str, *, few_ids: bool) -> int:
    """Each sandbox has a user id of its own, because the kernel counts a user's processes over all containers of a host.

    ``what`` names the sandbox. ``few_ids``: where containers have 65,536 ids that are mapped, two sandboxes of one user namespace can meet
    by chance; they would share one process limit.
    """
    first, count = (10_000, 50_000) if few_ids else (0x7000_0000, 0x0F00_0000)
    return first + int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big") % count
