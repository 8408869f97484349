"""A Docker daemon's Unix socket on a TCP port, with or without TLS, as remote daemons are reached."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cifixer_exec.channel.portal import Portal


@contextmanager
def tcp_port_of(socket: str, context: ssl.SSLContext | None = None, *, see: Callable[[bytes], None] = lambda _: None) -> Iterator[int]:
    """A loopback port that leads to the Unix socket ``socket`` during the ``with`` block; ``see`` is shown what clients send."""
    portal = Portal("docker-tcp")
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, shown: Callable[[bytes], None]) -> None:
        try:
            with suppress(OSError):
                while data := await reader.read(1 << 18):
                    shown(data)
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()
            with suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_unix_connection(socket)
        for one, other, shown in ((reader, there[1], see), (there[0], writer, lambda _: None)):
            task = asyncio.create_task(pump(one, other, shown))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)

    async def stop(server: asyncio.Server) -> None:
        server.close()
        while tasks:
            task = next(iter(tasks))
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            tasks.discard(task)

    server = portal.call(start())
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        portal.call(stop(server))
        portal.stop()


def certificates(directory: Path) -> ssl.SSLContext:
    """Makes ``ca.pem``, ``cert.pem`` and ``key.pem`` for both sides; the context of a server that wants a client's certificate."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    (directory / "ca.pem").write_bytes((directory / "cert.pem").read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    context.load_verify_locations(directory / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context
