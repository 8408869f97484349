"""One connection to a runner: many calls at once over one transport, each with its own flow control."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cifixer_exec.channel.frames import (
    Answer,
    Frame,
    FrameParser,
    FrameType,
    MalformedFrameError,
    decode_document,
    decode_output,
    document_parts,
    encode_credit,
    encode_document,
    encode_frame,
)
from cifixer_exec.channel.transport import Transport

PROTOCOL = 1
WINDOW_BYTES = 1024 * 1024
PING_INTERVAL_S = 5.0
PONG_INTERVAL_S = 1.0
#: Three pings without any byte from the runner: a half-open connection, or a sandbox that is frozen.
SILENCE_S = 20.0


class ConnectionClosedError(Exception):
    """The connection ended before the answer; whether the request was carried out is not known."""


class EpochStaleError(Exception):
    """The runner has met a newer owner: this one is fenced and must touch the sandbox no more."""


class RunnerError(Exception):
    """The runner's ERROR answer to one call."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Output:
    """An OUTPUT frame: ``stream`` 1 is stdout, 2 stderr."""

    stream: int
    offset: int
    data: bytes


class _Call:
    """The inbox of one open call. ``credit`` is what the runner may still send."""

    __slots__ = ("credit", "inbox")

    def __init__(self, window_bytes: int) -> None:
        self.inbox: asyncio.Queue[Output | Answer | Exception] = asyncio.Queue()
        self.credit = window_bytes


