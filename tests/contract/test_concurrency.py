"""Many commands at once in one sandbox."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from cifixer_exec import SandboxEnvironment, Status
from tests.contract.conftest import Make
from tests.support.contract_probes import running


def test_twenty_commands_at_once_do_not_mix_their_output(sandbox: SandboxEnvironment) -> None:
    def run(number: int) -> bytes:
        return sandbox.run_command(f"for i in $(seq 200); do echo out {number}; echo err {number} >&2; done").stdout

    with ThreadPoolExecutor(20) as pool:
        outputs = list(pool.map(run, range(20)))
    assert outputs == [b"out %d\n" % number * 200 for number in range(20)]


def test_commands_run_side_by_side_not_one_after_another(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(["mkfifo", name])
    reader = sandbox.start_command(["cat", name], timeout_s=30)
    assert sandbox.run_command(f"echo met > {name}", timeout_s=30).ok
    assert reader.wait().stdout == b"met\n"


def test_a_chatty_command_does_not_stall_quick_ones(sandbox: SandboxEnvironment) -> None:
    chatty = sandbox.start_command("yes", output_limit_bytes=1000)
    assert [sandbox.run_command(f"echo {n}", timeout_s=20).stdout for n in range(10)] == [b"%d\n" % n for n in range(10)]
    chatty.kill()
    assert chatty.wait().status is Status.KILLED


def test_a_reader_that_stands_still_does_not_stall_quick_ones(sandbox: SandboxEnvironment) -> None:
    chatty = sandbox.start_command("yes")
    standing = chatty.output()
    next(standing)
    assert [sandbox.run_command(f"echo {n}", timeout_s=20).stdout for n in range(10)] == [b"%d\n" % n for n in range(10)]
    chatty.kill()
    standing.close()  # type: ignore[attr-defined]  # a generator


def test_a_background_child_does_not_hold_the_command(fresh: SandboxEnvironment, marker: str) -> None:
    result = fresh.run_command(f"sleep {marker} & echo started")
    assert (result.status, result.stdout) == (Status.EXITED, b"started\n")


def test_a_background_child_goes_on(fresh: SandboxEnvironment, marker: str) -> None:
    fresh.run_command(f"sleep {marker} & echo started")
    assert running(fresh, marker) == 1


def test_a_server_started_in_the_background_serves_later_commands(fresh: SandboxEnvironment) -> None:
    fresh.run_command("mkfifo in out; (while cat in > out; do :; done) >/dev/null 2>&1 &")
    result = fresh.run_command("echo ping > in & head -n 1 out", timeout_s=20)
    assert (result.status, result.stdout) == (Status.EXITED, b"ping\n")


def test_five_sandboxes_share_nothing(make: Make) -> None:
    sandboxes = [make() for _ in range(5)]
    for number, sandbox in enumerate(sandboxes):
        sandbox.write_file("mine", str(number))
    assert [s.read_text("mine") for s in sandboxes] == ["0", "1", "2", "3", "4"]
    assert [len(s.list_files()) for s in sandboxes] == [1] * 5
