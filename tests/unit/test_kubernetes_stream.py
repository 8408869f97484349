"""An exec over a WebSocket, against a real WebSocket server that does what API servers do, and what they should not do."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiohttp import WSMessage, WSMsgType, web

from cifixer_exec.backends.kubernetes import stream
from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.credentials import Address
from cifixer_exec.backends.kubernetes.refusals import RefusedError
from cifixer_exec.backends.kubernetes.stream import ExecTransport, exec_in
from cifixer_exec.errors import BackendUnavailableError
from tests.support.exec_server import SUCCESS, V4, V5, Server, Talk, cut, failure, non_zero, serving
from tests.support.kubeconfigs import kubeconfig

T = TypeVar("T")
MIB = 1 << 20


def talking(
    tmp_path: Path, talk: Talk, client: Callable[[ExecTransport, Server], Awaitable[T]], protocols: tuple[str, ...] = (V5, V4)
) -> T:
    """What ``client`` makes of an exec whose other side is ``talk``."""

    async def go() -> T:
        server = Server(talk, protocols)
        async with serving(server.handle) as url:
            transport = await dial(tmp_path, url)
            try:
                async with asyncio.timeout(30):
                    return await client(transport, server)
            finally:
                transport.close()

    return asyncio.run(go())


async def dial(tmp_path: Path, url: str, command: list[str] | None = None) -> ExecTransport:
    cluster = Cluster(Address(kubeconfig=kubeconfig(tmp_path / "kubeconfig", url)))
    return await exec_in(cluster, pod="the-pod", container="sandbox", command=command or ["cat"])


async def everything(transport: ExecTransport, _server: Server) -> bytes:
    received = b""
    while data := await transport.receive():
        received += data
    return received


async def status_frame(ws: web.WebSocketResponse, status: dict[str, Any]) -> None:
    await ws.send_bytes(b"\x03" + json.dumps(status).encode())


async def says_hello(ws: web.WebSocketResponse) -> None:
    await ws.send_bytes(b"\x01hel")
    await ws.send_bytes(b"\x02an error\n")
    await ws.send_bytes(b"\x01lo")
    await status_frame(ws, SUCCESS)


@pytest.mark.parametrize("protocols", [(V5, V4), (V4,), ("v4.channel.k8s.io", "channel.k8s.io")], ids=["v5", "v4", "older"])
def test_output_comes_whole_under_each_protocol(tmp_path: Path, protocols: tuple[str, ...]) -> None:
    assert talking(tmp_path, says_hello, everything, protocols) == b"hello"


def test_the_request_is_what_an_api_server_wants(tmp_path: Path) -> None:
    async def go() -> web.Request:
        server = Server(says_hello)
        async with serving(server.handle) as url:
            transport = await dial(tmp_path, url, ["/bin/sh", "-c", "echo a&b=c +%20"])
            await everything(transport, server)
            transport.close()
        return server.requests[0]

    request = asyncio.run(go())
    assert request.method == "GET"
    assert request.path == "/api/v1/namespaces/ns/pods/the-pod/exec"
    assert request.headers["Authorization"] == "Bearer a-token"
    assert [p.strip() for p in request.headers["Sec-WebSocket-Protocol"].split(",")] == [V5, V4]
    assert request.query.getall("command") == ["/bin/sh", "-c", "echo a&b=c +%20"]
    assert {name: request.query.get(name) for name in ("container", "stdin", "stdout", "stderr", "tty")} == {
        "container": "sandbox",
        "stdin": "true",
        "stdout": "true",
        "stderr": "true",
        "tty": None,
    }


def test_what_is_on_channels_that_we_do_not_know_is_passed_over(tmp_path: Path) -> None:
    async def talk(ws: web.WebSocketResponse) -> None:
        for message in (b"", b"\x01", b"\x09what", b"\xff\x01", b"\x01x"):
            await ws.send_bytes(message)
        await status_frame(ws, SUCCESS)

    assert talking(tmp_path, talk, everything) == b"x"


async def cut_within(ws: web.WebSocketResponse) -> None:
    await ws.send_bytes(b"\x01out")
    cut(ws)


async def closed_without_status(ws: web.WebSocketResponse) -> None:
    await ws.send_bytes(b"\x01out")


async def text(ws: web.WebSocketResponse) -> None:
    await ws.send_str("0aGVsbG8=")


def ending(status: dict[str, Any], said: bytes = b"") -> Talk:
    async def talk(ws: web.WebSocketResponse) -> None:
        await ws.send_bytes(b"\x02" + said)
        await status_frame(ws, status)

    return talk


ENDS: dict[str, tuple[Talk, str]] = {
    "closed without a status": (closed_without_status, "ended without a status"),
    "cut": (cut_within, "ended without a status|broke"),
    "a text": (text, "ended without a status"),
    "it failed and said why": (ending(non_zero(1), b"no socket\n"), "^no socket$"),
    "it failed without a word": (ending(non_zero(7)), "exit status 7"),
    "it did not run": (ending(failure(reason="InternalError", message="OCI runtime exec failed")), "OCI runtime exec failed"),
    "a status that is none": (ending({"status": ["?"]}), "exit code None"),
}


@pytest.mark.parametrize("how", ENDS)
def test_every_other_end_than_success_is_an_os_error_that_says_it(tmp_path: Path, how: str) -> None:
    talk, said = ENDS[how]
    with pytest.raises(ConnectionError, match=said):
        talking(tmp_path, talk, everything)


def test_only_the_end_of_what_was_said_is_kept(tmp_path: Path) -> None:
    async def client(transport: ExecTransport, server: Server) -> str:
        with pytest.raises(ConnectionError):
            await everything(transport, server)
        return transport.said

    async def talk(ws: web.WebSocketResponse) -> None:
        for _ in range(100):
            await ws.send_bytes(b"\x02" + b"x" * 1000)
        await ending(non_zero(1), b"the end")(ws)

    said = talking(tmp_path, talk, client)
    assert len(said) <= 4096
    assert said.endswith("the end")


class Sink:
    """Takes standard input; remembers the messages."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.reading = asyncio.Event()

    @property
    def stdin(self) -> bytes:
        return b"".join(m[1:] for m in self.messages if m[0] == 0)

    async def talk(self, ws: web.WebSocketResponse) -> None:
        await self.reading.wait()
        while (message := await self._next(ws)).type is WSMsgType.BINARY and message.data != b"\xff\x00":
            self.messages.append(message.data)
            if self.messages[-1].endswith(b"stop"):
                break
        else:
            if message.type is WSMsgType.BINARY:
                self.messages.append(message.data)
        await status_frame(ws, SUCCESS)

    async def _next(self, ws: web.WebSocketResponse) -> WSMessage:
        return await ws.receive()


