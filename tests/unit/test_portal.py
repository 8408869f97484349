"""The event loop behind blocking calls."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from cifixer_exec.channel.portal import Portal


class Interrupt(BaseException):
    """As Ctrl-C."""


@pytest.fixture
def portal() -> Iterator[Portal]:
    made = Portal("test-loop")
    yield made
    made.stop()


@pytest.fixture
def interrupting() -> Iterator[int]:
    """A signal that raises in the main thread, which is named."""

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield threading.get_ident()
    signal.signal(signal.SIGUSR1, before)


async def answer() -> int:
    return 42


async def fail() -> None:
    raise LookupError("said in the loop")


def test_what_comes_out_is_what_the_coroutine_gave_or_raised(portal: Portal) -> None:
    assert portal.call(answer()) == 42
    with pytest.raises(LookupError, match="said in the loop"):
        portal.call(fail())


def test_an_interrupted_call_cancels_what_it_waited_for_and_the_loop_works_on(portal: Portal, interrupting: int) -> None:
    cancelled = threading.Event()

    async def wait() -> None:
        signal.pthread_kill(interrupting, signal.SIGUSR1)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    for _ in range(20):
        cancelled.clear()
        with pytest.raises(Interrupt):
            portal.call(wait())
        assert cancelled.wait(10)
    assert portal.call(answer()) == 42


def test_what_is_cancelled_from_elsewhere_is_told_as_that(portal: Portal) -> None:
    async def cancel_all() -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    threading.Timer(0.1, lambda: portal.submit(cancel_all())).start()
    with pytest.raises(CancelledError):
        portal.call(asyncio.sleep(60))
