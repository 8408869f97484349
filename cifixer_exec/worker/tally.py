"""What a worker has done since it started, in numbers that a scrape reads (metrics.py shows them)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from cifixer_exec.model import Status

#: A kind comes from the journal, which any client can write to: what is not one of these counts as :data:`OTHER`.
KINDS = frozenset(
    {
        *("create", "destroy", "start", "extend", "attach", "status", "list", "stdin", "signal", "kill", "forget", "write", "abort_write"),
        *("read", "stat", "list_files", "mkdir", "remove", "pack", "unpack", "stats", "shutdown"),
    }
)
OTHER = "other"
DONE, FAILED = "done", "failed"
#: How an op can have ended: a ``start`` as its (last) command did, or ``failed`` when there is none to tell of.
OUTCOMES = frozenset({DONE, FAILED, *(status.value for status in Status)})
#: From a doorbell for ``true`` to the longest test suites.
BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0)


@dataclass(frozen=True, kw_only=True)
class Durations:
    """``cumulative``: how many took at most each of :data:`BOUNDS_S`; ``count`` has those beyond the last too."""

    cumulative: Sequence[int]
    count: int
    sum_s: float


@dataclass
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, duration_s: float) -> None:
        self.counts[bisect_left(BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def read(self) -> Durations:
        *cumulative, count = accumulate(self.counts)
        return Durations(cumulative=cumulative, count=count, sum_s=self.sum_s)


class Tally:
    """Written on the worker's event loop, read by whoever scrapes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended: dict[tuple[str, str], int] = {}
        self._durations: dict[str, _Histogram] = {}
        self._adoptions = 0
        self._reaped: dict[str, int] = {}

    def ended(self, kind: str, outcome: str, duration_s: float) -> None:
        """This worker wrote the end of an op. ``duration_s``: since it took the op; who adopts one counts its own part."""
        kind = kind if kind in KINDS else OTHER
        outcome = outcome if outcome in OUTCOMES else OTHER
        with self._lock:
            self._ended[kind, outcome] = self._ended.get((kind, outcome), 0) + 1
            self._durations.setdefault(kind, _Histogram()).add(duration_s)

    def adopted(self) -> None:
        """An op was taken that had been granted before, here or to another worker."""
        with self._lock:
            self._adoptions += 1

    def reaped(self, reason: str) -> None:
        """The reaper dealt with a sandbox; the reasons are the reaper's, and few."""
        with self._lock:
            self._reaped[reason] = self._reaped.get(reason, 0) + 1

    @property
    def ends(self) -> Mapping[tuple[str, str], int]:
        """By kind and outcome."""
        with self._lock:
            return dict(self._ended)

    @property
    def durations(self) -> Mapping[str, Durations]:
        """By kind."""
        with self._lock:
            return {kind: histogram.read() for kind, histogram in self._durations.items()}

    @property
    def adoptions(self) -> int:
        """See :meth:`adopted`."""
        return self._adoptions

    @property
    def reaped_by_reason(self) -> Mapping[str, int]:
        """What has not happened is not there."""
        with self._lock:
            return dict(self._reaped)
