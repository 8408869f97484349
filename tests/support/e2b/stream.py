"""The stream of a command's events to one client, and the ways in which it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from aiohttp import web

from tests.support.e2b.command import Command, Subscriber
from tests.support.e2b.connect import Stream, end_frame, frame, timeout_of
from tests.support.e2b.problems import RpcError
from tests.support.kubernetes.faults import reset

Json = dict[str, Any]
_LAST_WORDS_S = 1.0
_KEEPALIVE_S = 90.0
#: How a test can have it cut: in the middle of a message, by a reset, in order but without the end of the command, or with an error.
CUTS = ("frame", "reset", "clean", "error")


class EventStream:
    """:meth:`run` is its life; :meth:`cut` ends it. ``gate`` is passed before each message (a frozen sandbox)."""

    def __init__(self, request: web.Request, command: Command, subscriber: Subscriber, gate: Callable[[], Awaitable[None]]) -> None:
        self._request = request
        self._command = command
        self._subscriber = subscriber
        self._gate = gate
        self._response = Stream()
        self._verdict: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()

    def cut(self, how: str, message: str = "") -> None:
        """Now; the command goes on."""
        if not self._verdict.done():
            self._verdict.set_result((how, message))

    async def run(self) -> web.StreamResponse:
        """Until the command's end, the client's, its deadline, or a cut. Raises ConnectionResetError."""
        await self._gate()
        await self._response.prepare(self._request)
        pump = asyncio.create_task(self._pump())
        try:
            await asyncio.wait((pump, self._verdict), return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                await self._end(*self._verdict.result())
            elif (error := pump.exception()) is not None:
                raise error
        finally:
            pump.cancel()
        return self._response

    def close(self) -> None:
        """Nobody listens any more."""
        self._command.leave(self._subscriber)

    async def _pump(self) -> None:
        await self._response.write(frame({"event": {"start": {"pid": self._command.pid}}}))
        error = None
        try:
            async with asyncio.timeout(timeout_of(self._request)) as deadline:
                await self._copy()
        except TimeoutError:
            if not deadline.expired():
                raise
            error = RpcError("deadline_exceeded", "context deadline exceeded")
        await self._response.write(end_frame(error))
        await self._response.write_eof()

    async def _copy(self) -> None:
        while True:
            event = await self._next()
            await self._gate()
            await self._response.write(frame({"event": event}))
            if "end" in event:
                return

    async def _next(self) -> Json:
        if self._command.end.done() and self._subscriber.is_empty:
            return self._command.end.result()
        wanted = self._request.headers.get("Keepalive-Ping-Interval", "")
        with suppress(TimeoutError):
            async with asyncio.timeout(int(wanted) if wanted.isdecimal() else _KEEPALIVE_S):
                return await self._subscriber.get()
        return {"keepalive": {}}

    async def _end(self, how: str, message: str) -> None:
        if how == "reset":
            reset(self._request)
            return
        last = {"frame": frame({"event": {"data": {"stdout": "AAAA"}}})[:9], "clean": end_frame()}
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._response.write(last.get(how) or end_frame(RpcError("unavailable", message or "the stream was cut")))
        if how == "frame" and self._request.transport is not None:
            self._request.transport.close()
