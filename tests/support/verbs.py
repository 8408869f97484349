"""Orders to a stand-in, over HTTP on a Unix socket: ``POST /<verb>`` with its arguments as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

_IMPOSSIBLE: tuple[type[Exception], ...] = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


class Verbs:
    """Each public method of a subclass is a verb. ``refusals``: what else it raises for an order that cannot be."""

    refusals: tuple[type[Exception], ...] = ()

    def application(self) -> web.Application:
        """Its HTTP side."""
        application = web.Application(client_max_size=64 << 20)
        application.router.add_post("/{verb}", self._handle)
        return application

    async def _handle(self, request: web.Request) -> web.Response:
        verb = request.match_info["verb"]
        try:
            if verb.startswith("_") or verb in ("application", "refusals"):
                raise AttributeError(verb)
            action: Callable[..., Any] = getattr(self, verb)
            result = action(**json.loads(await request.text() or "{}"))
            if asyncio.iscoroutine(result):
                result = await result
        except _IMPOSSIBLE + self.refusals as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return web.json_response({"result": result})
