"""Writing to the journal for as long as it takes: a worker must not forget what it did because Redis was away for a moment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cifixer_exec.errors import QueueUnavailableError

log = logging.getLogger(__name__)
T = TypeVar("T")
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


async def persist(step: Callable[[], Awaitable[T]]) -> T:
    """Repeat ``step``, a verb of the journal that may be repeated, until Redis answers.

    There is no bound in time on purpose: the answer is either "written" or, once another worker has taken over, "fenced".
    Until then the op would stay ``running`` for ever if this worker gave up. Draining cancels it.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await step()
        except QueueUnavailableError as error:
            log.warning("will be written when Redis is back: %s", error)
        await asyncio.sleep(pause_s)
        pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
