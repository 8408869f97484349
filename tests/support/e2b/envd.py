"""envd and the proxy before it: which sandbox a request is for, and the process service."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from tests.support.e2b.command import Command
from tests.support.e2b.connect import STREAMED, UNARY, Stream, check, end_frame, frame, frames, only_frame, timeout_of
from tests.support.e2b.faults import after_done
from tests.support.e2b.files import Files
from tests.support.e2b.knobs import streams_input
from tests.support.e2b.place import User
from tests.support.e2b.problems import HttpError, RpcError, port_not_open, sandbox_gone
from tests.support.e2b.sandbox import Sandbox
from tests.support.e2b.sandboxes import Sandboxes
from tests.support.e2b.stream import EventStream

Json = dict[str, Any]
_PORT = "49983"
_SIGNALS = {"SIGNAL_SIGTERM": 15, "SIGNAL_SIGKILL": 9, 15: 15, 9: 9}
_Unary = Callable[[Sandbox, Json, User], Awaitable[Json]]


class Envd:
    """Its handlers."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self._sandboxes = sandboxes
        self._files = Files()

    def routes(self) -> list[web.RouteDef]:
        """For the application."""
        process: dict[str, _Unary] = {"List": _list, "SendInput": _send_input, "CloseStdin": _close_stdin}
        process |= {"SendSignal": _send_signal, "Update": _update}
        unary = {f"/process.Process/{name}": call for name, call in process.items()}
        unary |= {f"/filesystem.Filesystem/{name}": call for name, call in self._files.calls().items()}
        return [
            web.get("/health", self.health),
            web.get("/files", self.read),
            web.post("/files", self.write),
            web.post("/process.Process/Start", self.start),
            web.post("/process.Process/Connect", self.connect),
            web.post("/process.Process/StreamInput", self.stream_input),
            *(web.post(path, self._unary(call)) for path, call in unary.items()),
            web.post("/{service:process.Process|filesystem.Filesystem}/{method}", _unimplemented),
        ]

    @asynccontextmanager
    async def _sandbox(self, request: web.Request, *, private: bool = True) -> AsyncIterator[Sandbox]:
        """The one whose id is in the headers; it knows of the request meanwhile. Raises HttpError."""
        sandbox_id = request.headers.get("E2b-Sandbox-Id", "")
        try:
            sandbox = self._sandboxes.get(sandbox_id)
        except LookupError:
            raise sandbox_gone(sandbox_id) from None
        sandbox.requests[id(request)] = request
        try:
            await sandbox.gate()
            if sandbox.state == "paused":
                raise sandbox_gone(sandbox_id)
            port = request.headers.get("E2b-Sandbox-Port", _PORT)
            if port != _PORT:
                raise port_not_open(sandbox_id, port)
            if private and request.headers.get("X-Access-Token") != sandbox.token:
                raise HttpError(401, "unauthorized access, please provide a valid access token or method signing if supported")
            yield sandbox
            await sandbox.gate()
        finally:
            sandbox.requests.pop(id(request), None)

    async def health(self, request: web.Request) -> web.StreamResponse:
        """204."""
        async with self._sandbox(request, private=False):
            after_done(request)
            return web.Response(status=204)

    async def read(self, request: web.Request) -> web.StreamResponse:
        """200 and the content."""
        async with self._sandbox(request) as sandbox:
            return await self._files.read(sandbox, request, _file_user(sandbox, request))

    async def write(self, request: web.Request) -> web.StreamResponse:
        """200 and what has been written."""
        async with self._sandbox(request) as sandbox:
            return await self._files.write(sandbox, request, _file_user(sandbox, request))

    def _unary(self, call: _Unary) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            check(request, UNARY)
            async with self._sandbox(request) as sandbox:
                try:
                    answer = await call(sandbox, json.loads(await request.read() or b"{}"), _user(sandbox, request))
                except RpcError as error:
                    return error.response()
                after_done(request)
                return web.json_response(answer)

        return handle

    async def start(self, request: web.Request) -> web.StreamResponse:
        """A new process and its events."""
        check(request, STREAMED)
        async with self._sandbox(request) as sandbox:
            try:
                asked = await only_frame(request)
                if "pty" in asked:
                    raise RpcError("unimplemented", "no PTYs here")
                command, subscriber = await sandbox.execute(asked, _user(sandbox, request), timeout_of(request))
            except RpcError as error:
                return await _refused(request, error)
            return await _run(sandbox, request, EventStream(request, command, subscriber, sandbox.gate))

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """The events of a process from now on."""
        check(request, STREAMED)
        async with self._sandbox(request) as sandbox:
            try:
                command = _ended_or_running(sandbox, (await only_frame(request)).get("process", {}))
            except RpcError as error:
                return await _refused(request, error)
            return await _run(sandbox, request, EventStream(request, command, command.subscribe(), sandbox.gate))

    async def stream_input(self, request: web.Request) -> web.StreamResponse:
        """All of a client's stream to the input of a process."""
        check(request, STREAMED)
        async with self._sandbox(request) as sandbox:
            if not streams_input(sandbox.envd_version):
                return await _unimplemented(request)
            command: Command | None = None
            try:
                async for message in frames(request):
                    await sandbox.gate()
                    if "start" in message:
                        command = sandbox.find(message["start"].get("process", {}))
                    elif "data" in message and command is not None:
                        await command.write(_stdin(message["data"].get("input", {})))
            except RpcError as error:
                return await _refused(request, error)
            after_done(request)
            return await _sent(request, frame({}) + end_frame())


