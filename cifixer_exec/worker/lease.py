"""The worker's proof of life: a heartbeat on a loop and connection of its own, so that no load on the other loop delays it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from cifixer_exec.errors import ExecutorError
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import Renewal

log = logging.getLogger(__name__)

#: The lease counts as lost this much before Redis says so: the fence closes before anyone else may adopt.
SAFETY = 0.8


class Lease:
    """``on_change`` is called (on the lease's loop) when a renewal differs from the last one.

    It compares instead of being told once: the reply that told of a lapse may have been lost. While ``healthy`` says no, the lease is left
    to lapse: a worker that is alive and does nothing must not keep its sandboxes from others.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        wid: str,
        ttl_s: float,
        info: Callable[[], Mapping[str, Any]],
        on_change: Callable[[Renewal, Renewal], None],
        healthy: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._wid = wid
        self._ttl_s = ttl_s
        self._info = info
        self._on_change = on_change
        self._healthy = healthy
        self._clock = clock
        self._renewed_at = float("-inf")
        self._last: Renewal | None = None

    def valid(self) -> bool:
        """Whether this worker may still act as owner; measured from the *sending* of the last renewal that succeeded."""
        return self._clock() - self._renewed_at < SAFETY * self._ttl_s

    async def take(self) -> Renewal:
        """The first renewal, before anything is consumed. Raises QueueUnavailableError."""
        sent_at = self._clock()
        self._last = await self._journal.renew(self._wid, self._ttl_s, self._info())
        self._renewed_at = sent_at
        return self._last

    async def keep(self) -> None:
        """Renew for ever, six times per lifetime of the lease."""
        while True:
            await asyncio.sleep(self._ttl_s / 6)
            if not self._healthy():
                log.error("the lease is not renewed: this worker's event loop does not answer")
                continue
            sent_at = self._clock()
            try:
                renewal = await self._journal.renew(self._wid, self._ttl_s, self._info())
            except ExecutorError as error:
                log.warning("the lease could not be renewed: %s", error)
                continue
            except Exception:
                # A heartbeat that ends by a defect would fence a healthy worker for ever.
                log.exception("the lease could not be renewed")
                continue
            self._renewed_at = sent_at
            last, self._last = self._last, renewal
            if last is not None and renewal != last:
                self._on_change(last, renewal)
