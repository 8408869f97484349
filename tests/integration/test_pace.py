"""The pace of creations that processes keep together through a real Redis."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from cifixer_exec.backends.pace import ProcessPace
from cifixer_exec.store.pace import NAMESPACE, SharedPace
from tests.support.redis_server import RedisServer, redis_server


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """One that a test may stop."""
    with redis_server() as started:
        yield started


@pytest.fixture
def shared() -> Iterator[Callable[..., SharedPace]]:
    """Makes them; their connections end with the test."""
    made: list[SharedPace] = []

    def make(url: str, otherwise: Any = never) -> SharedPace:
        made.append(SharedPace(url, otherwise))
        return made[-1]

    yield make
    for pace in made:
        if pace._client is not None:
            pace._client.close()


def never(_account: str, _per_s: float, _most_wait_s: float) -> float:
    raise AssertionError("Redis is there")


TURNS = """
import json, sys, time
from cifixer_exec.store.pace import SharedPace
url, account, per_s, count = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
pace = SharedPace(url, None)
sys.stdin.readline()
print(json.dumps([time.time() + pace(account, per_s, 60.0) for _ in range(count)]))
"""


def turns_of_processes(url: str, accounts: list[str], per_s: float, count: int) -> dict[str, list[float]]:
    """When whose turn is, of one process for each entry of ``accounts``; all begin at once."""
    command = [sys.executable, "-c", TURNS, url]
    processes = [
        subprocess.Popen([*command, account, str(per_s), str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for account in accounts
    ]
    turns: dict[str, list[float]] = {}
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for account, process in zip(accounts, processes, strict=True):
        out, _ = process.communicate(timeout=60)
        turns.setdefault(account, []).extend(json.loads(out))
    return {account: sorted(found) for account, found in turns.items()}


def test_four_processes_of_an_account_keep_the_rate_together(redis_url: str, namespace: str) -> None:
    """The turns are given out at once, whoever sleeps; a tenth of a second is for the way from Redis to a process' clock."""
    turns = turns_of_processes(redis_url, [namespace] * 4, per_s=5.0, count=10)[namespace]
    assert len(turns) == 40
    assert turns[-1] - turns[0] >= 39 / 5 - 0.1
    for begin in range(30):
        assert turns[begin + 10] - turns[begin] >= 10 / 5 - 0.1


def test_another_account_has_a_pace_of_its_own(shared: Callable[..., SharedPace], redis_url: str, namespace: str) -> None:
    pace = shared(redis_url)
    assert [pace(f"{namespace}{account}", 0.01, 0.0) for account in ("a", "b", "c")] == [0.0, 0.0, 0.0]
    assert pace(f"{namespace}a", 0.01, 0.0) is None


def test_turns_come_one_after_the_other(shared: Callable[..., SharedPace], redis_url: str, namespace: str) -> None:
    pace = shared(redis_url)
    waits = [pace(namespace, 0.1, 3600.0) for _ in range(4)]
    assert waits == [pytest.approx(10.0 * turn, abs=1.0) for turn in range(4)]


def test_who_would_wait_too_long_takes_no_turn(shared: Callable[..., SharedPace], redis_url: str, namespace: str) -> None:
    pace = shared(redis_url)
    assert pace(namespace, 0.1, 0.0) == 0.0
    assert [pace(namespace, 0.1, 5.0) for _ in range(5)] == [None] * 5
    assert pace(namespace, 0.1, 60.0) == pytest.approx(10.0, abs=1.0)


def test_who_has_no_time_left_gets_none(shared: Callable[..., SharedPace], redis_url: str, namespace: str) -> None:
    assert shared(redis_url)(namespace, 1.0, -0.5) is None


def test_it_forgets_who_does_not_come_again(shared: Callable[..., SharedPace], redis_url: str, namespace: str) -> None:
    """Its only key ends by itself, and nobody waits for a turn that nobody took."""
    pace = shared(redis_url)
    key = f"{NAMESPACE}:pace:{namespace}"
    with redis.Redis.from_url(redis_url) as client:
        pace(namespace, 1.0, 60.0)
        assert 0 < client.pttl(key) <= 1000
        give_up = time.monotonic() + 5
        while client.exists(key):
            assert time.monotonic() < give_up, "the key stays"
            time.sleep(0.02)
    assert pace(namespace, 1.0, 60.0) == 0.0


def test_a_server_that_has_forgotten_the_script_is_told_it_again(
    shared: Callable[..., SharedPace], server: RedisServer, namespace: str
) -> None:
    pace = shared(server.url)
    assert pace(namespace, 0.1, 60.0) == 0.0
    with redis.Redis.from_url(server.url) as client:
        client.script_flush()
    assert pace(namespace, 0.1, 60.0) == pytest.approx(10.0, abs=1.0)


def test_without_redis_a_process_keeps_its_own_pace_and_says_so(
    shared: Callable[..., SharedPace], server: RedisServer, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 0.0
    pace = shared(server.url, ProcessPace(lambda: now_s))
    assert pace(namespace, 0.1, 60.0) == 0.0
    server.stop()
    with caplog.at_level(logging.WARNING):
        begun = time.monotonic()
        assert [pace(namespace, 0.1, 60.0) for _ in range(3)] == [0.0, 10.0, 20.0]
        assert pace(namespace, 0.1, 5.0) is None
        assert time.monotonic() - begun < 20
    assert "only this process's own pace is kept" in caplog.text
    caplog.clear()
    server.start()
    assert pace(namespace, 0.1, 60.0) == 0.0  # it has forgotten everything, and is asked again
    assert pace(namespace, 0.1, 60.0) == pytest.approx(10.0, abs=1.0)
    assert caplog.text == ""


def test_a_redis_that_refuses_is_one_that_is_away(
    shared: Callable[..., SharedPace], redis_url: str, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(f"{NAMESPACE}:pace:{namespace}", "not a number")
        assert shared(redis_url, ProcessPace(lambda: 0.0))(namespace, 1.0, 60.0) == 0.0
        assert "own pace" in caplog.text
        client.delete(f"{NAMESPACE}:pace:{namespace}")
