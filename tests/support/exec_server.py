"""A WebSocket server that knows execs only, and ends them as it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"
SUCCESS: dict[str, Any] = {"metadata": {}, "status": "Success"}
Talk = Callable[[web.WebSocketResponse], Awaitable[None]]


def failure(**members: Any) -> dict[str, Any]:
    """The Status of an exec that failed."""
    return {"metadata": {}, "status": "Failure", **members}


def non_zero(code: int) -> dict[str, Any]:
    """That of one whose program ended with ``code``."""
    causes = [{"reason": "ExitCode", "message": str(code)}]
    said = f"command terminated with non-zero exit code: exit status {code}"
    return failure(reason="NonZeroExitCode", message=said, details={"causes": causes})


class Server:
    """An API server that knows execs only. ``talk`` is what happens behind the handshake; then the socket is closed."""

    def __init__(self, talk: Talk, protocols: tuple[str, ...] = (V5, V4)) -> None:
        self._talk = talk
        self._protocols = protocols
        self.requests: list[web.Request] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        ws = web.WebSocketResponse(protocols=self._protocols, max_msg_size=0, compress=False, timeout=0.1)
        await ws.prepare(request)
        await ws.send_bytes(b"\x01")  # "connected"
        await self._talk(ws)
        await ws.close()
        return ws


@asynccontextmanager
async def serving(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """An HTTP server of this event loop on a loopback port; its URL."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def cut(ws: web.WebSocketResponse) -> None:
    """No close frame and no status: as when an API server or a load balancer goes away."""
    assert ws._req is not None
    assert ws._req.transport is not None
    ws._req.transport.abort()
