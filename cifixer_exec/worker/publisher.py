"""Output of a running op on its way to Redis: gathered for a moment, so that a short command costs no write of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from cifixer_exec.model import OutputChunk

FLUSH_AFTER_S = 0.01
FLUSH_BYTES = 256 * 1024

#: Writes chunks; False when this worker is fenced.
Write = Callable[[Sequence[OutputChunk]], Awaitable[bool]]


class FencedError(Exception):
    """Redis refused: the sandbox has another owner now."""


class Publisher:
    """Used by one task. Memory is bounded by :data:`FLUSH_BYTES` and the channel's window: :meth:`add` waits for Redis beyond that."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._pending: list[OutputChunk] = []
        self._size = 0
        self._timer: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()

    async def add(self, chunk: OutputChunk) -> None:
        """Take a chunk; it is in Redis within :data:`FLUSH_AFTER_S`, or comes with :meth:`rest`.

        Raises:
            FencedError: at this or an earlier write.
        """
        self._raise_from_timer()
        self._pending.append(chunk)
        self._size += len(chunk.data)
        if self._size >= FLUSH_BYTES:
            await self._flush()
        elif self._timer is None or self._timer.done():
            self._timer = asyncio.create_task(self._flush_later())
            self._timer.add_done_callback(_seen)

    async def rest(self) -> list[OutputChunk]:
        """What is not written yet, to go along with the end. Nothing may be added after it. Raises FencedError."""
        if self._timer is not None and not self._writing.locked():
            self._timer.cancel()
        async with self._writing:
            pending, self._pending, self._size = self._pending, [], 0
        self._raise_from_timer()
        return pending

    async def _flush_later(self) -> None:
        await asyncio.sleep(FLUSH_AFTER_S)
        await asyncio.shield(self._flush())

    async def _flush(self) -> None:
        async with self._writing:
            pending, self._pending, self._size = self._pending, [], 0
            if pending and not await self._write(pending):
                raise FencedError

    def _raise_from_timer(self) -> None:
        if self._timer is not None and self._timer.done() and not self._timer.cancelled():
            self._timer.result()


def _seen(timer: asyncio.Task[None]) -> None:
    """Its error is raised by the next call, and there may be none."""
    if not timer.cancelled():
        timer.exception()
