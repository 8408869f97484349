"""GET pods/exec as a WebSocket. The protocol: https://kubernetes.io/docs/reference/using-api/api-concepts/ and KEP-4006."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from aiohttp import WSMsgType, web

from tests.support.kubernetes.runtime import LaunchError, Process, Runtime

Json = dict[str, Any]
_STDIN, _STDOUT, _STDERR, _STATUS, _CLOSE = 0, 1, 2, 3, 255
_CHUNK_BYTES = 32 << 10
_MAX_MESSAGE_BYTES = 32 << 20
_SUCCESS: Json = {"metadata": {}, "status": "Success"}


def failure(message: str) -> Json:
    """A status frame for what is not the command's own exit."""
    words = f"Internal error occurred: {message}"
    causes = {"causes": [{"message": message}]}
    return {"metadata": {}, "status": "Failure", "message": words, "reason": "InternalError", "details": causes, "code": 500}


def ended(code: int) -> Json:
    """A status frame for an exit code."""
    if code == 0:
        return _SUCCESS
    words = f"command terminated with non-zero exit code: command terminated with exit code {code}"
    causes = {"causes": [{"reason": "ExitCode", "message": str(code)}]}
    return {"metadata": {}, "status": "Failure", "message": words, "reason": "NonZeroExitCode", "details": causes}


class ExecStream:
    """One socket and one process. ``gate`` is waited for before each frame in either direction (a frozen server); ``cut`` cuts."""

    def __init__(
        self, socket: web.WebSocketResponse, wanted: dict[str, bool], gate: Callable[[], Awaitable[None]], cut: Callable[[], None]
    ) -> None:
        self.socket = socket
        self._cut = cut
        self._half_close = socket.ws_protocol == "v5.channel.k8s.io"
        self._wanted = wanted
        self._gate = gate
        self._stdin: asyncio.StreamWriter | None = None
        self._outputs: list[asyncio.ReadTransport] = []
        self.frames_in = 0
        #: The socket is cut right after so many stdin frames have been taken; 0: never.
        self.cut_after_frames = 0

    async def connected(self) -> None:
        """The empty frame that tells it."""
        first = next((c for c, name in ((_STDOUT, "stdout"), (_STDERR, "stderr")) if self._wanted[name]), _STATUS)
        await self.socket.send_bytes(bytes([first]))

    async def run(self, runtime: Runtime, container: Process, command: list[str]) -> None:
        """Until the process and everybody who has its output has ended, or the socket has."""
        outputs = [c for c, name in ((_STDOUT, "stdout"), (_STDERR, "stderr")) if self._wanted[name]]
        try:
            process, readers = await self._start(runtime, container, command, outputs)
        except LaunchError as error:
            await self.finish(failure(_words(error)))
            return
        listening = asyncio.create_task(self._listen())
        copying = asyncio.gather(*(self._copy(channel, reader) for channel, reader in readers.items()))
        over = asyncio.ensure_future(self._over(process, copying))
        try:
            await asyncio.wait({listening, over}, return_when=asyncio.FIRST_COMPLETED)
            if over.done() and over.exception() is None:
                await self.finish(ended(process.exit_code))
        finally:
            self._close_stdin()
            listening.cancel()
            for task in (over, copying):
                task.cancel()
            with suppress(asyncio.CancelledError, ConnectionError, RuntimeError):
                await copying
            self._abandon(process)

    async def _over(self, process: Process, copying: asyncio.Future[list[None]]) -> None:
        await asyncio.shield(process.status)
        await copying

    def _abandon(self, process: Process) -> None:
        """Nobody reads on, and the process goes on: it blocks when its pipes are full. They are closed at its end."""

        def close(_: object = None) -> None:
            for transport in self._outputs:
                transport.close()

        if process.status.done():
            close()
        else:
            for transport in self._outputs:
                transport.pause_reading()
            process.status.add_done_callback(close)

    async def finish(self, status: Json) -> None:
        """The status frame, and a close."""
        await self._gate()
        with suppress(ConnectionError):
            await self.socket.send_bytes(bytes([_STATUS]) + json.dumps(status, separators=(",", ":")).encode())
            await self.socket.close()

    async def _start(
        self, runtime: Runtime, container: Process, command: list[str], outputs: list[int]
    ) -> tuple[Process, dict[int, asyncio.StreamReader]]:
        theirs: list[int] = []
        ours: dict[int, int] = {}
        for channel in (_STDIN, _STDOUT, _STDERR):
            if channel == _STDIN and self._wanted["stdin"]:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                theirs, ours[channel] = [*theirs, reader], writer
            elif channel in outputs:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                theirs, ours[channel] = [*theirs, writer], reader
            else:
                theirs.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        try:
            process = await runtime.execute(container, command, theirs)
        except BaseException:
            for descriptor in ours.values():
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        if _STDIN in ours:
            self._stdin = await self._writer(ours[_STDIN])
        return process, {channel: await self._reader(ours[channel]) for channel in outputs}

    async def _writer(self, descriptor: int) -> asyncio.StreamWriter:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(descriptor, "wb", 0))
        return asyncio.StreamWriter(transport, protocol, None, loop)

    async def _reader(self, descriptor: int) -> asyncio.StreamReader:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_CHUNK_BYTES)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0))
        self._outputs.append(transport)
        return reader

    async def _copy(self, channel: int, reader: asyncio.StreamReader) -> None:
        """At the end of an output containerd stops to copy the input, though the process may still read it."""
        while data := await reader.read(_CHUNK_BYTES):
            await self._gate()
            await self.socket.send_bytes(bytes([channel]) + data)
        self._close_stdin()

    async def _listen(self) -> None:
        async for message in self.socket:
            await self._gate()
            if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT):
                continue
            data = message.data if isinstance(message.data, bytes) else message.data.encode()
            if not data:
                continue
            if data[0] == _CLOSE and self._half_close:
                if len(data) != 2 or data[1] > 4:
                    return
                if data[1] == _STDIN:
                    self._close_stdin()
            elif data[0] == _STDIN:
                await self._feed(data[1:])
                if self._cuts():
                    return

    def _cuts(self) -> bool:
        self.frames_in += 1
        if self.cut_after_frames and self.frames_in >= self.cut_after_frames:
            self._cut()
            return True
        return False

    async def _feed(self, data: bytes) -> None:
        """What the process does not read holds the whole connection up."""
        if self._stdin is None:
            return
        try:
            self._stdin.write(data)
            await self._stdin.drain()
        except (ConnectionError, RuntimeError):
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin is not None:
            self._stdin.close()
            self._stdin = None


def _words(error: LaunchError) -> str:
    if error.reason == "stopped":
        return "error executing command in container: container is in CONTAINER_EXITED state"
    words = "error executing command in container: failed to exec in container: failed to start exec: OCI runtime exec failed: "
    return f"{words}exec failed: unable to start container process: {error}"


def new_socket(protocols: tuple[str, ...]) -> web.WebSocketResponse:
    """Compression and pings of its own it has none, as the real one."""
    return web.WebSocketResponse(protocols=protocols, compress=False, max_msg_size=_MAX_MESSAGE_BYTES, autoping=True)
