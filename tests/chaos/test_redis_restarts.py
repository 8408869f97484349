"""Redis comes back: with all it knew, and with nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cifixer_exec import AppConfig, ExecutorError, QueueUnavailableError, attach
from cifixer_exec.store.records import Taken
from tests.support.chaos_stack import (
    COUNT,
    EXPECTED,
    LEASE_S,
    ONE_BACKEND,
    Crew,
    alive,
    ask,
    check_once,
    counting,
    kill,
    one_sandbox_each,
    op,
    pause,
    platform_ids,
    raw_redis,
    registered,
    resume,
    run_in_background,
    send_reap,
)
from tests.support.contract_probes import wait_until
from tests.support.contract_stack import on_present_backend
from tests.support.redis_server import RedisServer, redis_server

BACK_S = 10.0


@ONE_BACKEND
def test_a_redis_with_its_append_only_file_lets_everyone_go_on_soon(
    config: AppConfig, server: RedisServer, start: Crew, threads: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = start(), start()
    mine, idle = one_sandbox_each(start, first, second)
    third = start()
    command, output = counting(lines=60)
    running = run_in_background(threads, mine, command)
    waiting = [threads.submit(mine.run_command, f"sleep {n}; echo {n}", timeout_s=60) for n in (1, 3, 4.5)]
    time.sleep(0.3)
    server.stop()
    time.sleep(LEASE_S + 0.5)  # every lease is over
    server.start()
    back = time.monotonic()
    assert mine.run_command("echo on").stdout == b"on\n"
    busy_s = time.monotonic() - back
    assert idle.run_command("echo on").stdout == b"on\n"
    idle_s = time.monotonic() - back
    for worker in (first, second):
        pause(worker)
    begun = time.monotonic()
    made = threads.submit(start.sandbox)  # only the worker that owned nothing is there
    try:
        made.result(timeout=BACK_S)
        third_s = time.monotonic() - begun
    finally:
        for worker in (first, second):
            resume(worker)
    with capsys.disabled():
        print(f" [first op: busy sandbox {busy_s:.1f} s, idle {idle_s:.1f} s; a new sandbox by the idle worker {third_s:.1f} s]", end="")
    assert max(busy_s, idle_s) < BACK_S
    assert third.process.poll() is None
    check_once(mine, running.result(timeout=30), output)
    assert [future.result(timeout=30).text for future in waiting] == ["1\n", "3\n", "4.5\n"]


# Redis that lost everything


@pytest.fixture
def forgetful() -> Iterator[RedisServer]:
    """Without any persistence."""
    with redis_server() as started:
        yield started


@pytest.fixture
def amnesia(backend: str, forgetful: RedisServer, namespace: str, tmp_path: Path) -> Iterator[Crew]:
    """Workers at a Redis that forgets all when it is restarted; they reap what is two seconds old."""
    config = AppConfig(
        redis_url=forgetful.url, namespace=namespace, state_dir=tmp_path / "state", lease_s=LEASE_S, drain_s=1.0, creation_grace_s=2.0
    )
    crew = Crew(on_present_backend(backend, config), tmp_path)
    yield crew
    crew.end()


def lose_everything(server: RedisServer) -> float:
    """Returns when the server was back."""
    server.stop()
    server.start()
    return time.monotonic()


def eventually(action: Callable[[], None], until: float) -> None:
    """``action`` again and again until it raises no error of ours and fails no assertion."""
    while True:
        try:
            return action()
        except (ExecutorError, AssertionError):
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


@ONE_BACKEND
def test_a_redis_that_lost_everything_is_told_to_who_waits(forgetful: RedisServer, amnesia: Crew, threads: ThreadPoolExecutor) -> None:
    amnesia()
    sandbox = amnesia.sandbox()
    future = run_in_background(threads, sandbox, "echo started >> ran; sleep 600")
    back = lose_everything(forgetful)
    with pytest.raises(QueueUnavailableError) as caught:
        future.result(timeout=20)
    assert time.monotonic() - back < 15
    said = str(caught.value)
    assert "Redis" in said
    assert "lost" in said  # what happened
    assert "the same op id" in said  # what to do


def test_a_redis_that_lost_everything_does_not_cost_a_sandbox_with_a_living_owner(
    forgetful: RedisServer, amnesia: Crew, threads: ThreadPoolExecutor
) -> None:
    amnesia()
    sandbox = amnesia.sandbox()
    sandbox.write_file("marker", b"mine")
    first = run_in_background(threads, sandbox, COUNT, "the-op")
    time.sleep(2.5)  # older than what the reaper lets be
    back = lose_everything(forgetful)
    send_reap(amnesia.config)  # as beat may do it before the owner has said what it has
    eventually(lambda: attach_and_look(amnesia, sandbox.sandbox_id), back + BACK_S)
    assert time.monotonic() - back < BACK_S
    send_reap(amnesia.config)
    assert isinstance(first.exception(timeout=20), QueueUnavailableError | None)
    again = sandbox.run_command(COUNT, op_id="the-op", timeout_s=60)
    check_once(sandbox, again, EXPECTED)
    time.sleep(1)
    assert alive(amnesia.config, sandbox.sandbox_id)


def attach_and_look(crew: Crew, sandbox_id: str) -> None:
    attached = attach(sandbox_id, crew.config.with_(start_timeout_s=3.0))
    try:
        assert attached.run_command("cat marker").stdout == b"mine"
    finally:
        attached.close()


def test_a_redis_that_lost_everything_with_an_owner_leaves_no_orphan(forgetful: RedisServer, amnesia: Crew) -> None:
    owner = amnesia()
    sandbox = amnesia.sandbox()
    kill(owner)
    lose_everything(forgetful)
    amnesia()
    time.sleep(2.0)
    send_reap(amnesia.config)
    wait_until(lambda: platform_ids(amnesia.config) == set(), "what nobody knows is gone", 10)
    with pytest.raises(ExecutorError):
        attach(sandbox.sandbox_id, amnesia.config)


def test_a_teardown_that_a_forgetful_redis_answers_is_done_all_the_same(forgetful: RedisServer, amnesia: Crew) -> None:
    amnesia()
    sandbox = amnesia.sandbox()
    forgetful.stop()
    time.sleep(0.5)
    forgetful.start()
    sandbox.teardown()  # most likely before its owner has registered it again
    wait_until(lambda: platform_ids(amnesia.config) == set(), "it is gone", 10)


@ONE_BACKEND
def test_a_snapshot_that_is_a_moment_too_old_does_not_cost_a_sandbox(
    forgetful: RedisServer, amnesia: Crew, threads: ThreadPoolExecutor
) -> None:
    """The lease comes back with the snapshot: no lapse tells that something is missing, but that Redis is another process does."""
    amnesia()
    with raw_redis(amnesia.config) as client:
        client.save()
    sandbox = amnesia.sandbox()
    sandbox.write_file("marker", b"mine")
    back = lose_everything(forgetful)
    eventually(lambda: attach_and_look(amnesia, sandbox.sandbox_id), back + BACK_S)
    time.sleep(2.5)  # older than what the reaper lets be
    send_reap(amnesia.config)
    time.sleep(1)
    assert alive(amnesia.config, sandbox.sandbox_id)


@ONE_BACKEND
def test_an_op_that_its_worker_knows_nothing_of_is_given_up_and_run(config: AppConfig, start: Crew) -> None:
    """However it came to that: the journal believes that a living owner runs it, and it does not."""
    owner = start()
    sandbox = start.sandbox()
    pause(owner)
    op_id = sandbox.start_command(COUNT).op_id
    name = registered(config, sandbox.sandbox_id).owner
    with raw_redis(config) as client:
        term = int(client.get(f"{config.namespace}:term:{name}") or 0)
        client.delete(f"{config.namespace}:{name}.dq2")
    granted = ask(config, lambda journal: journal.take(name, op_id, "nobody's", term))
    assert isinstance(granted, Taken)
    resume(owner)
    check_once(sandbox, sandbox.command(op_id).wait())
    assert op(config, op_id).attempt == 2
