"""The two ports, the faults and counts before every handler, and the answer to what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from tests.support.e2b.faults import Faults, begin
from tests.support.e2b.problems import HttpError, RpcError
from tests.support.e2b.recorder import Recorder
from tests.support.kubernetes.faults import reset

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Listener:
    """A port, which can be closed with all its connections and opened again."""

    def __init__(self, routes: Iterable[web.RouteDef], faults: Faults, recorder: Recorder) -> None:
        self._routes = list(routes)
        self._faults = faults
        self._recorder = recorder
        self._runner: web.AppRunner | None = None
        self._requests: dict[int, web.BaseRequest] = {}
        self._thawed = asyncio.Event()
        self._thawed.set()
        self.port = 0

    async def open(self) -> None:
        """On the port that it had, the first time on any."""
        application = web.Application(middlewares=[self._handle], client_max_size=256 << 20)
        application.add_routes(self._routes)
        runner = self._runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True, backlog=512)
        await site.start()
        self.port = runner.addresses[0][1]

    async def close(self) -> None:
        """At once: nobody is told."""
        runner, self._runner = self._runner, None
        if runner is not None:
            for request in list(self._requests.values()):
                reset(request)
            await runner.cleanup()

    def freeze(self) -> None:
        """Connections are accepted, and nothing is answered to new requests."""
        self._thawed.clear()

    def thaw(self) -> None:
        """They are answered."""
        self._thawed.set()

    @web.middleware
    async def _handle(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        self._recorder.count(request)
        self._requests[id(request)] = request
        try:
            await self._thawed.wait()
            await begin(self._faults.take(request), request)
            return await handler(request)
        except HttpError as error:
            return error.response()
        except RpcError as error:
            return error.response()
        except ConnectionResetError:
            return web.Response()  # to nobody
        finally:
            self._requests.pop(id(request), None)
