"""Exit codes and the lines that go with them."""

from __future__ import annotations

from typing import Any

import pytest

from cifixer_exec.cli import exits
from cifixer_exec.errors import InvalidRequestError, OperationConflictError, SandboxFileError, SandboxNotFoundError, SandboxStartError
from cifixer_exec.model import ExecResult, Status


def result(status: Status, **values: Any) -> ExecResult:
    """A result without output."""
    defaults: dict[str, Any] = {"exit_code": None, "signal": None, "stdout": b"", "stderr": b"", "truncated": False}
    sizes: dict[str, Any] = {"stdout_bytes": 0, "stderr_bytes": 0, "duration_s": 1.5, "cause": ""}
    return ExecResult(status=status, **{**defaults, **sizes, **values})


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (result(Status.EXITED, exit_code=0), 0),
        (result(Status.EXITED, exit_code=255), 255),
        (result(Status.EXITED), 125),
        (result(Status.SIGNALED, signal="TERM"), 143),
        (result(Status.SIGNALED, signal="SEGV"), 139),
        (result(Status.SIGNALED, signal="40"), 168),
        (result(Status.TIMED_OUT), 124),
        (result(Status.KILLED), 137),
        (result(Status.OUT_OF_MEMORY), 137),
        (result(Status.SANDBOX_LOST), 125),
        (result(Status.UNKNOWN), 125),
    ],
)
def test_exit_code(ended: ExecResult, code: int) -> None:
    assert exits.exit_code(ended) == code


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.EXITED])
def test_every_other_ending_is_told_with_its_cause(status: Status) -> None:
    assert exits.ending(result(status, signal="KILL", cause="because")).endswith(": because")


def test_an_exit_is_told_only_if_it_has_a_cause() -> None:
    assert exits.ending(result(Status.EXITED, exit_code=1)) == ""
    assert exits.ending(result(Status.EXITED, exit_code=127, cause="x: command not found")) == "x: command not found"


def test_our_errors_have_two_codes() -> None:
    assert exits.error_code(InvalidRequestError("x")) == 2
    assert exits.error_code(OperationConflictError("x")) == 2
    assert exits.error_code(SandboxNotFoundError("x")) == 3


def test_a_backends_remedy_is_part_of_its_line() -> None:
    assert exits.error_line(SandboxStartError("it did not start", "run this as root")) == "it did not start: run this as root"
    assert exits.error_line(SandboxFileError("no such file", "not_found")) == "no such file"
