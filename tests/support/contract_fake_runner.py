"""A runner that misbehaves on command, and a proxy that cuts: what a channel must survive."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from cifixer_exec.channel.channel import Channel
from cifixer_exec.channel.connection import PROTOCOL
from cifixer_exec.channel.frames import Answer, Frame, FrameParser, FrameType, decode_document, encode_document, encode_frame
from cifixer_exec.channel.transport import Dial, Transport, dial_unix
from cifixer_exec.model import Inspection

Document = dict[str, Any]

FINISHED: Document = {
    "op_id": "op",
    "state": "finished",
    "status": "exited",
    "exit_code": 0,
    "signal": None,
    "stdout_bytes": 0,
    "stderr_bytes": 0,
    "duration_s": 0.1,
    "cause": None,
    "killed_processes": 0,
    "background_processes": 0,
    "oom_kills": 0,
}


class Peer:
    """One connection of a client, seen from the runner. ``number`` counts connections from 1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.number = number
        self._reader = reader
        self._writer = writer
        self._parser = FrameParser()
        self._frames: list[Frame] = []

    async def frame(self) -> Frame:
        """The client's next frame that is no PING. Raises ConnectionError at the end."""
        while True:
            while self._frames:
                frame = self._frames.pop(0)
                if frame.type is not FrameType.PING:
                    return frame
            data = await self._reader.read(65536)
            if not data:
                raise ConnectionError
            self._frames += self._parser.feed(data)

    async def request(self) -> tuple[int, Document]:
        """The next REQUEST: its call number and document."""
        while True:
            frame = await self.frame()
            if frame.type is FrameType.REQUEST:
                return frame.call, dict(decode_document(frame.payload).document)

    async def send(self, data: bytes) -> None:
        """Raw bytes."""
        self._writer.write(data)
        await self._writer.drain()

    async def hello(self, **changes: Any) -> None:
        """Take the client's HELLO and answer with a good one, or one with ``changes``."""
        await self.frame()
        document = {"protocol": PROTOCOL, "runner_version": "fake", "boot_id": "one", "epoch": 0, "commands": 0, **changes}
        await self.send(encode_frame(FrameType.HELLO, 0, encode_document(document)))

    async def reply(self, call: int, document: Document, body: bytes = b"") -> None:
        """A REPLY."""
        await self.send(encode_frame(FrameType.REPLY, call, encode_document(document, body)))

    async def stay(self) -> None:
        """Read and say nothing until the client goes."""
        while True:
            await self.frame()


Behaviour = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def served(behaviour: Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]) -> AsyncIterator[str]:
    """A Unix socket; each connection gets ``behaviour`` and is closed when that returns. All ended behind the block."""
    tasks: set[asyncio.Task[Any]] = set()
    count = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                await behaviour(reader, writer, count)
        finally:
            tasks.discard(task)
            writer.close()

    with tempfile.TemporaryDirectory(prefix="fr-") as directory:
        path = str(Path(directory) / "s")
        server = await asyncio.start_unix_server(accept, path)
        try:
            yield path
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def fake_channel(behaviour: Behaviour, *, alive: bool = True, reconnect_s: float = 1.0) -> AsyncIterator[Channel]:
    """A channel to a runner that behaves like that on each connection."""

    async def inspect() -> Inspection:
        return Inspection(alive=alive, cause="" if alive else "it fell over")

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await behaviour(Peer(reader, writer, number))

    async with served(behave) as path:
        channel = Channel(dial=lambda: dial_unix(path), inspect=inspect, epoch=1, client="test", reconnect_s=reconnect_s)
        try:
            yield channel
        finally:
            channel.close()


async def until_one_ends(*directions: Coroutine[Any, Any, None]) -> None:
    """Run both directions of a proxied connection; when one is over, so is the other."""
    tasks = [asyncio.create_task(direction) for direction in directions]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def cutting_proxy(dial: Dial, every_bytes: int) -> AsyncIterator[tuple[Dial, list[int]]]:
    """A way to the same runner that breaks after each ``every_bytes`` bytes (either direction), and the list of the cuts so far."""
    cuts: list[int] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        upstream = await dial()
        left = every_bytes

        async def up() -> None:
            nonlocal left
            while left > 0 and (data := await reader.read(8192)):
                upstream.send(data[:left])
                await upstream.drain()
                left -= len(data)

        async def down() -> None:
            nonlocal left
            while left > 0 and (data := await upstream.receive()):
                writer.write(data[: max(left, 0)])
                await writer.drain()
                left -= len(data)

        try:
            await until_one_ends(up(), down())
        finally:
            upstream.close()
        if left <= 0:
            cuts.append(number)

    async with served(forward) as path:

        async def through() -> Transport:
            return await dial_unix(path)

        yield through, cuts


def answer(document: Document, body: bytes = b"") -> Answer:
    """A runner's answer, for code that is tested without a channel."""
    return Answer(document, body)
