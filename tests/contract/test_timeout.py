"""A time-out ends the command with its whole process tree, and keeps what was written."""

from __future__ import annotations

import pytest

from cifixer_exec import SandboxEnvironment, Status
from tests.support.contract_probes import running

TREES = {
    "plain child": "sleep {m} & sleep {m}",
    "child of a child": "sh -c 'sh -c \"sleep {m}; true\"; true' & sleep {m}",
    "setsid": "setsid sleep {m} & sleep {m}",
    "double-forked daemon": "(setsid sh -c 'sleep {m} </dev/null >/dev/null 2>&1 &' &); sleep {m}",
    "ignores TERM": "trap '' TERM HUP INT; setsid sleep {m} & sleep {m}; sleep {m}",
    "stopped": "sleep {m} & kill -STOP $!; sleep {m}",
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_a_time_out_leaves_no_process(sandbox: SandboxEnvironment, marker: str, tree: str) -> None:
    result = sandbox.run_command(f"echo begun; {tree.format(m=marker)}", timeout_s=0.7)
    assert (result.status, result.exit_code) == (Status.TIMED_OUT, None)
    assert result.stdout == b"begun\n"
    assert running(sandbox, marker) == 0


def test_a_timed_out_command_says_why(sandbox: SandboxEnvironment) -> None:
    result = sandbox.run_command("sleep 60", timeout_s=0.3)
    assert result.cause
    assert not result.ok


def test_output_of_both_streams_before_the_time_out_is_kept(sandbox: SandboxEnvironment) -> None:
    result = sandbox.run_command("seq 1 20000; echo oops >&2; sleep 60", timeout_s=1.5)
    assert result.status is Status.TIMED_OUT
    assert result.stdout == b"".join(b"%d\n" % n for n in range(1, 20001))
    assert result.stderr == b"oops\n"


def test_a_command_may_end_itself_on_term(sandbox: SandboxEnvironment) -> None:
    result = sandbox.run_command("trap 'echo cleaned up; exit 0' TERM; while :; do sleep 0.05; done", timeout_s=0.5)
    assert (result.status, result.stdout) == (Status.TIMED_OUT, b"cleaned up\n")


def test_a_command_that_ends_in_time_is_not_timed_out(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("sleep 0.1; exit 4", timeout_s=30).exit_code == 4


def test_a_time_out_does_not_touch_other_commands(sandbox: SandboxEnvironment, marker: str) -> None:
    other = sandbox.start_command(["sleep", marker])
    sandbox.run_command("sleep 60", timeout_s=0.3)
    assert running(sandbox, marker) == 1
    other.kill()
