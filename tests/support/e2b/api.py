"""The control plane: https://e2b.dev/docs/api-reference, as SDK 2.63 asks it."""

from __future__ import annotations

import base64
import binascii
import time
from datetime import datetime
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from tests.support.e2b.faults import after_done
from tests.support.e2b.knobs import Knobs
from tests.support.e2b.problems import HttpError
from tests.support.e2b.recorder import Recorder
from tests.support.e2b.sandbox import Sandbox
from tests.support.e2b.sandboxes import Sandboxes
from tests.support.e2b.teams import Team, Teams

Json = dict[str, Any]
_MAX_PAGE = 100


class Api:
    """Its handlers."""

    def __init__(self, sandboxes: Sandboxes, teams: Teams, knobs: Knobs, recorder: Recorder) -> None:
        self._sandboxes = sandboxes
        self._teams = teams
        self._knobs = knobs
        self._recorder = recorder

    def routes(self) -> list[web.RouteDef]:
        """For the application."""
        return [
            web.post("/v2/sandboxes", self.create),
            web.get("/v2/sandboxes", self.list),
            web.post("/v2/sandboxes/{id}/connect", self.connect),
            web.get("/sandboxes/{id}", self.get),
            web.delete("/sandboxes/{id}", self.kill),
            web.post("/sandboxes/{id}/timeout", self.set_timeout),
            web.post("/sandboxes/{id}/pause", self.pause),
            web.put("/sandboxes/{id}/network", self.set_network),
            web.get("/sandboxes/{id}/metrics", self.metrics),
        ]

    def _team(self, request: web.Request) -> Team:
        return self._teams.authenticate(request.headers.get("X-API-KEY", ""))

    def _sandbox(self, request: web.Request) -> Sandbox:
        return self._sandboxes.find(self._team(request), request.match_info["id"])

    async def create(self, request: web.Request) -> web.Response:
        """201."""
        team = self._team(request)
        team.take(self._knobs)
        body = await _body(request)
        self._recorder.creates.append(
            {"body": body, "headers": {name.lower(): value for name, value in request.headers.items()}, "team": team.name}
        )
        if not isinstance(body.get("templateID"), str):
            raise HttpError(400, "Error when parsing request: templateID is required")
        sandbox = await self._sandboxes.create(team, body, request.headers.get("Idempotency-Key", ""))
        return _answer(request, sandbox.created(), 201)

    async def connect(self, request: web.Request) -> web.Response:
        """200; its time is at least as long as asked."""
        sandbox = self._sandbox(request)
        self._sandboxes.connect(sandbox, self._sandboxes.timeout_of(await _body(request), 300))
        return _answer(request, sandbox.created(), 200)

    async def get(self, request: web.Request) -> web.Response:
        """200."""
        return _answer(request, self._sandbox(request).detail(), 200)

    async def kill(self, request: web.Request) -> web.Response:
        """204, when nothing of it runs any more."""
        await self._sandboxes.kill(self._sandbox(request))
        return _answer(request, None, 204)

    async def set_timeout(self, request: web.Request) -> web.Response:
        """204; from now."""
        sandbox = self._sandbox(request)
        sandbox.end_at = time.time() + self._sandboxes.timeout_of(await _body(request), 15)
        return _answer(request, None, 204)

    async def pause(self, request: web.Request) -> web.Response:
        """204."""
        self._sandboxes.pause(self._sandbox(request))
        return _answer(request, None, 204)

    async def set_network(self, request: web.Request) -> web.Response:
        """204; recorded."""
        sandbox = self._sandbox(request)
        sandbox.network = await _body(request)
        self._recorder.networks.append({"sandbox": sandbox.id, "body": sandbox.network})
        return _answer(request, None, 204)

    async def metrics(self, request: web.Request) -> web.Response:
        """200; one entry, of now."""
        return _answer(request, [self._sandbox(request).metrics()], 200)

    async def list(self, request: web.Request) -> web.Response:
        """200, a page; the next one's token is in a header."""
        team = self._team(request)
        wanted = _Wanted(request)
        found = sorted((s for s in self._sandboxes.all() if s.team is team and wanted.has(s)), key=_key, reverse=not wanted.ascending)
        page = [s for s in found if wanted.is_after_token(_key(s))]
        headers = {}
        if len(page) > wanted.limit:
            page = page[: wanted.limit]
            headers["x-next-token"] = _token(_key(page[-1]))
        response = _answer(request, [s.listed() for s in page], 200)
        response.headers.update(headers)
        return response


class _Wanted:
    """The filter and the page of a list. Raises HttpError (400)."""

    def __init__(self, request: web.Request) -> None:
        query = request.query
        self.metadata = dict(_pair(part) for part in query.get("metadata", "").split("&") if part)
        self.states = [s for s in query.get("state", "").split(",") if s] or ["running", "paused"]
        self.ascending = query.get("order") == "asc"
        self.template = query.get("template", "")
        after = query.get("startedAfter")
        try:
            self.started_after = datetime.fromisoformat(after).timestamp() if after else 0.0
            self.limit = int(query.get("limit", _MAX_PAGE))
            self.token = _key_of(query["nextToken"]) if "nextToken" in query else None
        except (ValueError, binascii.Error) as error:
            raise HttpError(400, f"Invalid parameter: {error}") from None
        if not 1 <= self.limit <= _MAX_PAGE:
            raise HttpError(400, f"limit must be between 1 and {_MAX_PAGE}")

    def has(self, sandbox: Sandbox) -> bool:
        """Whether it is to be listed."""
        if sandbox.state not in self.states or sandbox.started_at <= self.started_after:
            return False
        return self.template in ("", sandbox.template) and self.metadata.items() <= sandbox.metadata.items()

    def is_after_token(self, key: tuple[float, str]) -> bool:
        """Whether it is on no earlier page."""
        return self.token is None or (key > self.token if self.ascending else key < self.token)


def _pair(text: str) -> tuple[str, str]:
    """The SDK quotes them twice before its HTTP client does."""
    name, _, value = text.partition("=")
    if not value and "%3D" in name:
        name, _, value = unquote(name).partition("=")
    return _unquoted(name), _unquoted(value)


def _unquoted(text: str) -> str:
    while (plain := unquote(text)) != text:
        text = plain
    return text


def _key(sandbox: Sandbox) -> tuple[float, str]:
    return sandbox.started_at, sandbox.id


def _token(key: tuple[float, str]) -> str:
    return base64.urlsafe_b64encode(f"{key[0]!r}__{key[1]}".encode()).decode()


def _key_of(token: str) -> tuple[float, str]:
    at, _, sandbox_id = base64.urlsafe_b64decode(token).decode().partition("__")
    return float(at), sandbox_id


async def _body(request: web.Request) -> Json:
    try:
        body = await request.json()
    except ValueError:
        raise HttpError(400, "Error when parsing request") from None
    if not isinstance(body, dict):
        raise HttpError(400, "Error when parsing request")
    return body


def _answer(request: web.Request, body: Any, status: int) -> web.Response:
    after_done(request)
    return web.Response(status=status) if body is None else web.json_response(body, status=status)
