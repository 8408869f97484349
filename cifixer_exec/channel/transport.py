"""What a channel needs of a byte stream, and the one over a Unix socket."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol, cast

#: What came and was not taken yet; with more than that waiting, nothing is read. asyncio reads up to 256 KiB at once.
MOST_WAITING_BYTES = 512 * 1024
#: Written at once; about what a socket holds.
WRITE_BYTES = 192 * 1024


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


class SocketTransport(asyncio.Protocol):
    """A transport over a Unix or TCP socket: what the socket gives is handed on as it is, without a buffer in between."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._outgoing: deque[memoryview] = deque()
        self._paused = False
        self._emptied: asyncio.Future[None] | None = None

    async def receive(self) -> bytes:
        while not self._received:
            if self._error is not None:
                raise OSError(*self._error.args) from self._error
            if self._ended:
                return b""
            self._waiter = self._loop.create_future()
            await self._waiter
        data = self._received.popleft()
        if self._size >= MOST_WAITING_BYTES > self._size - len(data) and self._transport is not None:
            self._transport.resume_reading()
        self._size -= len(data)
        return data

    def send(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._outgoing.append(memoryview(data))
        self._pump()

    async def drain(self) -> None:
        if self._ended:
            raise ConnectionResetError("the connection is closed") from self._error
        if self._outgoing or self._paused:
            if self._emptied is None:
                self._emptied = self._loop.create_future()
            await asyncio.shield(self._emptied)

    def close(self) -> None:
        """What was not sent yet is dropped: a peer that does not read must not keep who waits in :meth:`drain` for ever."""
        if self._transport is None:
            return
        self._outgoing.clear()
        if self._transport.get_write_buffer_size() > 0:
            self._transport.abort()
        else:
            self._transport.close()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=1, low=0)  # over TLS, a limit of 0 means that it is always reached

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        self._size += len(data)
        if self._size >= MOST_WAITING_BYTES > self._size - len(data) and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()
        if not self._outgoing and not self._paused:
            self._tell_emptied(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended, self._error = True, exc
        self._outgoing.clear()
        self._wake()
        self._tell_emptied(ConnectionResetError("the connection was lost"))

    def _pump(self) -> None:
        """Give asyncio a little at a time: it copies what the socket does not take at once, again and again."""
        while self._outgoing and not self._paused and self._transport is not None and not self._ended:
            data = self._outgoing.popleft()
            if len(data) > WRITE_BYTES:
                self._outgoing.appendleft(data[WRITE_BYTES:])
            self._transport.write(data[:WRITE_BYTES])

    def _tell_emptied(self, error: Exception | None) -> None:
        waiting, self._emptied = self._emptied, None
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(error)
            waiting.exception()  # mark as seen: who waited may have been cancelled

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def dial_unix(path: str) -> Transport:
    """Connect to a Unix socket. Raises OSError when nothing listens."""
    _, transport = await asyncio.get_running_loop().create_unix_connection(SocketTransport, path)
    return transport
