"""The channel over a bridge, whose other side is a script."""

from __future__ import annotations

import asyncio
import base64
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from e2b import CommandExitException, SandboxNotRunningException

from cifixer_exec.backends.e2b import stream
from cifixer_exec.backends.e2b.stream import BEGIN, BridgeEndedError, BridgeTransport
from cifixer_exec.channel.transport import MOST_WAITING_BYTES

T = TypeVar("T")
MIB = 1 << 20
ALL_BYTES = bytes(range(256)) * 5


class Handle:
    """Of a bridge: what the SDK's has. ``taking`` is set while it takes input."""

    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.taking = asyncio.Event()
        self.taking.set()
        self.failure: Exception | None = None
        self.sent: list[bytes] = []
        self.said: list[str] = []

    async def wait(self) -> None:
        await asyncio.shield(self.over)

    async def send_stdin(self, data: bytes, _request_timeout: float | None = None) -> None:
        await self.taking.wait()
        if self.failure is not None:
            raise self.failure
        self.sent.append(bytes(data))

    async def disconnect(self) -> None:
        self.said.append("disconnect")

    async def kill(self) -> bool:
        self.said.append("kill")
        return True


def line(data: bytes) -> str:
    return base64.b64encode(data).decode() + "\n"


def scripted(client: Callable[[BridgeTransport, Handle], Awaitable[T]], *, begun: bool = True) -> T:
    """What ``client`` makes of a transport and the other side of it."""

    async def go() -> T:
        transport, handle = BridgeTransport(), Handle()
        async with asyncio.timeout(20):
            if begun:
                await transport.on_stdout(BEGIN + "\n")
                await transport.begin(handle)
            result = await client(transport, handle)
            transport.close()
            await asyncio.gather(*stream._closing)
            return result

    return asyncio.run(go())


