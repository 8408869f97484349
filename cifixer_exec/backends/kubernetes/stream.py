"""One exec over a WebSocket: the channel to a runner, and the upload of the runner itself.

Binary messages whose first byte is a channel: 0 stdin, 1 stdout, 2 stderr, 3 the status; 255 closes the channel that the second byte names,
and only v5 knows it (https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/4006-transition-spdy-to-websockets).
An exec has succeeded only if its status says so: without one the connection was lost, whatever came before.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

import aiohttp

from cifixer_exec.backends.kubernetes.cluster import Cluster, path_in
from cifixer_exec.backends.kubernetes.refusals import RefusedError
from cifixer_exec.backends.outgoing import Outgoing
from cifixer_exec.backends.threads import asking
from cifixer_exec.errors import BackendUnavailableError

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
DIAL_TIMEOUT_S = 10.0
#: Bigger messages have been refused on the way (https://github.com/UKGovernmentBEIS/inspect_k8s_sandbox).
_MOST_MESSAGE_BYTES = 256 * 1024
#: What of its stderr is kept.
_MOST_SAID_BYTES = 4096
_STDIN, _STDOUT, _STDERR, _STATUS, _CLOSE = 0, 1, 2, 3, 255
_STDIN_BYTE = bytes([_STDIN])


@dataclass(frozen=True, kw_only=True)
class ExecStatus:
    """How an exec ended. ``exit_code`` None: it did not run, and ``message`` says why."""

    exit_code: int | None
    message: str = ""

    @classmethod
    def parse(cls, payload: bytes) -> ExecStatus:
        """From a Status object; what cannot be read is no success."""
        try:
            status = json.loads(payload)
            causes = (status.get("details") or {}).get("causes") or []
            code = next((int(c["message"]) for c in causes if c.get("reason") == "ExitCode"), None)
            if status.get("status") == "Success":
                return cls(exit_code=0)
            return cls(exit_code=code, message=str(status.get("message") or status.get("reason") or ""))
        except (ValueError, TypeError, AttributeError, KeyError):
            return cls(exit_code=None, message=f"the status {payload[:100]!r} cannot be read")


class ExecEndedError(ConnectionError):
    """The exec has ended, or never began, and the API server said so: it is there, whatever has become of the container."""


class ExecTransport:
    """A transport over the standard input and output of an exec."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        connection = socket._response.connection
        #: Kept, because aiohttp forgets it when the server closes, and leaves a TLS connection open behind the end of the loop.
        self._wire = connection.transport if connection is not None else None
        self._outgoing = Outgoing(self._write, most_bytes=_MOST_MESSAGE_BYTES, failures=(OSError, aiohttp.ClientError))
        self._said = b""
        self._rest = b""
        #: Told by the server before the end.
        self.status: ExecStatus | None = None

    @property
    def half_close(self) -> bool:
        """Whether the end of standard input can be told."""
        return self._socket.protocol == PROTOCOLS[0]

    @property
    def said(self) -> str:
        """The end of its stderr."""
        return self._said.decode("utf-8", "replace").strip()

    async def read_line(self) -> str:
        """The next line of its output, without its end. Raises ConnectionError when there is none."""
        while b"\n" not in self._rest and len(self._rest) < _MOST_SAID_BYTES:
            kept, self._rest = self._rest, b""
            if not (data := await self.receive()):
                raise ConnectionError("it ended before a line")
            self._rest = kept + data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace").strip()

    async def receive(self) -> bytes:
        if self._rest:
            rest, self._rest = self._rest, b""
            return rest
        while True:
            try:
                message = await self._socket.receive()
            except asyncio.CancelledError:  # nobody will read on: the loop ends, and aiohttp would complain of what was left open
                self.close()
                raise
            if message.type is not aiohttp.WSMsgType.BINARY:
                return self._end(message)
            payload: bytes = message.data
            channel = payload[0] if payload else _CLOSE
            if channel == _STDOUT and len(payload) > 1:
                return payload[1:]
            if channel == _STDERR:
                self._said = (self._said + payload[1:])[-_MOST_SAID_BYTES:]
            elif channel == _STATUS:
                self.status = ExecStatus.parse(payload[1:])

    def _end(self, message: aiohttp.WSMessage) -> bytes:
        """Every connection that ends is one to come back to, but one that was not told of is worth a word."""
        if message.type is aiohttp.WSMsgType.ERROR:
            raise ConnectionError(f"the connection to the Kubernetes API broke: {message.data}")
        if self.status is None:
            raise ConnectionError("the connection to the Kubernetes API ended without a status")
        if self.status.exit_code != 0:
            raise ExecEndedError(self.said or self.status.message or f"it ended with exit code {self.status.exit_code}")
        return b""

    def send(self, data: bytes) -> None:
        if self._outgoing.broken is None and not self._socket.closed:
            self._outgoing.add(data)

    async def drain(self) -> None:
        await self._outgoing.emptied()
        if self._outgoing.broken is not None or self._socket.closed:
            raise ConnectionResetError("the connection was lost") from self._outgoing.broken

    async def send_eof(self) -> None:
        """End standard input, where the protocol can. Raises OSError when the connection broke."""
        await self.drain()
        if self.half_close:
            await self._socket.send_bytes(bytes([_CLOSE, _STDIN]))

    def close(self) -> None:
        """The program sees the end of its input."""
        self._outgoing.drop()
        if self._outgoing.writer is not None:
            self._outgoing.writer.cancel()
        # Its own close() waits for the server, and the loop may be about to end.
        if self._wire is not None:
            self._wire.abort()
        self._socket._response.close()

    async def _write(self, parts: list[memoryview]) -> None:
        await self._socket.send_bytes(b"".join((_STDIN_BYTE, *parts)))


async def exec_in(cluster: Cluster, *, pod: str, container: str, command: Sequence[str]) -> ExecTransport:
    """Start ``command`` in a container, joined to what is returned.

    Raises:
        RefusedError: the API server does not let it, or the Pod is not there.
        OSError: no connection.
        BackendUnavailableError: there are no credentials.
    """
    credentials = await asking(lambda: cluster.credentials)
    headers = await asking(credentials.headers)
    # Without standard input some runtimes end an exec at once (https://github.com/kata-containers/kata-containers/issues/13640).
    query = [("container", container), ("stdin", "true"), ("stdout", "true"), ("stderr", "true"), *(("command", a) for a in command)]
    path = path_in(credentials.namespace, "pods", pod, "exec")
    session = aiohttp.ClientSession(auto_decompress=False)
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            socket = await session.ws_connect(
                f"{credentials.host}{path}?{urlencode(query)}",
                protocols=PROTOCOLS,
                headers=headers,
                ssl=credentials.ssl_context or True,
                server_hostname=credentials.configuration.tls_server_name or None,
                proxy=credentials.proxy,
                proxy_headers=credentials.configuration.proxy_headers,
                max_msg_size=0,
                compress=0,
            )
    except aiohttp.WSServerHandshakeError as error:
        await session.close()
        raise RefusedError(error.status, {"message": f"the exec was refused with status {error.status}"}) from None  # its words are lost
    except aiohttp.ClientError as error:
        await session.close()
        raise ConnectionError(str(error)) from None
    except BaseException:
        await session.close()
        raise
    if socket.protocol not in PROTOCOLS:
        await session.close()
        raise BackendUnavailableError(
            f"the API server offers neither {' nor '.join(PROTOCOLS)} for an exec, or a proxy on the way takes it out"
        )
    session.detach()  # it has done its part, and would want to be closed on the loop
    return ExecTransport(socket)
