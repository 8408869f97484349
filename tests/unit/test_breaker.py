"""The circuit breaker, with a clock of the test's own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from cifixer_exec.backends.breaker import BLINK_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, MOST_FAILURES, Breaker, BreakerState
from cifixer_exec.errors import BackendUnavailableError, CapacityError, CircuitOpenError


class Platform:
    """Answers or does not; counts what reaches it."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.away = False
        self.probes = 0
        self.breaker = Breaker("the platform", self.probe, clock=lambda: self.now_s, wall_clock=lambda: self.now_s + 1e9)

    def probe(self) -> None:
        self.probes += 1
        self.answer()

    def answer(self) -> None:
        if self.away:
            raise BackendUnavailableError("connection refused")

    def ask(self, answer: Callable[[], None] | None = None) -> None:
        with self.breaker.guarded():
            (answer or self.answer)()

    def fail(self, times: int) -> None:
        for _ in range(times):
            with pytest.raises(BackendUnavailableError):
                self.ask()


@pytest.fixture
def platform() -> Platform:
    return Platform()


def opened(platform: Platform) -> Platform:
    platform.away = True
    platform.fail(MOST_FAILURES - 1)
    platform.now_s += BLINK_S
    platform.fail(1)
    assert platform.breaker.state is BreakerState.OPEN
    return platform


def test_a_run_of_failures_opens_it_and_the_platform_is_not_asked_any_more(platform: Platform) -> None:
    opened(platform)
    asked: list[int] = []
    with pytest.raises(CircuitOpenError, match=r"the platform .* asked again in 1\.0 s.*connection refused"):
        platform.ask(lambda: asked.append(1))
    assert asked == []
    assert platform.probes == 0


def test_many_failures_in_a_blink_do_not_open_it(platform: Platform) -> None:
    platform.away = True
    platform.fail(MOST_FAILURES * 3)
    assert platform.breaker.state is BreakerState.CLOSED


def test_an_answer_between_begins_the_count_anew(platform: Platform) -> None:
    platform.away = True
    platform.fail(MOST_FAILURES - 1)
    platform.away, platform.now_s = False, platform.now_s + BLINK_S
    platform.ask()
    platform.away = True
    platform.fail(1)
    assert platform.breaker.state is BreakerState.CLOSED


def test_a_refusal_is_an_answer(platform: Platform) -> None:
    def refuse() -> None:
        raise CapacityError("quota")

    for _ in range(MOST_FAILURES * 2):
        platform.now_s += BLINK_S
        with pytest.raises(CapacityError):
            platform.ask(refuse)
    assert platform.breaker.state is BreakerState.CLOSED


def test_behind_the_pause_a_probe_that_is_answered_closes_it(platform: Platform) -> None:
    opened(platform)
    platform.away, platform.now_s = False, platform.now_s + FIRST_PAUSE_S
    platform.ask()
    assert (platform.breaker.state, platform.probes) == (BreakerState.CLOSED, 1)


def test_pauses_double_up_to_the_longest(platform: Platform) -> None:
    opened(platform)
    pauses = []
    for _ in range(8):
        begun = platform.now_s
        while True:
            before = platform.probes
            with pytest.raises(CircuitOpenError):
                platform.ask()
            if platform.probes > before:
                break
            platform.now_s += 0.5
        pauses.append(platform.now_s - begun)
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_one_caller_probes_and_the_others_are_told_at_once(platform: Platform) -> None:
    opened(platform)
    probing, go_on = threading.Event(), threading.Event()

    def slow_probe() -> None:
        probing.set()
        assert go_on.wait(10)

    platform.breaker._probe = slow_probe
    platform.away, platform.now_s = False, platform.now_s + FIRST_PAUSE_S
    prober = threading.Thread(target=platform.ask)
    prober.start()
    assert probing.wait(10)
    assert platform.breaker.state is BreakerState.HALF_OPEN
    with pytest.raises(CircuitOpenError):
        platform.ask()
    go_on.set()
    prober.join(10)
    platform.ask()
    assert platform.probes == 0


def test_a_probe_that_breaks_leaves_it_open_not_half_open(platform: Platform) -> None:
    opened(platform)
    platform.breaker._probe = lambda: 1 // 0
    platform.now_s += FIRST_PAUSE_S
    with pytest.raises(ZeroDivisionError):
        platform.ask()
    assert platform.breaker.state is BreakerState.OPEN


def test_when_it_was_silent_is_remembered_until_the_next_time(platform: Platform) -> None:
    def silent(now_s: float) -> bool:
        return platform.breaker.was_silent(now_s + 1e9, within_s=1.0)

    assert not silent(100)
    platform.away = True
    platform.fail(1)
    platform.now_s = 110
    platform.fail(1)
    platform.away, platform.now_s = False, 120
    platform.ask()
    assert [silent(at) for at in (98, 99, 105, 111, 112)] == [False, True, True, True, False]
    platform.away, platform.now_s = True, 200
    platform.fail(1)
    assert [silent(at) for at in (105, 200)] == [False, True]
