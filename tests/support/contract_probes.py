"""Looking into a sandbox from within, with nothing but a POSIX shell."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from cifixer_exec import SandboxEnvironment

_LIST = r"""for p in /proc/[0-9]*; do tr '\0' ' ' 2>/dev/null < $p/cmdline; echo; done 2>/dev/null"""
WAIT_S = 20.0


def command_lines(sandbox: SandboxEnvironment) -> list[str]:
    """The command line of every process in the sandbox; zombies have none."""
    return [line.strip() for line in sandbox.run_command(_LIST, timeout_s=30).text.splitlines() if line.strip()]


def running(sandbox: SandboxEnvironment, marker: str) -> int:
    """How many processes ``sleep <marker>`` the sandbox has."""
    return command_lines(sandbox).count(f"sleep {marker}")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Return as soon as ``condition`` holds.

    Raises:
        AssertionError: it did not within ``timeout_s``.
    """
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def need_program(sandbox: SandboxEnvironment, name: str) -> None:
    """Skip the test when the sandbox has no such program."""
    if not sandbox.run_command(["sh", "-c", f"command -v {name}"]).ok:
        pytest.skip(f"the sandbox has no {name}")
