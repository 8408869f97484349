"""Doorbells that are lost, doubled or rung by two callers: each op is carried out, and once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from cifixer_exec import AppConfig, OperationConflictError
from cifixer_exec.queues import pool_queue
from tests.support.chaos_stack import ONE_BACKEND, Client, Crew, op, pause, platform_ids, queue_here, raw_redis, resume, runs
from tests.support.contract_probes import wait_until
from tests.support.contract_stack import WorkerProcess

pytestmark = ONE_BACKEND
LEDGER = "echo started >> ran; sleep 0.5; echo done; exit 7"


class Queues:
    """The lists of Celery's queues, to look into and to spoil."""

    def __init__(self, config: AppConfig) -> None:
        self._client: Any = raw_redis(config)
        self._prefix = f"{config.namespace}:"

    def close(self) -> None:
        self._client.close()

    def length(self, queue: str) -> int:
        return int(self._client.llen(self._prefix + queue))

    def lose(self, queue: str) -> None:
        assert self._client.delete(self._prefix + queue) == 1

    def double(self, queue: str, message: bytes, times: int) -> None:
        self._client.lpush(self._prefix + queue, *[message] * times)

    def message(self, queue: str) -> bytes:
        (found,) = self._client.lrange(self._prefix + queue, 0, -1)
        return bytes(found)

    def unacknowledged(self) -> int:
        return int(self._client.hlen(self._prefix + "unacked")) + int(self._client.zcard(self._prefix + "unacked_index"))

    def nobody_reads(self) -> bool:
        """No blocking read is open: what is pushed now stays in its list."""
        return not any("b" in client["flags"] and client["cmd"] == "brpop" for client in self._client.client_list())


@pytest.fixture
def queues(config: AppConfig) -> Iterator[Queues]:
    found = Queues(config)
    yield found
    found.close()


@contextmanager
def paused(worker: WorkerProcess, queues: Queues) -> Iterator[None]:
    """Stopped, for less than its lease; its last read of the queues has ended."""
    pause(worker)
    try:
        wait_until(queues.nobody_reads, "the last read of the queues ends")
        yield
    finally:
        resume(worker)


def test_a_creation_whose_doorbell_is_lost_before_any_worker_lives_is_made_once(
    config: AppConfig, queues: Queues, start: Crew, threads: ThreadPoolExecutor
) -> None:
    sandbox = start.unmade()
    made = threads.submit(sandbox.init)
    wait_until(lambda: queues.length(pool_queue("local")) == 1, "the doorbell rings")
    queues.lose(pool_queue("local"))
    start()
    made.result(timeout=10)
    assert platform_ids(config) == {sandbox.sandbox_id}
    assert sandbox.run_command("echo works").stdout == b"works\n"


def test_doorbells_lost_in_the_queue_of_a_placement_without_a_worker_are_rung_again(config: AppConfig, queues: Queues, start: Crew) -> None:
    first = start()
    sandbox = start.sandbox()
    assert first.stop() == 0
    handles = [sandbox.start_command(LEDGER) for _ in range(3)]
    assert queues.length(queue_here(config)) == 3
    queues.lose(queue_here(config))
    start()
    assert [(r.exit_code, r.stdout) for r in (handle.wait() for handle in handles)] == [(7, b"done\n")] * 3
    assert runs(sandbox) == 3


def test_a_doorbell_lost_in_the_direct_queue_of_a_stopped_owner_is_rung_again(config: AppConfig, queues: Queues, start: Crew) -> None:
    owner = start(lease_s=6.0)
    direct = f"{start.name_of(owner)}.dq2"
    sandbox = start.sandbox()
    with paused(owner, queues):
        handle = sandbox.start_command(LEDGER)
        queues.lose(direct)
    result = handle.wait()
    assert (result.exit_code, result.stdout, runs(sandbox)) == (7, b"done\n", 1)
    assert op(config, handle.op_id).rings == 2


def test_a_doorbell_that_is_doubled_many_times_runs_its_op_once(config: AppConfig, queues: Queues, start: Crew) -> None:
    owner = start(lease_s=6.0)
    direct = f"{start.name_of(owner)}.dq2"
    sandbox = start.sandbox()
    with paused(owner, queues):
        handle = sandbox.start_command(LEDGER)
        message = queues.message(direct)
        for queue in (direct, pool_queue("local"), queue_here(config)):
            queues.double(queue, message, 20)
    wait_until(lambda: runs(sandbox) > 0, "the command begins")
    queues.double(direct, message, 20)  # while it runs
    assert handle.wait().exit_code == 7
    for queue in (direct, pool_queue("local"), queue_here(config)):
        queues.double(queue, message, 20)  # and after its end
    wait_until(lambda: not any(map(queues.length, (direct, pool_queue("local"), queue_here(config)))), "all are answered")
    assert sandbox.run_command("cat ran").stdout == b"started\n"
    assert op(config, handle.op_id).attempt == 1
    for _ in range(10):  # more than the worker may hold unacknowledged: every copy was given back
        start.sandbox().teardown()
    wait_until(lambda: queues.unacknowledged() == 0, "nothing is left unacknowledged")


def test_two_processes_with_one_op_id_have_one_execution_and_the_same_result(config: AppConfig, start: Crew) -> None:
    start(), start()
    sandbox = start.sandbox()
    command = f"echo to stderr >&2; {LEDGER}"
    pair = [Client(config, "run", sandbox.sandbox_id, "the-op", command) for _ in range(2)]
    for client in pair:
        client.go()
    first, second = (client.answer() for client in pair)
    assert first[:4] == ["exited", 7, "done\n", "to stderr\n"]
    assert first == second
    again = sandbox.run_command(command, op_id="the-op", timeout_s=60)  # a client that tries once more, later
    assert [again.status, again.exit_code, again.text, again.stderr_text, again.duration_s, again.op_id] == first
    assert runs(sandbox) == 1
    with pytest.raises(OperationConflictError, match="the-op"):
        sandbox.run_command(f"{command}; true", op_id="the-op", timeout_s=60)
    assert runs(sandbox) == 1
