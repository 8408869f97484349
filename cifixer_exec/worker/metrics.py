"""A worker's and beat's numbers in Prometheus' words. Needs the extra ``metrics``; imported only where an address is set.

Names and units: https://prometheus.io/docs/practices/naming/. Labels are few on purpose: no sandbox, op or worker id is one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cifixer_exec.backends.breaker import BreakerState
from cifixer_exec.model import Status
from cifixer_exec.worker.tally import BOUNDS_S, FAILED, Tally

PREFIX = "cifixer_"
#: Of the circuit breaker in front of a backend.
BREAKER_STATES = tuple(state.value for state in BreakerState)
#: Beat is silent when it has sent nothing for so many of its intervals.
MISSED_INTERVALS = 3.0
#: Shown as 0 from the start: an increase from nothing to 1 is none to Prometheus.
_FROM_THE_START = tuple(("start", outcome) for outcome in (*(status.value for status in Status), FAILED))


@dataclass(frozen=True, kw_only=True)
class WorkerSource:
    """Where a worker's numbers come from, asked anew for each scrape, in any thread. None of these may wait long or raise."""

    tally: Tally
    sandboxes: Callable[[], int]
    active: Callable[[], int]
    draining: Callable[[], bool]
    lease_valid: Callable[[], bool]
    responsive: Callable[[], bool]
    breaker_state: Callable[[], str]
    #: By queue; None when Redis did not answer in time.
    queue_lengths: Callable[[], Mapping[str, int] | None]
    #: All that the reaper may tell.
    reap_reasons: Sequence[str]
    version: str
    backend: str
    placement: str


class WorkerCollector(Collector):
    """All metrics of one worker."""

    def __init__(self, source: WorkerSource) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        yield self._build()
        yield from self._ops()
        yield from self._state()
        yield from self._queues()
        yield self._breaker()

    def _build(self) -> Metric:
        labels = {"version": self._source.version, "backend": self._source.backend, "placement": self._source.placement}
        metric = GaugeMetricFamily(PREFIX + "build_info", "What runs here; always 1.", labels=list(labels))
        metric.add_metric(list(labels.values()), 1)
        return metric

    def _ops(self) -> Iterator[Metric]:
        tally = self._source.tally
        ends = CounterMetricFamily(
            PREFIX + "ops", "Ops whose end this worker wrote; a start counts under its (last) command's status.", labels=["kind", "outcome"]
        )
        for labels, count in sorted({**dict.fromkeys(_FROM_THE_START, 0), **tally.ends}.items()):
            ends.add_metric(labels, count)
        yield ends
        durations = HistogramMetricFamily(PREFIX + "op_duration_seconds", "From taking an op to its end.", labels=["kind"])
        for kind, read in sorted(tally.durations.items()):
            buckets = [(str(bound), float(n)) for bound, n in zip(BOUNDS_S, read.cumulative, strict=True)]
            durations.add_metric([kind], [*buckets, ("+Inf", float(read.count))], read.sum_s)
        yield durations
        yield CounterMetricFamily(PREFIX + "adoptions", "Ops taken that had been granted before.", value=tally.adoptions)
        reaped = CounterMetricFamily(PREFIX + "reaped", "Sandboxes that the reaper dealt with here, by reason.", labels=["reason"])
        for reason in self._source.reap_reasons:
            reaped.add_metric([reason], tally.reaped_by_reason.get(reason, 0))
        yield reaped

    def _state(self) -> Iterator[Metric]:
        source = self._source
        for name, said, value in (
            ("ops_active", "Ops in progress.", source.active()),
            ("sandboxes_owned", "Sandboxes that this worker has a session to.", source.sandboxes()),
            ("lease_valid", "1 while this worker may act as owner.", source.lease_valid()),
            ("event_loop_responsive", "1 while the event loop turns that carries ops out.", source.responsive()),
            ("draining", "1 once this worker was told to end.", source.draining()),
        ):
            yield GaugeMetricFamily(PREFIX + name, said, value=float(value))

    def _queues(self) -> Iterator[Metric]:
        """Of what this worker consumes. Those that several workers share are told by each of them."""
        lengths = self._source.queue_lengths()
        yield GaugeMetricFamily(PREFIX + "redis_reachable", "1 if Redis answered this scrape in time.", value=float(lengths is not None))
        metric = GaugeMetricFamily(PREFIX + "queue_messages", "Doorbells that wait in a queue which this worker reads.", labels=["queue"])
        for queue, length in (lengths or {}).items():
            metric.add_metric([queue], length)
        yield metric

    def _breaker(self) -> Metric:
        now = self._source.breaker_state()
        metric = GaugeMetricFamily(PREFIX + "backend_breaker_state", "1 for the state of the backend's circuit breaker.", labels=["state"])
        for state in BREAKER_STATES:
            metric.add_metric([state], float(state == now))
        return metric


class BeatWatch(Collector):
    """When beat last handed a task to Redis; that is all that beat is for."""

    def __init__(
        self, *, interval_s: float, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._sent_at = clock()
        self._sent_at_wall = 0.0
        self._count = 0

    def sent(self) -> None:
        """A task was sent just now."""
        with self._lock:
            self._sent_at, self._sent_at_wall = self._clock(), self._wall_clock()
            self._count += 1

    def trouble(self) -> str:
        """Why beat is of no use just now; empty when all is well."""
        silent_s = self._clock() - self._sent_at
        if silent_s < MISSED_INTERVALS * self._interval_s:
            return ""
        return f"beat has sent nothing for {silent_s:.0f} s, and should each {self._interval_s:.0f} s"

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(PREFIX + "beat_sent", "Tasks that beat handed to Redis.", value=self._count)
        yield GaugeMetricFamily(PREFIX + "beat_last_sent_timestamp_seconds", "When it last did; 0: not yet.", value=self._sent_at_wall)


def exposition(collector: Collector) -> Callable[[], bytes]:
    """What a scrape gets: ``collector``'s metrics and those of this process, from a registry of their own."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    return lambda: generate_latest(registry)
