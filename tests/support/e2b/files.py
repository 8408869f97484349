"""envd's files: content by HTTP, the rest by the filesystem service."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

from aiohttp import BodyPartReader, web

from tests.support.e2b.faults import after_done
from tests.support.e2b.pipes import CHUNK_BYTES, Pipes, feed, finish
from tests.support.e2b.place import User
from tests.support.e2b.problems import STATUS_OF_CODE, HttpError, RpcError
from tests.support.e2b.sandbox import Sandbox
from tests.support.kubernetes.runtime import LaunchError

Json = dict[str, Any]
_FILENAME = re.compile(r'filename="([^"]*)"')
_Call = Callable[[Sandbox, Json, User], Awaitable[Json]]


class Operation:
    """One process in the sandbox: what it says, and content in one of both directions. Raises RpcError."""

    def __init__(self, sandbox: Sandbox, request: Json, user: User) -> None:
        self._sandbox = sandbox
        self._request = request
        self._user = user
        self._pipes = Pipes(stdin=request["verb"] == "write", stderr=False)
        self._output: asyncio.StreamReader | None = None
        self._transport: asyncio.ReadTransport | None = None
        self.input: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._sandbox.operate(self._request, self._user, self._pipes)
        except LaunchError as error:
            self._pipes.close()
            raise RpcError("unavailable", str(error)) from None
        self.input = await self._pipes.writer()
        self._output, self._transport = await self._pipes.reader(1)
        return self

    async def __aexit__(self, *_: object) -> None:
        finish(self.input)
        if self._transport is not None:
            self._transport.close()

    async def answer(self) -> Json:
        """Its line."""
        assert self._output is not None
        line = await (self._output.readline() if self._request["verb"] == "read" else self._output.read())
        if not line.endswith(b"\n"):
            raise RpcError("unavailable", "the file operation has died")
        answer: Json = json.loads(line)
        if "error" in answer:
            raise RpcError(answer["error"], answer["message"])
        return answer

    async def content(self) -> AsyncIterator[bytes]:
        """What follows it."""
        assert self._output is not None
        while data := await self._output.read(CHUNK_BYTES):
            yield data


class Files:
    """Their handlers."""

    def calls(self) -> dict[str, _Call]:
        """The procedures of the filesystem service."""
        return {"Stat": _call("stat"), "MakeDir": _call("make"), "ListDir": _call("list"), "Remove": _call("remove"), "Move": _move}

    async def read(self, sandbox: Sandbox, request: web.Request, user: User) -> web.StreamResponse:
        """GET /files. Raises HttpError."""
        try:
            async with Operation(sandbox, {"verb": "read", "path": _path(request.query.get("path"))}, user) as operation:
                size = (await operation.answer())["size"]
                after_done(request)
                response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
                response.content_length = size
                await response.prepare(request)
                async for data in operation.content():
                    await sandbox.gate()
                    await response.write(data)
                await response.write_eof()
                return response
        except RpcError as error:
            raise _http(error) from None

    async def write(self, sandbox: Sandbox, request: web.Request, user: User) -> web.StreamResponse:
        """POST /files, one as it is or several as a form. Raises HttpError."""
        written = []
        try:
            if request.content_type == "application/octet-stream":
                written.append(await _write(sandbox, _path(request.query.get("path")), request.content.iter_chunked(CHUNK_BYTES), user))
            else:
                async for part in await request.multipart():
                    if isinstance(part, BodyPartReader) and part.name == "file":
                        path = _path(request.query.get("path") or _filename(part))
                        written.append(await _write(sandbox, path, _chunks(part), user))
        except RpcError as error:
            raise _http(error) from None
        after_done(request)
        return web.json_response(written)


async def _chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    while data := await part.read_chunk(CHUNK_BYTES):
        yield data


async def _write(sandbox: Sandbox, path: str, content: AsyncIterator[bytes], user: User) -> Json:
    async with Operation(sandbox, {"verb": "write", "path": path}, user) as operation:
        assert operation.input is not None
        alive = True
        async for data in content:  # to its end, whatever becomes of it: or the client would not read the answer
            await sandbox.gate()
            alive = alive and await feed(operation.input, data)
        finish(operation.input)
        return await operation.answer()


def _filename(part: BodyPartReader) -> str:
    """As it was sent: aiohttp takes a leading slash away."""
    found = _FILENAME.search(part.headers.get("Content-Disposition", ""))
    return found[1].replace("%22", '"') if found else ""


def _path(path: str | None) -> str:
    return path or ""


def _http(error: RpcError) -> HttpError:
    if error.code == "no_space":
        return HttpError(507, "not enough disk space available")
    return HttpError(STATUS_OF_CODE.get(error.code, 500), error.message)


async def _ask(sandbox: Sandbox, request: Json, user: User) -> Json:
    async with Operation(sandbox, request, user) as operation:
        return await operation.answer()


def _call(verb: str) -> _Call:
    async def call(sandbox: Sandbox, body: Json, user: User) -> Json:
        return await _ask(sandbox, {"verb": verb, "path": body.get("path", ""), "depth": body.get("depth", 1)}, user)

    return call


async def _move(sandbox: Sandbox, body: Json, user: User) -> Json:
    request = {"verb": "move", "path": body.get("source", ""), "destination": body.get("destination", "")}
    return await _ask(sandbox, request, user)
