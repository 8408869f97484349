"""Timing and memory of processes, without opinions."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
#: A daemon cleans up behind a call that has returned; that must not be charged to what is measured next.
SETTLE_S = 0.2


@dataclass(frozen=True)
class Times:
    """Seconds of many runs of one thing."""

    seconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        """Median."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """95th percentile."""
        return sorted(self.seconds)[int(len(self.seconds) * 0.95)]


def in_turn(rounds: int, per_round: int, *things: Callable[[], object]) -> list[Times]:
    """Time ``things`` in turn (A B C A B C …), so that a machine that drifts drifts for all of them. One round of warm-up.

    What a thing returns is called behind it, untimed, if it can be called: so it cleans up.
    """
    taken: list[list[float]] = [[] for _ in things]
    for number in range(rounds + 1):
        for thing, seconds in zip(things, taken, strict=True):
            time.sleep(SETTLE_S)
            for _ in range(per_round):
                begun = time.perf_counter()
                clean_up = thing()
                if number:
                    seconds.append(time.perf_counter() - begun)
                if callable(clean_up):
                    clean_up()
    return [Times(tuple(s)) for s in taken]


def rate(calls: int, threads: int, thing: Callable[[], object]) -> float:
    """Calls per second of ``thing``, from ``threads`` threads at once."""
    share = calls // threads
    workers = [threading.Thread(target=lambda: [thing() for _ in range(share)]) for _ in range(threads)]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return share * threads / (time.perf_counter() - begun)


def resident_bytes(pid: int) -> int:
    """RSS (proc(5), VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def peak_memory(pid: int) -> Iterator[Callable[[], int]]:
    """Within the block: a function that tells the highest RSS of ``pid`` seen so far (sampled each 5 ms)."""
    highest = resident_bytes(pid)
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, resident_bytes(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: highest
    finally:
        done.set()
        watcher.join()
