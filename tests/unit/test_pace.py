"""The pace of creations within one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec.backends.pace import ProcessPace


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> ProcessPace:
    return ProcessPace(clock)


def test_the_first_does_not_wait_and_the_next_do_one_after_the_other(pace: ProcessPace) -> None:
    assert [pace("a", 2.0, 60.0) for _ in range(4)] == [0.0, 0.5, 1.0, 1.5]


def test_time_that_passes_counts(pace: ProcessPace, clock: Clock) -> None:
    for _ in range(4):
        pace("a", 2.0, 60.0)
    clock.now_s += 1.25
    assert pace("a", 2.0, 60.0) == pytest.approx(0.75)


def test_turns_that_nobody_took_are_not_kept(pace: ProcessPace, clock: Clock) -> None:
    pace("a", 1.0, 60.0)
    clock.now_s += 100.0
    assert [pace("a", 1.0, 60.0) for _ in range(2)] == [0.0, 1.0]


def test_accounts_do_not_wait_for_each_other(pace: ProcessPace) -> None:
    assert [pace(account, 1.0, 60.0) for account in ("a", "b", "a", "b")] == [0.0, 0.0, 1.0, 1.0]


def test_who_would_wait_too_long_takes_no_turn(pace: ProcessPace, clock: Clock) -> None:
    assert [pace("a", 1.0, 1.5) for _ in range(4)] == [0.0, 1.0, None, None]
    assert pace("a", 1.0, 2.0) == 2.0
    clock.now_s += 3.0
    assert pace("a", 1.0, 0.0) == 0.0


def test_who_has_no_time_left_gets_none(pace: ProcessPace) -> None:
    assert pace("a", 1.0, -0.001) is None
    assert pace("a", 1.0, 0.0) == 0.0


@given(rates=st.lists(st.floats(0.1, 50.0), min_size=1, max_size=30), passing=st.lists(st.floats(0.0, 5.0), min_size=30, max_size=30))
def test_turns_are_never_closer_than_the_rate(rates: list[float], passing: list[float]) -> None:
    clock = Clock()
    pace, last, free_s = ProcessPace(clock), -1.0, 0.0
    for rate, seconds in zip(rates, passing, strict=False):
        clock.now_s += seconds
        wait_s = pace("a", rate, 1e9)
        assert wait_s is not None
        assert wait_s >= 0
        turn = clock.now_s + wait_s
        assert turn >= last + free_s - 1e-6
        last, free_s = turn, 1 / rate


def test_threads_share_it(pace: ProcessPace) -> None:
    with ThreadPoolExecutor(16) as threads:
        waits = list(threads.map(lambda _: pace("a", 10.0, 1e9), range(400)))
    assert sorted(w for w in waits if w is not None) == pytest.approx([turn / 10 for turn in range(400)])
