"""Commands in the background, batches, and op ids."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifixer_exec import InvalidRequestError, OperationConflictError, SandboxEnvironment, SandboxFileError, Status
from tests.support.contract_probes import running, wait_until
from tests.support.contract_stack import Stack

WAIT_ELSEWHERE = """
import json, sys
from cifixer_exec import AppConfig, attach
sandbox = attach(sys.argv[1], AppConfig.from_env())
result = sandbox.command(sys.argv[2]).wait()
sandbox.close()
print(json.dumps([result.status, result.exit_code, result.text]))
"""
READ_ELSEWHERE = """
import sys
from cifixer_exec import AppConfig, attach
sandbox = attach(sys.argv[1], AppConfig.from_env())
print(sandbox.read_text(sys.argv[2]), sandbox.run_command("cat " + sys.argv[2]).text)
sandbox.close()
"""


def test_wait_gives_the_whole_result(sandbox: SandboxEnvironment) -> None:
    result = sandbox.start_command("echo out; echo err >&2; exit 5").wait()
    assert (result.exit_code, result.stdout, result.stderr) == (5, b"out\n", b"err\n")


def test_wait_may_be_called_again(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("seq 1000; exit 5")
    assert handle.wait() == handle.wait()


def test_start_command_returns_while_the_command_runs(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("read x; echo got $x", stdin_open=True)
    handle.send_stdin("this\n")
    assert handle.wait().stdout == b"got this\n"


def test_output_goes_on_from_an_offset(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("printf 0123456789; printf abcdef >&2")
    chunks = list(handle.output(stdout_offset=4, stderr_offset=5))
    assert b"".join(c.data for c in chunks if c.stream == "stdout") == b"456789"
    assert b"".join(c.data for c in chunks if c.stream == "stderr") == b"f"
    assert {c.stream: c.offset for c in chunks} == {"stdout": 4, "stderr": 5}


def test_stdin_can_be_sent_piece_by_piece(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("sha256sum | cut -c1-16; echo after", stdin_open=True)
    for piece in (b"abc", bytes(300_000), b"xyz"):
        handle.send_stdin(piece)
    handle.close_stdin()
    assert handle.wait().text.split() == [hashlib.sha256(b"abc" + bytes(300_000) + b"xyz").hexdigest()[:16], "after"]


def test_closing_stdin_leaves_output_open(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("cat; echo after the end", stdin_open=True)
    handle.close_stdin()
    assert handle.wait().stdout == b"after the end\n"


def test_stdin_to_a_command_that_ended_is_a_clear_error(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("exit 0", stdin_open=True)
    handle.wait()
    with pytest.raises(SandboxFileError) as caught:
        handle.send_stdin(b"too late")
    assert caught.value.code == "stdin_closed"


def test_a_signal_reaches_the_command(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("trap 'echo caught; exit 7' USR1; echo ready; while :; do sleep 0.05; done")
    next(iter(handle.output()))
    handle.signal("USR1")
    result = handle.wait()
    assert (result.exit_code, result.stdout) == (7, b"ready\ncaught\n")


def test_a_signal_may_have_its_prefix(sandbox: SandboxEnvironment, marker: str) -> None:
    handle = sandbox.start_command(["sleep", marker])
    handle.signal("SIGINT")
    assert handle.wait().signal == "INT"


def test_an_unknown_signal_is_refused_by_name(sandbox: SandboxEnvironment, marker: str) -> None:
    handle = sandbox.start_command(["sleep", marker])
    with pytest.raises(InvalidRequestError, match="NONSENSE"):
        handle.signal("NONSENSE")
    handle.kill()


@pytest.mark.parametrize("tree", ["sleep {m}", "trap '' TERM; setsid sleep {m} & sleep {m}", "(setsid sh -c 'sleep {m} &' &); sleep {m}"])
def test_kill_leaves_no_process(sandbox: SandboxEnvironment, marker: str, tree: str) -> None:
    handle = sandbox.start_command(f"echo begun; {tree.format(m=marker)}; true")
    wait_until(lambda: running(sandbox, marker) > 0, "the tree runs")
    handle.kill()
    assert running(sandbox, marker) == 0
    result = handle.wait()
    assert (result.status, result.exit_code, result.stdout) == (Status.KILLED, None, b"begun\n")


def test_killing_twice_is_fine(sandbox: SandboxEnvironment, marker: str) -> None:
    handle = sandbox.start_command(["sleep", marker])
    handle.kill()
    handle.kill()
    assert handle.wait().status is Status.KILLED


def test_killing_a_command_that_ended_changes_nothing(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("exit 3")
    handle.wait()
    handle.kill()
    assert handle.wait().exit_code == 3


def test_a_batch_gives_one_result_per_command(sandbox: SandboxEnvironment) -> None:
    results = sandbox.run_batch(["echo one", ["echo", "two"], "echo three >&2"])
    assert [(r.exit_code, r.stdout, r.stderr) for r in results] == [(0, b"one\n", b""), (0, b"two\n", b""), (0, b"", b"three\n")]


def test_a_batch_stops_at_the_first_failure(sandbox: SandboxEnvironment, name: str) -> None:
    results = sandbox.run_batch(["echo one", "exit 3", f"touch {name}"])
    assert [r.exit_code for r in results] == [0, 3]
    assert not sandbox.exists(name)


def test_a_batch_stops_at_a_time_out(sandbox: SandboxEnvironment, name: str) -> None:
    results = sandbox.run_batch(["true", "sleep 60", f"touch {name}"], timeout_s=0.5)
    assert [r.status for r in results] == [Status.EXITED, Status.TIMED_OUT]
    assert not sandbox.exists(name)


def test_a_batch_runs_in_order(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_batch([f"echo {n} >> {name}" for n in range(20)])
    assert sandbox.read_text(name) == "".join(f"{n}\n" for n in range(20))


def test_an_empty_batch_is_refused(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError, match="at least one"):
        sandbox.run_batch([])


def test_the_same_op_id_runs_once(sandbox: SandboxEnvironment, name: str) -> None:
    first, second = (sandbox.run_command(f"echo x | tee -a {name}; exit 4", op_id=f"op-{name}") for _ in range(2))
    assert sandbox.read_text(name) == "x\n"
    assert (first.exit_code, first.stdout) == (second.exit_code, second.stdout) == (4, b"x\n")


def test_the_same_op_id_at_once_from_many_threads_runs_once(sandbox: SandboxEnvironment, name: str) -> None:
    def run(_: int) -> bytes:
        return sandbox.run_command(f"echo x >> {name}; sleep 0.3; cat {name}", op_id=f"op-{name}").stdout

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == [b"x\n"] * 8


def test_the_same_op_id_attaches_to_a_running_command(sandbox: SandboxEnvironment, name: str) -> None:
    handle = sandbox.start_command("echo first; sleep 0.5; echo last", op_id=name)
    assert sandbox.run_command("echo first; sleep 0.5; echo last", op_id=name).stdout == b"first\nlast\n"
    assert handle.wait().stdout == b"first\nlast\n"


def test_a_batch_with_the_same_op_id_runs_once(sandbox: SandboxEnvironment, name: str) -> None:
    batch = [f"echo 1 >> {name}", f"echo 2 >> {name}"]
    assert [r.exit_code for r in sandbox.run_batch(batch, op_id=f"op-{name}")] == [0, 0]
    assert [r.exit_code for r in sandbox.run_batch(batch, op_id=f"op-{name}")] == [0, 0]
    assert sandbox.read_text(name) == "1\n2\n"


def test_the_same_op_id_with_another_command_is_a_conflict(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command("true", op_id=name)
    with pytest.raises(OperationConflictError, match=name):
        sandbox.run_command("false", op_id=name)


def test_the_same_op_id_with_other_stdin_is_a_conflict(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command("cat", stdin=b"one", op_id=name)
    with pytest.raises(OperationConflictError):
        sandbox.run_command("cat", stdin=b"two", op_id=name)


def test_another_process_attaches_and_waits_for_a_running_command(sandbox: SandboxEnvironment, stack: Stack, name: str) -> None:
    handle = sandbox.start_command("echo begun; read x; echo got $x; exit 6", stdin_open=True, op_id=name)
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(stack.python, WAIT_ELSEWHERE, sandbox.sandbox_id, name)
        handle.send_stdin("it\n", eof=True)
        assert json.loads(elsewhere.result()) == ["exited", 6, "begun\ngot it\n"]


def test_another_process_reads_a_finished_command(sandbox: SandboxEnvironment, stack: Stack, name: str) -> None:
    sandbox.run_command("echo done; exit 2", op_id=name)
    assert json.loads(stack.python(WAIT_ELSEWHERE, sandbox.sandbox_id, name)) == ["exited", 2, "done\n"]


def test_another_process_uses_the_same_files(sandbox: SandboxEnvironment, stack: Stack, name: str) -> None:
    sandbox.write_file(name, "shared")
    assert stack.python(READ_ELSEWHERE, sandbox.sandbox_id, name) == "shared shared\n"


def test_an_op_that_nobody_started_is_refused(sandbox: SandboxEnvironment, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        sandbox.command(name).wait()