async def received(transport: BridgeTransport, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await transport.receive()
    return data


NOISE = {
    "none": "",
    "lines": "Welcome!\nLast login: never\n",
    "a line that looks like ours": f"{BEGIN}0\naGVsbG8=\n",
    "without an end of line": "Welcome! ",
    "carriage returns": "a\rb\r\n",
    "empty lines": "\n\n",
    "no utf-8": "\ufffd\ufffd\n",
    "a lot": "x" * 200_000 + "\n",
}


@pytest.mark.parametrize("what", NOISE)
def test_what_a_login_shell_says_before_is_not_ours(what: str) -> None:
    async def client(transport: BridgeTransport, handle: Handle) -> bytes:
        begin = asyncio.ensure_future(transport.begin(handle))
        await transport.on_stdout(NOISE[what])
        await transport.on_stdout(BEGIN + "\n" + line(b"first"))
        await begin
        return await transport.receive()

    assert scripted(client, begun=False) == b"first"


@pytest.mark.parametrize("seed", range(20))
def test_lines_may_be_split_anywhere(seed: int) -> None:
    chance = random.Random(seed)
    pieces = [chance.randbytes(chance.choice([1, 2, 3, 100, 5000])) for _ in range(20)]
    text = "noise\n" + BEGIN + "\n" + "".join(line(piece) for piece in pieces)

    async def client(transport: BridgeTransport, handle: Handle) -> bytes:
        begin, at = asyncio.ensure_future(transport.begin(handle)), 0
        while at < len(text):
            size = chance.choice([1, 2, 7, 1000, 100_000])
            await transport.on_stdout(text[at : at + size])
            at += size
        await begin
        return await received(transport, sum(map(len, pieces)))

    assert scripted(client, begun=False) == b"".join(pieces)


def test_every_byte_comes_as_it_was() -> None:
    async def client(transport: BridgeTransport, _handle: Handle) -> bytes:
        await transport.on_stdout(line(ALL_BYTES))
        return await transport.receive()

    assert scripted(client) == ALL_BYTES


@pytest.mark.parametrize("bad", ["no base64!", "aGVsbG8", "aGVs bG8=", "\ufffdaGVs", "=", "aGVsbG8=="])
def test_what_is_no_base64_breaks_the_stream_behind_what_came_before(bad: str) -> None:
    async def client(transport: BridgeTransport, handle: Handle) -> None:
        await transport.on_stdout(line(b"before") + bad + "\n" + line(b"behind"))
        handle.over.set_result(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await transport.receive() == b"before"
        for _ in range(2):
            with pytest.raises(ConnectionError, match="no base64"):
                await transport.receive()

    scripted(client)


def test_an_empty_line_is_not_the_end() -> None:
    async def client(transport: BridgeTransport, _handle: Handle) -> bytes:
        await transport.on_stdout("\n" + line(b"on"))
        return await transport.receive()

    assert scripted(client) == b"on"


def test_who_does_not_take_keeps_the_other_side_waiting_and_loses_nothing() -> None:
    piece, count = os.urandom(48 * 1024), 40

    async def client(transport: BridgeTransport, _handle: Handle) -> bytes:
        told = 0

        async def tell() -> None:
            nonlocal told
            for _ in range(count):
                await transport.on_stdout(line(piece))
                told += 1

        teller = asyncio.ensure_future(tell())
        for _ in range(1000):
            await asyncio.sleep(0)
        assert told * len(piece) <= MOST_WAITING_BYTES
        assert not teller.done()
        data = await received(transport, count * len(piece))
        await teller
        return data

    assert scripted(client) == piece * count


def test_closing_lets_the_other_side_go() -> None:
    async def client(transport: BridgeTransport, _handle: Handle) -> None:
        teller = asyncio.ensure_future(transport.on_stdout(line(bytes(MOST_WAITING_BYTES))))
        await asyncio.sleep(0)
        assert not teller.done()
        transport.close()
        await teller

    scripted(client)


def test_the_end_comes_behind_everything() -> None:
    async def client(transport: BridgeTransport, handle: Handle) -> list[bytes]:
        await transport.on_stdout(line(b"a") + line(b"b"))
        handle.over.set_result(None)
        return [await transport.receive() for _ in range(4)]

    assert scripted(client) == [b"a", b"b", b"", b""]


@pytest.mark.parametrize("waiting", [True, False], ids=["who waits", "who comes later"])
def test_a_broken_stream_is_told_to(waiting: bool) -> None:
    async def client(transport: BridgeTransport, handle: Handle) -> None:
        receiver = asyncio.ensure_future(transport.receive()) if waiting else None
        await asyncio.sleep(0)
        handle.over.set_exception(Exception("Command ended without an end event"))
        if receiver is None:
            await asyncio.sleep(0)
            receiver = asyncio.ensure_future(transport.receive())
        with pytest.raises(ConnectionError, match="without an end event"):
            await receiver
        with pytest.raises(ConnectionError):
            await transport.drain()

    scripted(client)


def test_what_the_bridge_said_is_told_and_only_the_end_of_it_kept() -> None:
    async def client(transport: BridgeTransport, handle: Handle) -> str:
        for _ in range(1000):
            transport.on_stderr("x" * 100)
        transport.on_stderr("runner: bridge: no such socket\n")
        handle.over.set_exception(Exception("exit code 1"))
        with pytest.raises(ConnectionError) as caught:
            await transport.receive()
        return str(caught.value)

    said = scripted(client)
    assert said.endswith("runner: bridge: no such socket")
    assert len(said) < 5000


ENDS: dict[str, Exception | None] = {"by an error": CommandExitException("", "", 1, "exit status 1"), "in order": None}


@pytest.mark.parametrize("how", ENDS)
def test_a_bridge_that_ends_before_it_begins_is_no_channel(how: str) -> None:
    async def client(transport: BridgeTransport, handle: Handle) -> str:
        begin, error = asyncio.ensure_future(transport.begin(handle)), ENDS[how]
        await transport.on_stdout("Welcome\n")
        if error is None:
            handle.over.set_result(None)
        else:
            handle.over.set_exception(error)
        with pytest.raises(BridgeEndedError, match=r"did not begin: .+") as caught:
            await begin
        return str(caught.value)

    assert scripted(client, begun=False)


def test_what_the_sdk_raises_before_it_begins_is_for_who_knows_its_errors() -> None:
    async def client(transport: BridgeTransport, handle: Handle) -> None:
        begin = asyncio.ensure_future(transport.begin(handle))
        await asyncio.sleep(0)
        handle.over.set_exception(SandboxNotRunningException("it is gone"))
        with pytest.raises(SandboxNotRunningException):
            await begin

    scripted(client, begun=False)


class TestSending:
    def test_input_comes_in_order_and_whole(self) -> None:
        pieces = [os.urandom(size) for size in (1, 10, 3 * MIB, 5, MIB, MIB + 1, 0, 7)]

        async def client(transport: BridgeTransport, handle: Handle) -> list[bytes]:
            for piece in pieces:
                transport.send(piece)
                await asyncio.sleep(0)
            await transport.drain()
            return handle.sent

        sent = scripted(client)
        assert b"".join(sent) == b"".join(pieces)
        assert max(map(len, sent)) <= MIB

    def test_what_waits_goes_together(self) -> None:
        async def client(transport: BridgeTransport, handle: Handle) -> list[bytes]:
            handle.taking.clear()
            for number in range(1000):
                transport.send(b"%3d" % number)
                await asyncio.sleep(0)
            handle.taking.set()
            await transport.drain()
            return handle.sent

        sent = scripted(client)
        assert b"".join(sent) == b"".join(b"%3d" % number for number in range(1000))
        assert len(sent) <= 2

    def test_only_one_request_is_under_way(self) -> None:
        async def client(transport: BridgeTransport, handle: Handle) -> int:
            most = now = 0
            send: Any = handle.send_stdin

            async def counted(data: bytes, timeout: float | None = None) -> None:
                nonlocal most, now
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.001)
                await send(data, timeout)
                now -= 1

            handle.send_stdin = counted  # type: ignore[method-assign,assignment]
            for _ in range(20):
                transport.send(bytes(200_000))
                await asyncio.sleep(0)
            await transport.drain()
            return most

        assert scripted(client) == 1

    def test_drain_waits_for_all_of_it(self) -> None:
        async def client(transport: BridgeTransport, handle: Handle) -> None:
            handle.taking.clear()
            transport.send(b"x")
            drain = asyncio.ensure_future(transport.drain())
            for _ in range(100):
                await asyncio.sleep(0)
            assert not drain.done()
            handle.taking.set()
            await drain
            assert handle.sent == [b"x"]

        scripted(client)

    def test_a_request_that_fails_breaks_the_stream_for_good(self) -> None:
        """Whether its bytes went in is not known, so nothing may follow them."""

        async def client(transport: BridgeTransport, handle: Handle) -> None:
            handle.failure = TimeoutError("no answer")
            transport.send(b"x")
            with pytest.raises(ConnectionResetError):
                await transport.drain()
            handle.failure = None
            transport.send(b"y")
            with pytest.raises(ConnectionResetError):
                await transport.drain()
            with pytest.raises(ConnectionError, match="no answer"):
                await transport.receive()
            assert handle.sent == []

        scripted(client)

    @pytest.mark.parametrize("how", ["the end", "an error", "close"])
    def test_who_drains_while_it_ends_goes_on(self, how: str) -> None:
        async def client(transport: BridgeTransport, handle: Handle) -> None:
            handle.taking.clear()
            transport.send(b"x")
            drain = asyncio.ensure_future(transport.drain())
            await asyncio.sleep(0)
            if how == "close":
                transport.close()
            elif how == "the end":
                handle.over.set_result(None)
            else:
                handle.over.set_exception(Exception("cut"))
            with pytest.raises(ConnectionResetError):
                await drain

        scripted(client)


class TestClosing:
    def test_twice_is_once_and_the_bridge_is_ended(self) -> None:
        async def client(transport: BridgeTransport, handle: Handle) -> list[str]:
            transport.close()
            transport.close()
            await asyncio.gather(*stream._closing)
            return handle.said

        assert scripted(client) == ["disconnect", "kill"]

    def test_who_receives_is_told(self) -> None:
        async def client(transport: BridgeTransport, _handle: Handle) -> None:
            receiver = asyncio.ensure_future(transport.receive())
            await asyncio.sleep(0)
            transport.close()
            with pytest.raises(ConnectionError):
                await receiver

        scripted(client)

    def test_nothing_is_sent_any_more(self) -> None:
        async def client(transport: BridgeTransport, handle: Handle) -> list[bytes]:
            transport.close()
            transport.send(b"late")
            with pytest.raises(ConnectionResetError):
                await transport.drain()
            return handle.sent

        assert scripted(client) == []

    def test_one_that_never_had_a_bridge(self) -> None:
        async def client(transport: BridgeTransport, _handle: Handle) -> None:
            transport.close()

        scripted(client, begun=False)

    def test_a_farewell_that_fails_bothers_nobody(self) -> None:
        async def client(transport: BridgeTransport, handle: Handle) -> None:
            async def fail(*_: Any) -> bool:
                raise Exception("the sandbox is gone")  # noqa: TRY002  # as the SDK does

            handle.kill = fail  # type: ignore[method-assign]
            transport.close()

        scripted(client)
