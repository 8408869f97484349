"""The Connect protocol with its JSON codec, which is the one that the SDK speaks: https://connectrpc.com/docs/protocol/"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from tests.support.e2b.problems import RpcError

Json = dict[str, Any]
UNARY = "application/json"
STREAMED = "application/connect+json"
_END = 2
_COMPRESSED = 1
_MAX_MESSAGE_BYTES = 64 << 20


class Stream(web.StreamResponse):
    """Its headers leave together with its first message."""

    _send_headers_immediately = False

    def __init__(self) -> None:
        super().__init__(headers={"Content-Type": STREAMED})


def frame(message: Json, flags: int = 0) -> bytes:
    """An enveloped message."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return struct.pack(">BI", flags, len(body)) + body


def end_frame(error: RpcError | None = None) -> bytes:
    """The last of a stream."""
    return frame({} if error is None else {"error": error.body}, _END)


def check(request: web.Request, content_type: str) -> None:
    """Raises HTTPUnsupportedMediaType for another codec."""
    if request.content_type != content_type:
        raise web.HTTPUnsupportedMediaType(headers={"Accept-Post": content_type})


async def frames(request: web.Request) -> AsyncIterator[Json]:
    """Of a client's stream, as they come."""
    while True:
        try:
            flags, size = struct.unpack(">BI", await request.content.readexactly(5))
            if flags & _COMPRESSED or size > _MAX_MESSAGE_BYTES:
                raise RpcError("invalid_argument", "compressed or too large message")
            body = await request.content.readexactly(size)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise RpcError("invalid_argument", "protocol error: incomplete envelope") from None
            return
        if flags & _END:
            return
        yield json.loads(body)


async def only_frame(request: web.Request) -> Json:
    """Of a request to a server's stream."""
    async for message in frames(request):
        return message
    raise RpcError("unimplemented", "unary request has zero messages")


def timeout_of(request: web.Request) -> float | None:
    """In seconds."""
    value = request.headers.get("Connect-Timeout-Ms", "")
    return int(value) / 1000 if value.isdecimal() and int(value) else None
