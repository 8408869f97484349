"""What was asked for."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from aiohttp import web

_SANDBOX = re.compile(r"(?<=/sandboxes/)[^/]+")


class Recorder:
    """Counts by kind, such as ``POST /v2/sandboxes/{id}/connect`` and ``/process.Process/Start``; every create in full."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.creates: list[dict[str, Any]] = []
        self.networks: list[dict[str, Any]] = []

    def count(self, request: web.Request) -> None:
        """One request, whatever becomes of it."""
        self.requests[kind_of(request)] += 1


def kind_of(request: web.Request) -> str:
    """Without ids and queries."""
    if request.path.startswith(("/process.", "/filesystem.")):
        return request.path
    return f"{request.method} {_SANDBOX.sub('{id}', request.path)}"
