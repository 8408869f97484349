"""What is cancelled never starts, and what is killed is dead when the call returns, whoever dies meanwhile."""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifixer_exec import AppConfig, Status
from tests.support.chaos_stack import LEASE_S, ONE_BACKEND, Crew, kill, op, runs
from tests.support.contract_probes import running, wait_until
from tests.support.contract_stack import processes_mentioning

#: A tree with a child in a session of its own and a daemon that forked twice; nothing of it heeds SIGTERM.
TREE = "trap '' TERM; echo started >> ran; setsid sleep {m} & (setsid sh -c 'sleep {m} & exit' &); sleep {m} & wait; wait; sleep {m}"


@pytest.fixture
def marker() -> str:
    """An argument for ``sleep`` that no other process has."""
    return str(500_000_000 + secrets.randbelow(400_000_000))


@ONE_BACKEND
def test_a_command_that_is_killed_while_no_worker_lives_never_starts(config: AppConfig, start: Crew) -> None:
    first = start()
    sandbox = start.sandbox()
    assert first.stop() == 0
    handle = sandbox.start_command("echo started >> ran")
    begun = time.monotonic()
    handle.kill()
    assert time.monotonic() - begun < 1
    assert handle.wait().status is Status.KILLED
    start()
    assert sandbox.run_command("echo works").stdout == b"works\n"
    time.sleep(2.5)  # longer than a doorbell goes unanswered
    assert runs(sandbox) == 0
    assert op(config, handle.op_id).attempt == 0


@ONE_BACKEND
def test_a_command_that_is_killed_while_its_worker_is_busy_never_starts(standing: Crew) -> None:
    sandbox = standing.sandbox()
    busy = [sandbox.start_command("read line; echo got $line", stdin_open=True) for _ in range(7)]
    for handle in busy:
        handle.send_stdin("")  # each is there
    queued = sandbox.start_command("echo started >> ran")
    queued.kill()
    assert queued.wait().status is Status.KILLED
    for handle in busy:
        handle.send_stdin("it\n", eof=True)
    assert [handle.wait().text for handle in busy] == ["got it\n"] * 7
    time.sleep(1)
    assert runs(sandbox) == 0
    sandbox.teardown()


def test_no_process_of_a_killed_command_is_left_when_the_call_returns(standing: Crew, marker: str) -> None:
    sandbox = standing.sandbox()
    handle = sandbox.start_command(TREE.format(m=marker))
    wait_until(lambda: running(sandbox, marker) == 3, "the tree is there")
    handle.kill()
    assert processes_mentioning(marker) == []
    assert handle.wait().status is Status.KILLED
    assert runs(sandbox) == 1
    sandbox.teardown()


def test_no_process_is_left_when_the_call_returns_although_the_owner_was_killed_meanwhile(
    config: AppConfig, start: Crew, threads: ThreadPoolExecutor, marker: str
) -> None:
    owner = start()
    sandboxes = [start.sandbox() for _ in range(4)]
    markers = [f"{marker}{n}" for n in range(4)]
    handles = [sandbox.start_command(TREE.format(m=mine)) for sandbox, mine in zip(sandboxes, markers, strict=True)]
    for mine in markers:
        wait_until(lambda mine=mine: len(processes_mentioning(f"sleep {mine}")) >= 3, "the tree is there")  # type: ignore[misc]
    start()
    delays = (0.0, 0.02, 0.3, 1.0)  # the kill comes before, with and long after the cancel; SIGKILL follows SIGTERM 2 s later
    begun = time.monotonic()

    def kill_late(n: int) -> float:
        time.sleep(max(delays) - delays[n])
        handles[n].kill()
        assert processes_mentioning(markers[n]) == []
        return time.monotonic() - begun

    waiting = [threads.submit(kill_late, n) for n in range(4)]
    time.sleep(max(delays))
    kill(owner)
    took_s = max(future.result(timeout=20) for future in waiting)
    assert took_s < max(delays) + LEASE_S + 5
    assert [handle.wait().status for handle in handles] == [Status.KILLED] * 4
    assert [runs(sandbox) for sandbox in sandboxes] == [1] * 4


@ONE_BACKEND
def test_a_long_batch_that_is_cancelled_while_its_owner_dies_leaves_no_process(config: AppConfig, start: Crew, marker: str) -> None:
    """Its runner has dropped the records of the first commands: that they ended is known, how is not."""
    owner = start()
    sandbox = start.sandbox()
    threads = ThreadPoolExecutor(1)
    batch = threads.submit(sandbox.run_batch, [*["true"] * 1001, f"sleep {marker}"], op_id="the-batch")
    wait_until(lambda: running(sandbox, marker) == 1, "the last command runs")
    kill(owner)
    start()
    sandbox.command("the-batch").kill()
    assert processes_mentioning(marker) == []
    assert [r.status for r in batch.result(timeout=20)] == [Status.UNKNOWN]
    threads.shutdown()
