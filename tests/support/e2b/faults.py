"""Faults that a test orders for the next requests of a kind."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, field

from aiohttp import web

from tests.support.e2b.problems import HttpError
from tests.support.kubernetes.faults import cut

_MESSAGES = {401: "Invalid API key", 403: "Forbidden", 404: "Not found", 429: "Rate limit exceeded", 503: "Service unavailable"}


@dataclass
class Fault:
    """For the next ``times`` requests with that method ("" for any) whose path matches, after the first ``skip`` of them.

    Only those about ``sandbox``, if one is named. ``status`` is answered, or ``drop`` resets the connection; both before what is asked,
    or ``after`` it has been done. ``delay_s`` comes first. ``headers`` may have Retry-After and Should-Retry.
    """

    method: str = ""
    path: str = ""
    times: int = 1
    skip: int = 0
    status: int = 0
    drop: bool = False
    after: bool = False
    delay_s: float = 0.0
    message: str = ""
    #: Instead of JSON, as from a proxy of somebody else's.
    html: str = ""
    sandbox: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def matches(self, request: web.Request) -> bool:
        """Whether it is for that request, if it still has times."""
        if self.times <= 0 or self.method not in ("", request.method) or re.search(self.path, request.path) is None:
            return False
        return self.sandbox in ("", request.headers.get("E2b-Sandbox-Id"), request.match_info.get("id"))

    def strike(self, request: web.Request) -> None:
        """Instead of an answer; nothing for a mere delay. Raises HttpError or ConnectionResetError."""
        if self.drop:
            cut(request)
        if self.status:
            raise HttpError(self.status, self.message or _MESSAGES.get(self.status, "Error"), headers=self.headers, html=self.html)


class Faults:
    """What has been ordered, and how often what was met."""

    def __init__(self) -> None:
        self._orders: list[Fault] = []
        self.met: Counter[str] = Counter()

    def order(self, fault: Fault) -> None:
        """Raises ValueError for one that does nothing."""
        if not (fault.status or fault.drop or fault.delay_s):
            raise ValueError("a fault has a status, drop or delay_s")
        re.compile(fault.path)
        self._orders.append(fault)

    def clear(self) -> None:
        """No more of them."""
        self._orders.clear()

    def take(self, request: web.Request) -> Fault | None:
        """The fault for this request, counted."""
        for fault in self._orders:
            if not fault.matches(request):
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            fault.times -= 1
            self.met[str(fault.status) if fault.status else "drop" if fault.drop else "delay"] += 1
            return fault
        return None


async def begin(fault: Fault | None, request: web.Request) -> None:
    """Before what is asked. Raises as :meth:`Fault.strike`."""
    if fault is None:
        return
    if fault.delay_s:
        await asyncio.sleep(fault.delay_s)
    if not fault.after:
        fault.strike(request)
    request["fault"] = fault


def after_done(request: web.Request) -> None:
    """What is asked has been done, and nothing has been answered. Raises as :meth:`Fault.strike`."""
    fault: Fault | None = request.get("fault")
    if fault is not None:
        request["fault"] = None
        fault.strike(request)
