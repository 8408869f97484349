"""How an exec ended, as the API server tells it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec.backends.kubernetes.stream import ExecStatus
from tests.support.exec_server import SUCCESS, failure, non_zero

STATUSES: dict[str, tuple[Any, ExecStatus]] = {
    "success": (SUCCESS, ExecStatus(exit_code=0)),
    "a code": (non_zero(7), ExecStatus(exit_code=7, message="command terminated with non-zero exit code: exit status 7")),
    "internal": (
        failure(reason="InternalError", message="error executing command: x"),
        ExecStatus(exit_code=None, message="error executing command: x"),
    ),
    "reason only": (failure(reason="InternalError"), ExecStatus(exit_code=None, message="InternalError")),
    "a code among others": (
        failure(message="m", details={"causes": [{"reason": "x", "message": "9"}, {"reason": "ExitCode", "message": "137"}]}),
        ExecStatus(exit_code=137, message="m"),
    ),
    "no details": (failure(details=None), ExecStatus(exit_code=None)),
}


@pytest.mark.parametrize("what", STATUSES)
def test_a_status_says_how_an_exec_ended(what: str) -> None:
    status, parsed = STATUSES[what]
    assert ExecStatus.parse(json.dumps(status).encode()) == parsed


@given(
    st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode()))
)
def test_what_is_no_status_is_no_success(payload: bytes) -> None:
    assert ExecStatus.parse(payload).exit_code is None


@pytest.mark.parametrize("message", ["seven", "", None])
def test_a_code_that_is_none_is_no_success(message: str | None) -> None:
    causes = [{"reason": "ExitCode", "message": message}]
    assert ExecStatus.parse(json.dumps(failure(details={"causes": causes})).encode()).exit_code is None
