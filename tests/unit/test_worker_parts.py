"""The worker's small parts without Redis: the publisher, repeated writes, the lease's judgement of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from cifixer_exec.errors import QueueUnavailableError
from cifixer_exec.model import OutputChunk, Stream
from cifixer_exec.store.records import Renewal
from cifixer_exec.worker import persistence, publisher
from cifixer_exec.worker.lease import Lease
from cifixer_exec.worker.persistence import persist
from cifixer_exec.worker.publisher import FencedError, Publisher
from tests.support.run import run


def chunk(offset: int, data: bytes) -> OutputChunk:
    return OutputChunk(stream=Stream.STDOUT, offset=offset, data=data)


class Written:
    """Stands for the journal: keeps what was written, and refuses when told to."""

    def __init__(self, *, fenced: bool = False) -> None:
        self.batches: list[list[OutputChunk]] = []
        self._fenced = fenced

    async def __call__(self, chunks: Sequence[OutputChunk]) -> bool:
        self.batches.append(list(chunks))
        return not self._fenced


def test_a_short_output_is_left_for_the_end() -> None:
    async def go() -> tuple[Written, list[OutputChunk]]:
        written = Written()
        output = Publisher(written)
        await output.add(chunk(0, b"short"))
        return written, await output.rest()

    written, rest = run(go())
    assert written.batches == []
    assert rest == [chunk(0, b"short")]


def test_output_does_not_wait_for_the_end_of_a_slow_command() -> None:
    async def go() -> tuple[Written, list[OutputChunk]]:
        written = Written()
        output = Publisher(written)
        await output.add(chunk(0, b"tick"))
        await asyncio.sleep(5 * publisher.FLUSH_AFTER_S)
        await output.add(chunk(4, b"tock"))
        return written, await output.rest()

    written, rest = run(go())
    assert written.batches == [[chunk(0, b"tick")]]
    assert rest == [chunk(4, b"tock")]


def test_much_output_is_written_at_once() -> None:
    async def go() -> Written:
        written = Written()
        output = Publisher(written)
        await output.add(chunk(0, bytes(publisher.FLUSH_BYTES)))
        return written

    assert len(run(go()).batches) == 1


def test_a_fenced_publisher_says_so_at_the_end_at_the_latest() -> None:
    async def go() -> None:
        output = Publisher(Written(fenced=True))
        await output.add(chunk(0, b"x"))
        await asyncio.sleep(5 * publisher.FLUSH_AFTER_S)
        await output.rest()

    with pytest.raises(FencedError):
        run(go())


def test_a_write_is_repeated_until_redis_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(persistence, "LONGEST_PAUSE_S", 0.002)
    failures = 7

    async def step() -> str:
        nonlocal failures
        if failures:
            failures -= 1
            raise QueueUnavailableError("away")
        return "written"

    assert run(persist(step)) == "written"


def test_another_error_is_not_repeated() -> None:
    async def step() -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        run(persist(step))


class Renewals:
    """Stands for the journal's lease; renewing takes ``slow_s`` of the clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slow_s = 0.0
        self.count = 0
        self.term = 7

    async def renew(self, wid: str, ttl_s: float, info: Mapping[str, Any]) -> Renewal:
        self.count += 1
        self.now_s += self.slow_s
        return Renewal(term=self.term, born_ms=1)


def lease(renewals: Renewals) -> Lease:
    journal: Any = renewals
    return Lease(journal, wid="w@h", ttl_s=10, info=dict, on_change=lambda *_: None, clock=lambda: renewals.now_s)


def test_a_lease_that_was_never_taken_is_not_valid() -> None:
    assert not lease(Renewals()).valid()


@pytest.mark.parametrize(("age_s", "valid"), [(0.0, True), (7.9, True), (8.1, False), (100.0, False)])
def test_a_lease_is_given_up_before_redis_gives_it_away(age_s: float, valid: bool) -> None:
    renewals = Renewals()
    held = lease(renewals)
    run(held.take())
    renewals.now_s += age_s
    assert held.valid() is valid


def test_a_lease_counts_from_the_sending_of_its_renewal() -> None:
    renewals = Renewals()
    renewals.slow_s = 9.0  # the answer came late: Redis may have set the time at the beginning
    held = lease(renewals)
    run(held.take())
    assert not held.valid()


@pytest.mark.parametrize("healthy", [True, False])
def test_a_worker_that_is_stuck_lets_its_lease_lapse(healthy: bool) -> None:
    renewals: Any = Renewals()
    held = Lease(renewals, wid="w@h", ttl_s=0.06, info=dict, on_change=lambda *_: None, healthy=lambda: healthy)

    async def keep_for_a_while() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(held.keep(), 0.2)

    run(keep_for_a_while())
    assert (renewals.count > 0) is healthy


def test_a_lapse_is_noticed_though_the_reply_that_told_it_was_lost() -> None:
    renewals: Any = Renewals()
    lapses: list[int] = []
    held = Lease(renewals, wid="w@h", ttl_s=0.06, info=dict, on_change=lambda _, now: lapses.append(now.term))

    async def keep_for_a_while() -> None:
        await held.take()
        for term in (7, 9, 9, 12):  # which renewal came first to the server nobody knows
            renewals.term = term
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(held.keep(), 0.05)

    run(keep_for_a_while())
    assert lapses == [9, 12]