def test_much_is_sent_in_pieces_that_proxies_take_and_whole(tmp_path: Path) -> None:
    sink, data = Sink(), os.urandom(3 * MIB + 17) + b"stop"

    async def client(transport: ExecTransport, server: Server) -> None:
        sink.reading.set()
        transport.send(data)
        await transport.drain()
        await everything(transport, server)

    talking(tmp_path, sink.talk, client)
    assert sink.stdin == data
    assert max(len(m) for m in sink.messages) <= 256 * 1024 + 1


def test_many_small_ones_go_together_and_in_order(tmp_path: Path) -> None:
    sink = Sink()

    async def client(transport: ExecTransport, server: Server) -> None:
        sink.reading.set()
        for number in range(2000):
            transport.send(f"{number},".encode())
        transport.send(b"stop")
        await transport.drain()
        await everything(transport, server)

    talking(tmp_path, sink.talk, client)
    assert sink.stdin == b"".join(f"{n},".encode() for n in range(2000)) + b"stop"
    assert len(sink.messages) < 20


@pytest.mark.parametrize(("protocols", "can"), [((V5, V4), True), ((V4,), False)], ids=["v5", "v4"])
def test_the_end_of_input_is_told_where_the_protocol_can(tmp_path: Path, protocols: tuple[str, ...], can: bool) -> None:
    sink = Sink()

    async def client(transport: ExecTransport, server: Server) -> None:
        assert transport.half_close is can
        sink.reading.set()
        transport.send(b"data")
        await transport.send_eof()
        if not can:
            transport.send(b"stop")
        await everything(transport, server)

    talking(tmp_path, sink.talk, client, protocols)
    assert sink.stdin == (b"data" if can else b"datastop")
    assert (b"\xff\x00" in sink.messages) is can