class Connection:
    """Made by :meth:`open`; dead for good once :attr:`closed_by` is set."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []
        self._heard_at = 0.0
        self._ponged_at = float("-inf")
        self._hello: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self.closed_by: Exception | None = None

    @classmethod
    async def open(cls, transport: Transport, hello: Mapping[str, Any], *, timeout_s: float = 10.0) -> Connection:
        """Say HELLO and wait for the runner's.

        Raises:
            EpochStaleError: a newer owner was there.
            ConnectionClosedError: refused, malformed, or no answer in time.
        """
        self = cls(transport)
        transport.send(encode_frame(FrameType.HELLO, 0, encode_document({"protocol": PROTOCOL, **hello})))
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._ping())]
        try:
            async with asyncio.timeout(timeout_s):
                await self._hello
        except TimeoutError:
            self._end(ConnectionClosedError(f"the runner did not greet within {timeout_s:g} s"))
            raise self._reason() from None
        except BaseException:
            self._end(ConnectionClosedError("closed by this side"))
            raise
        return self

    @property
    def hello(self) -> Mapping[str, Any]:
        """What the runner said of itself."""
        return self._hello.result()

    async def request(self, verb: str, arguments: Mapping[str, Any], body: bytes | memoryview = b"") -> Answer:
        """One request, one answer.

        Raises:
            RunnerError: the runner refused it.
            ConnectionClosedError, EpochStaleError: as for the connection.
        """
        async for item in self.stream(verb, arguments, body, window_bytes=0):
            if isinstance(item, Answer):
                return item
        raise ConnectionClosedError("the call ended without an answer")

    async def stream(
        self, verb: str, arguments: Mapping[str, Any], body: bytes | memoryview = b"", *, window_bytes: int = WINDOW_BYTES
    ) -> AsyncGenerator[Output | Answer, None]:
        """One request whose answer comes after any number of outputs. Credit is given as the items are taken."""
        if self.closed_by is not None:
            raise self._reason()
        number = next(self._numbers)
        call = self._calls[number] = _Call(window_bytes)
        finished = False
        self._transport.send(encode_frame(FrameType.REQUEST, number, *document_parts({"verb": verb, **arguments}, body)))
        try:
            if len(body) > WINDOW_BYTES // 4:
                await self._drain()
            spent = 0
            while not finished:
                item = await call.inbox.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = isinstance(item, Answer)
                yield item
                if isinstance(item, Output):
                    spent = self._grant(number, call, spent + len(item.data), window_bytes)
        finally:
            if self._calls.pop(number, None) is not None and not finished and self.closed_by is None:
                # The runner may still send what is on its way: those frames name a call nobody holds, and are dropped.
                self._transport.send(encode_frame(FrameType.CANCEL, number))

    def close(self) -> None:
        """Close; open calls end with :class:`ConnectionClosedError`. Commands in the sandbox go on."""
        self._end(ConnectionClosedError("closed by this side"))

    def _grant(self, number: int, call: _Call, spent: int, window_bytes: int) -> int:
        """Give credit back in portions of a quarter window; returns what is not given back yet."""
        if spent < window_bytes // 4 or self.closed_by is not None:
            return spent
        call.credit += spent
        self._transport.send(encode_credit(number, spent))
        return 0

    async def _drain(self) -> None:
        try:
            await self._transport.drain()
        except OSError as error:
            self._end(ConnectionClosedError(f"the connection broke: {error}"))
            raise self._reason() from None

    async def _read(self) -> None:
        parser = FrameParser()
        reason: Exception = ConnectionClosedError("the runner closed the connection")
        try:
            while data := await self._transport.receive():
                self._heard_at = asyncio.get_running_loop().time()
                for frame in parser.feed(data):
                    self._dispatch(frame)
        except OSError as error:
            reason = ConnectionClosedError(f"the connection broke: {error}")
        except (MalformedFrameError, EpochStaleError, ConnectionClosedError) as error:
            reason = error
        self._end(reason)

    def _dispatch(self, frame: Frame) -> None:
        if frame.call == 0:
            self._dispatch_own(frame)
            return
        call = self._calls.get(frame.call)
        if call is None:
            return
        if frame.type is FrameType.OUTPUT:
            output = Output(*decode_output(frame.payload))
            call.credit -= len(output.data)
            if call.credit < 0:
                raise MalformedFrameError("the runner sent more output than it had credit for")
            call.inbox.put_nowait(output)
        elif frame.type in (FrameType.REPLY, FrameType.ERROR):
            # The call is over: whatever a hostile runner sends for it from now on is dropped, not gathered.
            last = _runner_error(frame.payload) if frame.type is FrameType.ERROR else decode_document(frame.payload)
            del self._calls[frame.call]
            call.inbox.put_nowait(last)
        else:
            raise MalformedFrameError(f"the runner sent a {frame.type.name} frame within a call")

    def _dispatch_own(self, frame: Frame) -> None:
        if frame.type is FrameType.HELLO and not self._hello.done():
            document = decode_document(frame.payload).document
            if document.get("protocol") != PROTOCOL:
                raise MalformedFrameError(f"the runner speaks protocol {document.get('protocol')!r}, not {PROTOCOL}")
            self._hello.set_result(document)
        elif frame.type is FrameType.PING:
            self._pong(frame.payload[:64])
        elif frame.type is FrameType.ERROR:
            error = _runner_error(frame.payload)
            if error.code == "epoch_stale":
                raise EpochStaleError(error.message)
            raise ConnectionClosedError(f"the runner closed the connection: {error.code}: {error.message}")
        elif frame.type is not FrameType.PONG:
            raise MalformedFrameError(f"the runner sent a {frame.type.name} frame for the connection")

    def _pong(self, payload: bytes | bytearray) -> None:
        """At most one answer per second: a peer that pings and does not read must not fill our memory."""
        now = asyncio.get_running_loop().time()
        if now - self._ponged_at >= PONG_INTERVAL_S:
            self._ponged_at = now
            self._transport.send(encode_frame(FrameType.PONG, 0, payload))

    async def _ping(self) -> None:
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        while self.closed_by is None:
            await asyncio.sleep(PING_INTERVAL_S)
            if loop.time() - self._heard_at > SILENCE_S:
                self._end(ConnectionClosedError(f"the runner has been silent for {SILENCE_S:g} s"))
            else:
                self._transport.send(encode_frame(FrameType.PING, 0))

    def _reason(self) -> Exception:
        """A fresh copy for each waiter: one exception object must not collect the tracebacks of many."""
        reason = self.closed_by or ConnectionClosedError("closed")
        return type(reason)(*reason.args)

    def _end(self, reason: Exception) -> None:
        if self.closed_by is not None:
            return
        self.closed_by = reason
        for call in self._calls.values():
            call.inbox.put_nowait(self._reason())
        if not self._hello.done():
            self._hello.set_exception(self._reason())
            self._hello.exception()  # mark as seen: open() may have been cancelled
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        with suppress(OSError, RuntimeError):
            self._transport.close()


def _runner_error(payload: bytes | bytearray) -> RunnerError:
    document = decode_document(payload).document
    return RunnerError(str(document.get("code", "internal"))[:64], str(document.get("message", ""))[:2000])
