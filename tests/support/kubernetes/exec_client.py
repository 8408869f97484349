"""A plain client of exec by WebSocket: nothing is retried, everything is told."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import aiohttp

from tests.support.kubernetes.stand_in import StandIn

V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"
_STDIN_BYTES = 256 << 10
_TLS_END_S = 0.1
_END_OF_STDIN = b"\xff\x00"


@dataclass
class Done:
    """``status`` None: none came. ``first`` is the first frame."""

    protocol: str | None = None
    first: bytes = b""
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    status: dict[str, Any] | None = None
    close_code: int | None = None

    @property
    def exit_code(self) -> int:
        """By the status frame; -1 where there is none in it."""
        if self.status is None:
            return -1
        if self.status["status"] == "Success":
            return 0
        causes = {c.get("reason"): c["message"] for c in self.status["details"]["causes"]}
        return int(causes.get("ExitCode", -1))

    def take(self, message: bytes) -> None:
        """One frame."""
        self.first = self.first or message
        if message[0] == 3:
            self.status = json.loads(message[1:])
        else:
            (self.stdout if message[0] == 1 else self.stderr).extend(message[1:])


@asynccontextmanager
async def exec_socket(
    cluster: StandIn,
    token: str,
    pod: tuple[str, str],
    command: list[str],
    *,
    protocols: tuple[str, ...] = (V5, V4),
    container: str = "sandbox",
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """``pod`` is (namespace, name). Raises aiohttp.WSServerHandshakeError."""
    query = [("container", container), ("stdin", "true"), ("stdout", "true"), ("stderr", "true"), *(("command", c) for c in command)]
    url = f"{cluster.url}/api/v1/namespaces/{pod[0]}/pods/{pod[1]}/exec?{urlencode(query)}"
    context = ssl.create_default_context(cafile=str(cluster.directory / "ca.pem")) if cluster.tls else True
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with (
            aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=context)) as session,
            session.ws_connect(url, protocols=protocols, compress=0, max_msg_size=0) as socket,
        ):
            yield socket
    finally:
        # https://docs.aiohttp.org/en/stable/client_advanced.html#graceful-shutdown
        await asyncio.sleep(_TLS_END_S if cluster.tls else 0)


async def drained(socket: aiohttp.ClientWebSocketResponse) -> Done:
    """All that comes until the socket ends."""
    done = Done(protocol=socket.protocol)
    while (message := await socket.receive()).type == aiohttp.WSMsgType.BINARY:
        done.take(message.data)
    done.close_code = message.data if message.type == aiohttp.WSMsgType.CLOSE else 1006
    return done


def execute(
    cluster: StandIn,
    token: str,
    pod: tuple[str, str],
    command: list[str],
    *,
    stdin: bytes = b"",
    half_close: bool = True,
    protocols: tuple[str, ...] = (V5, V4),
    container: str = "sandbox",
    timeout_s: float = 20.0,
) -> Done:
    """One exec from its beginning to its end. Raises aiohttp.WSServerHandshakeError, TimeoutError."""

    async def feed(socket: aiohttp.ClientWebSocketResponse) -> None:
        for start in range(0, len(stdin), _STDIN_BYTES):
            await socket.send_bytes(b"\x00" + stdin[start : start + _STDIN_BYTES])
        if half_close and socket.protocol == V5:
            await socket.send_bytes(_END_OF_STDIN)

    async def run() -> Done:
        async with exec_socket(cluster, token, pod, command, protocols=protocols, container=container) as socket:
            feeding = asyncio.create_task(feed(socket))
            try:
                return await asyncio.wait_for(drained(socket), timeout_s)
            finally:
                feeding.cancel()

    return asyncio.run(run())