def test_a_server_that_takes_nothing_keeps_drain_waiting_and_close_ends_that(tmp_path: Path) -> None:
    sink = Sink()

    async def client(transport: ExecTransport, _server: Server) -> bool:
        transport.send(bytes(32 * MIB))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(transport.drain(), 0.3)
        draining = asyncio.ensure_future(transport.drain())
        await asyncio.sleep(0)
        transport.close()
        transport.close()
        await asyncio.wait_for(asyncio.wait([draining]), 5)
        sink.reading.set()
        return draining.done()

    assert talking(tmp_path, sink.talk, client)


def test_sending_into_a_connection_that_broke_is_told_by_drain(tmp_path: Path) -> None:
    async def talk(ws: web.WebSocketResponse) -> None:
        cut(ws)

    async def send_on(transport: ExecTransport) -> None:
        while True:
            transport.send(bytes(MIB))
            await transport.drain()

    async def client(transport: ExecTransport, _server: Server) -> None:
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(send_on(transport), 10)

    talking(tmp_path, talk, client)


def test_sending_behind_the_end_is_told_by_drain_too(tmp_path: Path) -> None:
    """Else who sends and drains in turn would do so for ever."""

    async def client(transport: ExecTransport, server: Server) -> None:
        with pytest.raises(ConnectionError):
            await everything(transport, server)
        transport.send(b"more")
        with pytest.raises(ConnectionError):
            await transport.drain()

    talking(tmp_path, closed_without_status, client)


def test_a_flood_waits_at_the_server_while_nobody_reads(tmp_path: Path) -> None:
    """What is held here stays small, however fast it comes."""
    sent: list[int] = []

    async def talk(ws: web.WebSocketResponse) -> None:
        chunk = b"\x01" + bytes(256 * 1024)
        while sum(sent) < 400 * MIB:
            await ws.send_bytes(chunk)
            sent.append(len(chunk))

    async def client(transport: ExecTransport, _server: Server) -> int:
        await asyncio.sleep(0.5)
        held = sum(sent)
        for _ in range(200):
            await transport.receive()
        return held

    held = talking(tmp_path, talk, client)
    assert 0 < held < 32 * MIB  # most of it in the sockets' buffers
    assert sum(sent) >= 30 * MIB  # and then it went on


async def read_on(transport: ExecTransport) -> None:
    while True:
        await transport.receive()


def test_who_reads_a_flood_still_meets_his_deadline(tmp_path: Path) -> None:
    async def talk(ws: web.WebSocketResponse) -> None:
        while not ws.closed:
            await ws.send_bytes(b"\x01" + bytes(64 * 1024))

    async def client(transport: ExecTransport, server: Server) -> float:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read_on(transport), 0.5)
        return asyncio.get_running_loop().time() - begun

    assert talking(tmp_path, talk, client) < 2


def test_a_handshake_that_nobody_answers_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "DIAL_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:

        async def go() -> float:
            begun = asyncio.get_running_loop().time()
            with pytest.raises(TimeoutError):
                await dial(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
            return asyncio.get_running_loop().time() - begun

        assert asyncio.run(go()) < 3


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_refused_exec_is_an_answer_with_its_status(tmp_path: Path, status: int) -> None:
    async def refuse(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"kind": "Status", "code": status, "message": "no"}, status=status)

    async def go() -> None:
        async with serving(refuse) as url:
            with pytest.raises(RefusedError) as caught:
                await dial(tmp_path, url)
            assert caught.value.code == status

    asyncio.run(go())


def test_a_server_that_is_away_is_an_os_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        asyncio.run(dial(tmp_path, f"http://127.0.0.1:{port}"))


@pytest.mark.filterwarnings("ignore:.*[Pp]rotocols.*")
@pytest.mark.parametrize("protocols", [(), ("base64.channel.k8s.io",)], ids=["none", "another"])
def test_a_server_without_our_protocols_is_named_as_such(tmp_path: Path, protocols: tuple[str, ...]) -> None:
    async def go() -> None:
        server = Server(says_hello, protocols)
        async with serving(server.handle) as url:
            with pytest.raises(BackendUnavailableError, match=r"offers neither v5\.channel\.k8s\.io nor v4\.channel\.k8s\.io"):
                await dial(tmp_path, url)

    asyncio.run(go())
