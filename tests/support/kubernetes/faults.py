"""Faults that a test orders: for the next requests of a kind, or for all that is connected."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.support.kubernetes.addresses import Address
from tests.support.kubernetes.problems import ApiError, internal, too_many_requests, unavailable

Json = dict[str, Any]
KINDS = ("429", "500", "503", "hang", "slow", "reset", "lost_reply")


@dataclass
class Fault:
    """For the next ``times`` requests with that verb ("" for any) whose path matches."""

    kind: str
    verb: str
    path: re.Pattern[str]
    times: int
    seconds: float
    text: str


class Faults:
    """What has been ordered, and what was met."""

    def __init__(self) -> None:
        self._orders: list[Fault] = []
        self.met: Counter[str] = Counter()
        self.thawed = asyncio.Event()
        self.thawed.set()

    def order(self, kind: str, *, verb: str = "", path: str = "", times: int = 1, seconds: float = 1.0, text: str = "") -> None:
        """``seconds``: Retry-After of a 429, or how long ``slow`` takes. ``lost_reply``: done, and the connection is cut."""
        if kind not in KINDS:
            raise ValueError(f"{kind}: one of {', '.join(KINDS)}")
        self._orders.append(Fault(kind, verb, re.compile(path), times, seconds, text))

    def clear(self) -> None:
        """No more of them."""
        self._orders.clear()

    def take(self, address: Address) -> Fault | None:
        """The fault for this request, counted."""
        for fault in self._orders:
            if fault.times > 0 and fault.verb in ("", address.verb) and fault.path.search(address.path):
                fault.times -= 1
                self.met[fault.kind] += 1
                return fault
        return None

    async def before(self, fault: Fault, request: web.Request) -> None:
        """What happens instead of an answer, or before it. Raises ApiError."""
        if fault.kind == "slow":
            await asyncio.sleep(fault.seconds)
        elif fault.kind == "hang":
            await asyncio.Event().wait()
        elif fault.kind == "reset":
            cut(request)
        elif fault.kind != "lost_reply":
            raise _refusal(fault)


def _refusal(fault: Fault) -> ApiError:
    if fault.kind == "429":
        return too_many_requests(int(fault.seconds))
    return unavailable() if fault.kind == "503" else internal(fault.text or "etcdserver: request timed out")


def cut(request: web.BaseRequest) -> None:
    """The connection is reset. Raises ConnectionResetError."""
    reset(request)
    raise ConnectionResetError("cut by a fault")


def reset(request: web.BaseRequest) -> None:
    """A RST, without a close in order."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
