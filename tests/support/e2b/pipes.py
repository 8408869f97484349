"""Pipes between this process and those in sandboxes."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

CHUNK_BYTES = 32 << 10


class Pipes:
    """``theirs`` become the standard descriptors of a process; :meth:`close_theirs` once it has them, :meth:`close` when it has not."""

    def __init__(self, *, stdin: bool, stderr: bool = True) -> None:
        self._ours: dict[int, int] = {}
        self.theirs: list[int] = []
        for target in range(3):
            if (target == 0 and not stdin) or (target == 2 and not stderr):
                self.theirs.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
                continue
            reader, writer = os.pipe2(os.O_CLOEXEC)
            self._ours[target] = writer if target == 0 else reader
            self.theirs.append(reader if target == 0 else writer)

    def close_theirs(self) -> None:
        """Or the end of a stream would never come."""
        while self.theirs:
            os.close(self.theirs.pop())

    def close(self) -> None:
        """All that has not been opened."""
        self.close_theirs()
        while self._ours:
            os.close(self._ours.popitem()[1])

    async def writer(self) -> asyncio.StreamWriter | None:
        """To standard input."""
        if 0 not in self._ours:
            return None
        loop = asyncio.get_running_loop()
        file = os.fdopen(self._ours.pop(0), "wb", 0)
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, file)
        transport.set_write_buffer_limits(CHUNK_BYTES)
        return asyncio.StreamWriter(transport, protocol, None, loop)

    async def reader(self, target: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
        """From standard output (1) or error (2)."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=CHUNK_BYTES)
        file = os.fdopen(self._ours.pop(target), "rb", 0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
        return reader, transport


async def feed(writer: asyncio.StreamWriter, data: bytes) -> bool:
    """Waits for who does not read. False: nobody will."""
    try:
        writer.write(data)
        await writer.drain()
    except (ConnectionError, RuntimeError):
        return False
    return not writer.is_closing()


def finish(writer: asyncio.StreamWriter | None) -> None:
    """What is under way still arrives, and then the end."""
    if writer is not None:
        with suppress(OSError, RuntimeError):
            writer.close()
