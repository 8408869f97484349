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

from cifixer_exec.channel.transport import SocketTransport, Transport, dial_unix

#: For connecting, making the exec and having it started.
DIAL_TIMEOUT_S = 15.0
#: How much is kept of what the bridge said on its standard error.
SAID_BYTES = 4096
MAX_ANSWER_BYTES = 64 * 1024
_HEADER_BYTES = 8
_STDOUT, _STDERR = 1, 2


class Endpoint(Protocol):
    """Where a daemon listens."""

    async def open(self) -> Transport:
        """A new connection. Raises OSError when nobody answers."""


@dataclass(frozen=True)
class UnixEndpoint:
    """A daemon at a Unix socket."""

    path: str

    async def open(self) -> Transport:
        return await dial_unix(self.path)


@dataclass(frozen=True)
class TcpEndpoint:
    """A daemon at a TCP port, with TLS if there is a context."""

    host: str
    port: int
    context: ssl.SSLContext | None

    async def open(self) -> Transport:
        loop = asyncio.get_running_loop()
        _, transport = await loop.create_connection(SocketTransport, self.host, self.port, ssl=self.context)
        return transport


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
        output: list[memoryview] = []
        view, at, end = memoryview(data), 0, len(data)
        while at < end:
            if self._left == 0:
                taken = data[at : at + _HEADER_BYTES - len(self._header)]
                self._header += taken
                at += len(taken)
                if len(self._header) == _HEADER_BYTES:
                    self._begin(self._header)
                    self._header = b""
                continue
            piece = view[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            if self._stream == _STDOUT:
                output.append(piece)
            else:
                self.said = (self.said + piece)[-SAID_BYTES:]
        return b"".join(output)

    def _begin(self, header: bytes) -> None:
        if header[0] not in (_STDOUT, _STDERR) or header[1:4] != b"\0\0\0":
            raise ConnectionError(f"the Docker daemon sent {header!r} where a frame should begin")
        self._stream, self._left = header[0], int.from_bytes(header[4:], "big")


class Answers:
    """HTTP answers on a connection that goes on as something else."""

    def __init__(self, connection: Transport) -> None:
        self._connection = connection
        #: What was received and not taken yet.
        self.rest = b""

    async def next(self, wanted: tuple[int, ...], *, upgrade: bool) -> dict[str, Any]:
        """The body of the next answer, which an upgraded connection has none of.

        Raises:
            RefusedError: the daemon's own words. ValueError, LookupError, EOFError: this is no such answer.
        """
        head = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(head[0].split()[1])
        if upgrade and status in wanted:
            return {}
        pairs = (line.partition(":") for line in head[1:] if line)
        content = await self._content({name.strip().lower(): value.strip() for name, _, value in pairs})
        data = json.loads(content) if content else {}
        if not isinstance(data, dict):
            raise ConnectionError("the Docker daemon's answer is no JSON object")
        if status not in wanted:
            raise RefusedError(f"the Docker daemon refused the channel ({status}): {data.get('message', '')}")
        return data

    async def _content(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await self._exactly(min(int(headers.get("content-length", "0")), MAX_ANSWER_BYTES))
        content = b""
        while size := int((await self._until(b"\r\n")).split(b";")[0], 16):
            if len(content) + size > MAX_ANSWER_BYTES:
                raise ValueError("it is too long")
            content += (await self._exactly(size + 2))[:-2]
        await self._until(b"\r\n")
        return content

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self.rest:
            await self._more()
        taken, _, self.rest = self.rest.partition(mark)
        return taken

    async def _exactly(self, size: int) -> bytes:
        while len(self.rest) < size:
            await self._more()
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    async def _more(self) -> None:
        data = await self._connection.receive()
        if not data:
            raise EOFError("it ended within an answer")
        self.rest += data
        if len(self.rest) > 2 * MAX_ANSWER_BYTES:
            raise ValueError("it is too long")


class ExecTransport:
    """A transport over the hijacked connection of an exec. ``rest``: what of it was received already."""

    def __init__(self, connection: Transport, rest: bytes) -> None:
        self._connection = connection
        self._rest = rest
        self._frames = FrameSplitter()
        self._answered = False

    async def receive(self) -> bytes:
        while data := await self._next():
            if output := self._frames.feed(data):
                self._answered = True
                return output
        if not self._frames.between_frames:
            raise ConnectionError("the Docker daemon closed the connection within a frame")
        if not self._answered and self._frames.said:
            raise ConnectionError(self._frames.said.decode("utf-8", "replace").strip())
        return b""

    async def _next(self) -> bytes:
        rest, self._rest = self._rest, b""
        return rest or await self._connection.receive()

    def send(self, data: bytes) -> None:
        self._connection.send(data)

    async def drain(self) -> None:
        await self._connection.drain()

    def close(self) -> None:
        """The bridge sees the end of its input, and ends."""
        self._connection.close()


async def dial_exec(
    endpoint: Endpoint, *, api_version: str, container: str, user: str, command: Sequence[str], without: Sequence[str] = ()
) -> Transport:
    """Run ``command`` in a container, joined to the returned transport. ``without``: variables of the container that it does not get.

    Raises:
        OSError: the daemon or the container does not let it.
    """
    async with asyncio.timeout(DIAL_TIMEOUT_S):
        connection = await endpoint.open()
        answers = Answers(connection)
        try:
            base = f"/v{api_version}"
            wanted = {"AttachStdin": True, "AttachStdout": True, "AttachStderr": True, "Tty": False, "User": user, "Cmd": list(command)}
            wanted |= {"Env": [f"{name}=" for name in without]} if without else {}
            await _post(connection, f"{base}/containers/{quote(container, safe='')}/exec", wanted, {})
            made = await answers.next((201,), upgrade=False)
            upgrade = {"Connection": "Upgrade", "Upgrade": "tcp"}
            await _post(connection, f"{base}/exec/{quote(str(made['Id']), safe='')}/start", {"Detach": False, "Tty": False}, upgrade)
            await answers.next((101, 200), upgrade=True)
        except (LookupError, ValueError, EOFError) as error:
            connection.close()
            raise ConnectionError(f"the Docker daemon's answer cannot be understood: {error!r}") from None
        except BaseException:
            connection.close()
            raise
        return ExecTransport(connection, answers.rest)


async def _post(connection: Transport, path: str, document: object, headers: Mapping[str, str]) -> None:
    """One request on a connection that goes on."""
    body = json.dumps(document).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: docker", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    connection.send("\r\n".join([*lines, "", ""]).encode() + body)
    await connection.drain()
