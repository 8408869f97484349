"""Who takes over: a rolling update with a peer, and what a caller is told when there is none."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cifixer_exec import AppConfig, ExecutorError, QueueUnavailableError, SandboxEnvironment, attach
from cifixer_exec.backends.registry import make_backend
from tests.support.chaos_deaths import frozen
from tests.support.chaos_stack import COUNT, LEASE_S, ONE_BACKEND, Crew, check_once, kill, queue_here, raw_redis, run_in_background

GRACE_S = 8.0
AT_ONCE_S = 2.0


class Caller:
    """Uses a sandbox all the time, one command after the other."""

    def __init__(self, sandbox: SandboxEnvironment) -> None:
        self.took_s: list[float] = []
        self.errors: list[ExecutorError] = []
        self._sandbox = sandbox
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._call)

    @contextmanager
    def calling(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def _call(self) -> None:
        while not self._over.wait(0.02):
            begun = time.monotonic()
            try:
                assert self._sandbox.run_command("echo on").stdout == b"on\n"
            except ExecutorError as error:
                self.errors.append(error)
            self.took_s.append(time.monotonic() - begun)


def test_a_rolling_update_costs_an_idle_sandbox_no_wait_and_a_running_command_nothing(
    config: AppConfig, start: Crew, threads: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    old = start(drain_s=GRACE_S)
    idle, busy = start.sandbox(), start.sandbox()
    peer = start(drain_s=GRACE_S)
    future = run_in_background(threads, busy, COUNT)
    caller, other = Caller(idle), Caller(busy)
    with caller.calling(), other.calling():
        time.sleep(0.3)
        begun = time.monotonic()
        assert old.stop() == 0, old.log()
        drained_s = time.monotonic() - begun
        time.sleep(0.3)
    check_once(busy, future.result(timeout=20))
    assert [start.owner_of(sandbox) for sandbox in (idle, busy)] == [peer, peer]
    with capsys.disabled():
        longest = f"{max(caller.took_s):.2f} s, of the busy one {max(other.took_s):.2f} s"
        print(f" [drained in {drained_s:.1f} s; longest of {len(caller.took_s)} calls of the idle one {longest}]", end="")
    assert caller.errors + other.errors == []
    assert max(caller.took_s) < AT_ONCE_S


def test_a_slow_operation_of_one_sandbox_does_not_hold_the_others_while_its_worker_drains(
    config: AppConfig, start: Crew, threads: ThreadPoolExecutor
) -> None:
    old = start(drain_s=GRACE_S)
    slow, busy = start.sandbox(), start.sandbox()
    start()
    running = run_in_background(threads, busy, COUNT)
    busy.run_command("mkdir many; cd many; i=0; while [ $i -lt 20000 ]; do : > f$i; i=$((i + 1)); done", timeout_s=60)
    with frozen(config, slow.sandbox_id):
        hanging = threads.submit(slow.exists, "x")
        removing = threads.submit(busy.remove, "many", recursive=True)
        time.sleep(0.1)
        old.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        removing.result(timeout=20)
        assert busy.run_command("echo on").stdout == b"on\n"
        assert time.monotonic() - begun < GRACE_S / 2
        check_once(busy, running.result(timeout=20))
    assert hanging.result(timeout=20) is False
    assert old.process.wait(20) == 0


@ONE_BACKEND
def test_without_a_peer_callers_are_told_the_placement_and_the_queue_and_a_new_worker_takes_over(
    config: AppConfig, start: Crew, threads: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    only = start()
    sandbox = start.sandbox()
    running = run_in_background(threads, sandbox, "echo started >> ran; sleep 600", "the-op")
    kill(only)
    with raw_redis(config) as client:  # its deadline and the grace behind it are over: nobody waits here for a minute
        client.hset(f"{config.namespace}:op:the-op", "deadline_ms", int(time.time() * 1000) - 61_000)
    begun = time.monotonic()
    wait_s = LEASE_S + 1
    impatient = attach(sandbox.sandbox_id, config.with_(start_timeout_s=wait_s))
    with pytest.raises(QueueUnavailableError) as queued:
        impatient.run_command("echo never >> ran")
    waited_s = time.monotonic() - begun
    impatient.close()
    given_up = running.exception(timeout=10)
    start()
    assert sandbox.run_command("cat ran").stdout == b"started\n"
    with capsys.disabled():
        print(f" [after {waited_s:.1f} s: {str(queued.value)!r}; of the one that ran: {str(given_up)!r}]", end="")
    assert isinstance(given_up, QueueUnavailableError)
    for error in (queued.value, given_up):
        assert str(error).startswith(f"no worker can reach placement '{make_backend(config).placement}'")
        assert queue_here(config) in str(error)
        assert "start a worker" in str(error).lower()
    assert wait_s <= waited_s < wait_s + 4
