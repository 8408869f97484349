"""A platform that hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from contextvars import ContextVar

from cifixer_exec.backends.threads import MOST_CREATIONS, asking, creating
from tests.support.run import run


def test_a_platform_that_hangs_keeps_nothing_else_waiting() -> None:
    """Neither what creations wait for, nor the threads in which the event loop looks up names."""
    back = threading.Event()

    async def go() -> float:
        hanging = [asyncio.create_task(creating(back.wait)) for _ in range(MOST_CREATIONS + 8)]
        hanging += [asyncio.create_task(asking(back.wait)) for _ in range(100)]
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        await asking(time.monotonic)
        await asyncio.to_thread(time.monotonic)
        took_s = time.monotonic() - begun
        back.set()
        await asyncio.gather(*hanging)
        return took_s

    assert run(go()) < 1.0


def test_what_is_known_of_the_op_is_known_in_the_thread() -> None:
    """Context variables, as with asyncio.to_thread."""
    known: ContextVar[str] = ContextVar("known", default="nothing")

    async def go() -> list[str]:
        known.set("the op")
        return [await creating(known.get), await asking(known.get)]

    assert run(go()) == ["the op", "the op"]
