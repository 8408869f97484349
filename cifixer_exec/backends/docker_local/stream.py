"""A byte stream to the runner of a container: the hijacked connection of one exec, on a socket of our own event loop.

https://docs.docker.com/reference/api/engine/: "Attach to a container" has the hijacking and the 8-byte frames.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

from cifixer_exec.channel.transport import READ_BYTES, Transport

#: For connecting, making the exec and having it started.
DIAL_TIMEOUT_S = 15.0
#: How much is kept of what the bridge said on its standard error.
SAID_BYTES = 4096
MAX_ANSWER_BYTES = 64 * 1024
_HEADER_BYTES = 8
_STDOUT, _STDERR = 1, 2


@dataclass
class Link:
    """An open connection to a daemon."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def close(self) -> None:
        """At once; idempotent."""
        self.writer.close()


class Endpoint(Protocol):
    """Where a daemon listens."""

    async def open(self) -> Link:
        """A new connection. Raises OSError when nobody answers."""


@dataclass(frozen=True)
class UnixEndpoint:
    """A daemon at a Unix socket."""

    path: str

    async def open(self) -> Link:
        return Link(*await asyncio.open_unix_connection(self.path, limit=READ_BYTES))


@dataclass(frozen=True)
class TcpEndpoint:
    """A daemon at a TCP port, with TLS if there is a context."""

    host: str
    port: int
    context: ssl.SSLContext | None

    async def open(self) -> Link:
        return Link(*await asyncio.open_connection(self.host, self.port, ssl=self.context, limit=READ_BYTES))


class RefusedError(ConnectionError):
    """The daemon has answered, and not with a stream."""


class FrameSplitter:
    """Takes the daemon's frames apart, wherever the reads cut them."""

    def __init__(self) -> None:
        self._header = b""
        self._left = 0
        self._stream = 0
        self.said = b""

    @property
    def between_frames(self) -> bool:
        """False when a frame has begun and not ended."""
        return self._left == 0 and not self._header

    def feed(self, data: bytes) -> bytes:
        """The bytes of standard output in ``data``; the end of what came on standard error is kept in :attr:`said`.

        Raises:
            ConnectionError: these are no frames.
        """
        output: list[bytes] = []
        at = 0
        while at < len(data):
            if self._left == 0:
                taken = data[at : at + _HEADER_BYTES - len(self._header)]
                self._header += taken
                at += len(taken)
                if len(self._header) == _HEADER_BYTES:
                    self._begin(self._header)
                    self._header = b""
                continue
            piece = data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            if self._stream == _STDOUT:
                output.append(piece)
            else:
                self.said = (self.said + piece)[-SAID_BYTES:]
        return output[0] if len(output) == 1 else b"".join(output)

    def _begin(self, header: bytes) -> None:
        if header[0] not in (_STDOUT, _STDERR) or header[1:4] != b"\0\0\0":
            raise ConnectionError(f"the Docker daemon sent {header!r} where a frame should begin")
        self._stream, self._left = header[0], int.from_bytes(header[4:], "big")


class ExecTransport:
    """A transport over the hijacked connection of an exec."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._frames = FrameSplitter()
        self._answered = False

    async def receive(self) -> bytes:
        while data := await self._link.reader.read(READ_BYTES):
            if output := self._frames.feed(data):
                self._answered = True
                return output
        if not self._frames.between_frames:
            raise ConnectionError("the Docker daemon closed the connection within a frame")
        if not self._answered and self._frames.said:
            raise ConnectionError(self._frames.said.decode("utf-8", "replace").strip())
        return b""

    def send(self, data: bytes) -> None:
        self._link.writer.write(data)

    async def drain(self) -> None:
        await self._link.writer.drain()

    def close(self) -> None:
        """The bridge sees the end of its input, and ends."""
        self._link.close()


async def dial_exec(endpoint: Endpoint, *, api_version: str, container: str, user: str, command: Sequence[str]) -> Transport:
    """Run ``command`` in a container, joined to the returned transport.

    Raises:
        OSError: the daemon or the container does not let it.
    """
    async with asyncio.timeout(DIAL_TIMEOUT_S):
        link = await endpoint.open()
        try:
            base = f"/v{api_version}"
            wanted = {"AttachStdin": True, "AttachStdout": True, "AttachStderr": True, "Tty": False, "User": user, "Cmd": list(command)}
            made = await _post(link, f"{base}/containers/{quote(container, safe='')}/exec", wanted, {}, (201,))
            upgrade = {"Connection": "Upgrade", "Upgrade": "tcp"}
            await _post(link, f"{base}/exec/{quote(str(made['Id']), safe='')}/start", {"Detach": False, "Tty": False}, upgrade, (101, 200))
        except (LookupError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            link.close()
            raise ConnectionError(f"the Docker daemon's answer cannot be understood: {error!r}") from None
        except BaseException:
            link.close()
            raise
        return ExecTransport(link)


async def _post(link: Link, path: str, document: object, headers: Mapping[str, str], wanted: tuple[int, ...]) -> dict[str, Any]:
    """One request on a connection that goes on; the body of the answer, which an upgraded connection has none of."""
    body = json.dumps(document).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: docker", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    link.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await link.writer.drain()
    status, answer = await _head(link.reader)
    if status in wanted and headers:
        return {}
    content = await _content(link.reader, answer)
    data = json.loads(content) if content else {}
    if status not in wanted:
        raise RefusedError(f"the Docker daemon refused the channel ({status}): {data.get('message', '')}")
    return dict(data)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in head[1:] if line)
    return int(head[0].split()[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _content(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(min(int(headers.get("content-length", "0")), MAX_ANSWER_BYTES))
    content = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        if len(content) + size > MAX_ANSWER_BYTES:
            raise ValueError("it is too long")
        content += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    return content
