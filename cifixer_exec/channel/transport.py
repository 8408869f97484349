"""What a channel needs of a byte stream, and the one over a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

READ_BYTES = 256 * 1024


class Transport(Protocol):
    """One byte stream to a runner, used by one task for reading and any for writing."""

    async def receive(self) -> bytes:
        """The next bytes; ``b""`` at the end. Raises OSError when the stream broke."""

    def send(self, data: bytes) -> None:
        """Queue ``data``; never blocks."""

    async def drain(self) -> None:
        """Wait until the queue of :meth:`send` is short. Raises OSError when the stream broke."""

    def close(self) -> None:
        """Close at once; idempotent."""


#: Opens a new transport to the same runner; raises OSError when nothing answers, BackendUnavailableError when it is the platform that does
#: not, and nobody needs to ask it what has become of the sandbox.
Dial = Callable[[], Awaitable[Transport]]


class SocketTransport:
    """A transport over asyncio streams (Unix or TCP socket)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self) -> bytes:
        return await self._reader.read(READ_BYTES)

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def drain(self) -> None:
        await self._writer.drain()

    def close(self) -> None:
        self._writer.close()


async def dial_unix(path: str) -> Transport:
    """Connect to a Unix socket. Raises OSError when nothing listens."""
    reader, writer = await asyncio.open_unix_connection(path, limit=READ_BYTES)
    return SocketTransport(reader, writer)
