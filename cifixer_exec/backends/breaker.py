"""A circuit breaker: a platform that does not answer is left alone for a while, and whoever asks is told at once.

::

    closed ──(a run of failures)──▶ open ──(pause over: one caller probes)──▶ half_open ──▶ closed, or open for twice as long

Only failures of the platform itself count: no answer, or "not now". What it refuses, it has answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from cifixer_exec.errors import BackendUnavailableError, CircuitOpenError, ExecutorError

#: It opens after so many failures in a row, the first of them so long ago: a blink is not an outage.
MOST_FAILURES = 5
BLINK_S = 2.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 15.0


class BreakerState(StrEnum):
    """As doctor and metrics name it."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """One per platform and process; used from any thread.

    ``what`` names the platform. ``probe`` asks it something cheap and raises BackendUnavailableError when it does not answer;
    it must not go through this breaker. ``wall_clock`` gives Unix times, for :meth:`was_silent` alone.
    """

    def __init__(
        self,
        what: str,
        probe: Callable[[], object],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._what = what
        self._probe = probe
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._failing_since_s = 0.0
        #: Unix times of the last run of failures: its first and its last.
        self._silent_since_s = self._silent_until_s = float("-inf")
        self._pause_s = FIRST_PAUSE_S
        self._probe_at_s = 0.0
        self._said = ""

    @property
    def state(self) -> BreakerState:
        """Open until a probe has shown otherwise."""
        return self._state

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Around one request to the platform.

        Raises:
            CircuitOpenError: nothing was asked, because the platform has not answered for a while.
        """
        self.check()
        try:
            yield
        except ExecutorError as error:
            self.heard(error)
            raise
        self.succeeded()

    def heard(self, error: Exception) -> None:
        """What came instead of the wanted answer: nothing (BackendUnavailableError, OSError), or a refusal, which is an answer."""
        if isinstance(error, CircuitOpenError):
            return  # nothing was asked
        if isinstance(error, OSError | BackendUnavailableError):
            self.failed(str(error))
        else:
            self.succeeded()

    def was_silent(self, at_s: float, *, within_s: float) -> bool:
        """Whether the last run of failures has the Unix time ``at_s`` in it, or is no farther from it than ``within_s``."""
        return self._silent_since_s - within_s <= at_s <= self._silent_until_s + within_s

    def check(self) -> None:
        """Raise CircuitOpenError while it is open; the first caller behind the pause finds out whether it still must be."""
        if not self._is_to_probe():
            return
        try:
            self._probe()
        except BackendUnavailableError as error:
            self._open(str(error))
            raise self._refusal() from None
        except BaseException:
            self._open("the probe failed")
            raise
        self.succeeded()

    def look(self) -> None:
        """Find out now whether the platform is there: for who got no answer that may be the fault of one sandbox. Raises nothing of it."""
        try:
            self._probe()
        except BackendUnavailableError as error:
            self.heard(error)

    def _is_to_probe(self) -> bool:
        with self._lock:
            if self._state is BreakerState.CLOSED:
                return False
            if self._state is BreakerState.HALF_OPEN or self._clock() < self._probe_at_s:
                raise self._refusal()
            self._state = BreakerState.HALF_OPEN
            return True

    def succeeded(self) -> None:
        """The platform has answered."""
        if self._failures == 0 and self._state is BreakerState.CLOSED:
            return
        with self._lock:
            self._state, self._failures, self._pause_s = BreakerState.CLOSED, 0, FIRST_PAUSE_S

    def failed(self, said: str) -> None:
        """The platform has not answered."""
        with self._lock:
            now, self._silent_until_s = self._clock(), self._wall_clock()
            if self._failures == 0:
                self._failing_since_s, self._silent_since_s = now, self._silent_until_s
            self._failures += 1
            self._said = said
            enough = self._failures >= MOST_FAILURES and now - self._failing_since_s >= BLINK_S
        if enough and self._state is BreakerState.CLOSED:
            self._open(said)

    def _open(self, said: str) -> None:
        with self._lock:
            self._probe_at_s = self._clock() + self._pause_s
            self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)
            self._state, self._said = BreakerState.OPEN, said

    def _refusal(self) -> CircuitOpenError:
        left_s = max(0.0, self._probe_at_s - self._clock())
        return CircuitOpenError(f"{self._what} does not answer for a while now, and is asked again in {left_s:.1f} s: {self._said}")
