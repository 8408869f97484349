"""The byte stream under a channel: all that is sent arrives in order, and nobody waits for a peer for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cifixer_exec.channel.transport import MOST_WAITING_BYTES, Transport, dial_unix
from tests.support.run import run

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
DATA = bytes(range(256)) * 16 * 1024  # 4 MiB


@asynccontextmanager
async def connected(directory: Path, peer: Peer) -> AsyncIterator[Transport]:
    path = str(directory / "s")
    async with await asyncio.start_unix_server(peer, path):
        transport = await dial_unix(path)
        try:
            yield transport
        finally:
            transport.close()


async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        writer.close()


def test_much_arrives_whole_and_in_order_both_ways(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(3 * len(DATA)))
        writer.close()

    async def scene() -> bytes:
        async with connected(tmp_path, echo) as transport:
            for _ in range(3):
                transport.send(DATA)
            await transport.drain()
            received = b""
            while data := await transport.receive():
                received += data
            return received

    assert run(scene()) == DATA * 3


def test_who_waits_for_a_peer_that_does_not_read_is_released_by_close(tmp_path: Path) -> None:
    async def scene() -> None:
        async with connected(tmp_path, silent) as transport:
            transport.send(DATA)
            waiting = asyncio.create_task(transport.drain())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            transport.close()
            with pytest.raises(OSError, match="connection"):
                await asyncio.wait_for(waiting, 5)
            assert await asyncio.wait_for(transport.receive(), 5) == b""

    run(scene())


def test_a_peer_that_goes_is_an_end_for_who_reads_and_an_error_for_who_writes(tmp_path: Path) -> None:
    async def leave(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"last words")
        writer.close()

    async def scene() -> None:
        async with connected(tmp_path, leave) as transport:
            assert await transport.receive() == b"last words"
            assert await transport.receive() == b""
            transport.send(DATA)
            with pytest.raises(OSError, match="connection"):
                await transport.drain()

    run(scene())


def test_little_is_read_ahead_of_who_takes_it(tmp_path: Path) -> None:
    sent = 0

    async def pour(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        try:
            for _ in range(200):
                writer.write(bytes(64 * 1024))
                await writer.drain()
                sent += 64 * 1024
        finally:
            writer.close()

    async def scene() -> int:
        async with connected(tmp_path, pour) as transport:
            await asyncio.sleep(0.3)
            ahead, taken = sent, 0
            assert ahead < MOST_WAITING_BYTES + 1024 * 1024
            while data := await transport.receive():
                taken += len(data)
            return taken

    assert run(scene()) == 200 * 64 * 1024
