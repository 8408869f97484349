"""Refusals as the API, the proxy before envd, and envd write them."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

Json = dict[str, Any]
#: https://connectrpc.com/docs/protocol/#error-codes
STATUS_OF_CODE = {
    "canceled": 499,
    "unknown": 500,
    "invalid_argument": 400,
    "deadline_exceeded": 504,
    "not_found": 404,
    "already_exists": 409,
    "permission_denied": 403,
    "resource_exhausted": 429,
    "failed_precondition": 400,
    "unimplemented": 501,
    "internal": 500,
    "unavailable": 503,
    "unauthenticated": 401,
}


class HttpError(Exception):
    """``{"code", "message"}`` with its status, as the API, the proxy and envd's /files answer."""

    def __init__(
        self, status: int, message: str, *, headers: dict[str, str] | None = None, more: Json | None = None, html: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}
        self.more = more or {}
        self.html = html

    def response(self) -> web.Response:
        """The answer."""
        if self.html:
            return web.Response(status=self.status, text=self.html, content_type="text/html", headers=self.headers)
        body = {**self.more, "code": self.status, "message": self.message}
        return web.json_response(body, status=self.status, headers=self.headers)


class RpcError(Exception):
    """A Connect error, by its code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def body(self) -> Json:
        """On the wire."""
        return {"code": self.code, "message": self.message}

    def response(self) -> web.Response:
        """The answer to a unary request."""
        return web.Response(status=STATUS_OF_CODE[self.code], text=json.dumps(self.body), content_type="application/json")


def no_such_sandbox(sandbox_id: str) -> HttpError:
    """By the API."""
    return HttpError(404, f"sandbox \"{sandbox_id}\" doesn't exist or you don't have access to it")


def sandbox_gone(sandbox_id: str) -> HttpError:
    """By the proxy."""
    return HttpError(502, "The sandbox was not found", more={"sandboxId": sandbox_id})


def port_not_open(sandbox_id: str, port: str) -> HttpError:
    """By the proxy."""
    return HttpError(502, "The sandbox is running but port is not open", more={"sandboxId": sandbox_id, "port": port})
