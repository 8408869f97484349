"""How commands and errors become exit codes: those of a shell (POSIX) and of timeout(1)."""

from __future__ import annotations

import signal

from cifixer_exec.errors import BackendError, ExecutorError, InvalidRequestError
from cifixer_exec.model import ExecResult, Status

UNHEALTHY = 1
INVALID = 2
FAILED = 3
TIMED_OUT = 124
UNKNOWN = 125
INTERRUPTED = 128 + signal.SIGINT
_KILLED = 128 + signal.SIGKILL


def exit_code(result: ExecResult) -> int:
    """The command's own code; 128+n for a signal; 124 timed out; 137 killed or out of memory; 125 lost or unknown."""
    if result.status is Status.EXITED:
        return UNKNOWN if result.exit_code is None else result.exit_code
    if result.status is Status.SIGNALED:
        return 128 + _signal_number(result.signal)
    if result.status in (Status.KILLED, Status.OUT_OF_MEMORY):
        return _KILLED
    return TIMED_OUT if result.status is Status.TIMED_OUT else UNKNOWN


def ending(result: ExecResult) -> str:
    """One line on how it ended, for a person; empty when the exit code says it all (127 has a cause: the program was not found)."""
    if result.status is Status.EXITED:
        return result.cause
    words = {
        Status.SIGNALED: f"the command was ended by signal {result.signal}",
        Status.TIMED_OUT: f"the command timed out after {result.duration_s:.1f} s and was killed with its whole process tree",
        Status.KILLED: "the command was killed on request",
        Status.OUT_OF_MEMORY: "the command ran out of memory and was killed by the kernel",
        Status.SANDBOX_LOST: "the sandbox was lost while the command ran",
        Status.UNKNOWN: "nobody knows how the command ended",
    }
    return words[result.status] + (f": {result.cause}" if result.cause else "")


def error_code(error: ExecutorError) -> int:
    """2: the request is wrong; 3: anything else of ours."""
    return INVALID if isinstance(error, InvalidRequestError) else FAILED


def error_line(error: ExecutorError) -> str:
    """What to tell a person. A backend's error carries its remedy in ``code``."""
    remedy = error.code if isinstance(error, BackendError) and " " in error.code and error.code not in error.message else ""
    return f"{error.message}: {remedy}" if remedy else error.message


def _signal_number(name: str | None) -> int:
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        return int(name) if name and name.isdigit() else 0