def _ended_or_running(sandbox: Sandbox, selector: Json) -> Command:
    ended = sandbox.ended.get(int(selector.get("pid", 0)))
    try:
        return sandbox.find(selector)
    except RpcError:
        if ended is None:
            raise
        return ended


async def _run(sandbox: Sandbox, request: web.Request, stream: EventStream) -> web.StreamResponse:
    sandbox.streams.add(stream)
    try:
        after_done(request)
        return await stream.run()
    finally:
        sandbox.streams.discard(stream)
        stream.close()


async def _refused(request: web.Request, error: RpcError) -> web.StreamResponse:
    """To who asked for a stream: its status is 200, and it ends at once."""
    return await _sent(request, end_frame(error))


async def _sent(request: web.Request, data: bytes) -> web.StreamResponse:
    response = Stream()
    await response.prepare(request)
    await response.write(data)
    await response.write_eof()
    return response


async def _unimplemented(request: web.Request) -> web.StreamResponse:
    """As connect-go answers to a procedure that it has not."""
    return web.Response(status=404, text="404 page not found\n")


async def _list(sandbox: Sandbox, body: Json, user: User) -> Json:
    return {"processes": [command.listed for command in sandbox.commands.values()]}


async def _send_input(sandbox: Sandbox, body: Json, user: User) -> Json:
    await sandbox.find(body.get("process", {})).write(_stdin(body.get("input", {})))
    return {}


async def _close_stdin(sandbox: Sandbox, body: Json, user: User) -> Json:
    if not streams_input(sandbox.envd_version):
        raise RpcError("unimplemented", "unimplemented")
    sandbox.find(body.get("process", {})).close_stdin()
    return {}


async def _send_signal(sandbox: Sandbox, body: Json, user: User) -> Json:
    command = sandbox.find(body.get("process", {}))
    number = _SIGNALS.get(body.get("signal", ""))
    if number is None:
        raise RpcError("unimplemented", f"invalid signal: {body.get('signal')}")
    command.signal(number)
    return {}


async def _update(sandbox: Sandbox, body: Json, user: User) -> Json:
    sandbox.find(body.get("process", {}))
    if "pty" in body:
        raise RpcError("internal", "error resizing tty: tty not assigned to process")
    return {}


def _stdin(given: Json) -> bytes:
    if "stdin" not in given:
        raise RpcError("unimplemented", "invalid input type: only stdin")
    try:
        return base64.b64decode(given["stdin"])
    except binascii.Error as error:
        raise RpcError("invalid_argument", str(error)) from None


def _user(sandbox: Sandbox, request: web.Request) -> User:
    """Raises RpcError."""
    header = request.headers.get("Authorization", "")
    name = "user"
    if header.startswith("Basic "):
        name = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")[0]
    if name not in sandbox.users:
        raise RpcError("unauthenticated", f"invalid username: '{name}'")
    return sandbox.users[name]


def _file_user(sandbox: Sandbox, request: web.Request) -> User:
    """Raises HttpError."""
    name = request.query.get("username") or "user"
    if name not in sandbox.users:
        raise HttpError(401, f"error looking up user '{name}': user: unknown user {name}")
    return sandbox.users[name]
