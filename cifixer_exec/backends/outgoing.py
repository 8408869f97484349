"""What waits to be written where each write is a message, which costs as much as some kilobytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable


class Outgoing:
    """Cut into messages of ``most_bytes`` at the most, small ones together, written one after the other by one task.

    ``write`` gets the parts of a message. ``failures``: what it raises when the stream broke; nothing is written behind that.
    """

    def __init__(
        self, write: Callable[[list[memoryview]], Awaitable[object]], *, most_bytes: int, failures: tuple[type[Exception], ...]
    ) -> None:
        self._write_message = write
        self._most_bytes = most_bytes
        self._failures = failures
        self._pieces: deque[memoryview] = deque()
        self._idle = asyncio.Event()
        self._idle.set()
        #: None, or what has ended it.
        self.broken: Exception | None = None
        #: Writes while there is something to write.
        self.writer: asyncio.Task[None] | None = None

    def add(self, data: bytes) -> None:
        """Never blocks."""
        view = memoryview(data)
        self._pieces.extend(view[at : at + self._most_bytes] for at in range(0, len(view), self._most_bytes))
        self._idle.clear()
        if self.writer is None or self.writer.done():
            self.writer = asyncio.get_running_loop().create_task(self._write())

    async def emptied(self) -> None:
        """All is written, or will never be."""
        await self._idle.wait()

    def let_go(self) -> None:
        """Whoever waits in :meth:`emptied` goes on."""
        self._idle.set()

    def drop(self) -> None:
        """What was not written yet."""
        self._pieces.clear()
        self._idle.set()

    async def _write(self) -> None:
        try:
            while self._pieces:
                await self._write_message(self._next_message())
        except self._failures as error:
            self.broken = error
            self._pieces.clear()
        finally:
            self._idle.set()

    def _next_message(self) -> list[memoryview]:
        parts = [self._pieces.popleft()]
        size = len(parts[0])
        while self._pieces and size + len(self._pieces[0]) <= self._most_bytes:
            parts.append(self._pieces.popleft())
            size += len(parts[-1])
        return parts
