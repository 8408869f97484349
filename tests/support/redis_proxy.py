"""A TCP proxy in front of Redis that can misbehave: one listening port per worker or client, each with faults of its own.

It runs on an event loop in a thread of its own, so that neither a busy test nor a stalled client delays it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from cifixer_exec.channel.portal import Portal


def _reset(transport: asyncio.Transport) -> None:
    """Close with RST: what was not delivered is lost, as when a firewall forgets a connection."""
    if transport.is_closing():
        return
    raw = transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class _Leg(asyncio.Protocol):
    """One direction of a link: what comes from one side, in order, on its way to the other."""

    def __init__(self, link: _Link, *, replies: bool) -> None:
        self.link = link
        self.replies = replies
        self.transport: asyncio.Transport | None = None
        self._peer: _Leg | None = None
        self._waiting: deque[tuple[float, bytes]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if not self.replies:
            self.link.opened(self)

    def data_received(self, data: bytes) -> None:
        port = self.link.port
        if self.replies and port.spends(len(data)):
            self.link.reset()
            return
        loop = asyncio.get_running_loop()
        self._waiting.append((loop.time() + port.delay_s, data))
        self.pump()

    def pump(self) -> None:
        """Pass on what is due. One queue, so that nothing overtakes when a delay or a stall ends."""
        loop = asyncio.get_running_loop()
        target = self._peer.transport if self._peer is not None else None
        while self._waiting and target is not None and not self.link.port.stalled:
            due, data = self._waiting[0]
            if due > loop.time():
                loop.call_at(due, self.pump)
                return
            self._waiting.popleft()
            if not target.is_closing():
                target.write(data)

    def joined(self, peer: _Leg) -> None:
        """The other side is connected."""
        self._peer = peer
        self.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self.link.lost(self, exc)


class _Link:
    """One client's connection and the one to the server."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self.legs: list[_Leg] = []
        self._connecting: asyncio.Task[None] | None = None

    def opened(self, leg: _Leg) -> None:
        self.legs.append(leg)
        self.port.links.add(self)
        self._connecting = asyncio.get_running_loop().create_task(self._connect(leg))

    async def _connect(self, leg: _Leg) -> None:
        try:
            _, protocol = await asyncio.get_running_loop().create_connection(
                lambda: _Leg(self, replies=True), "127.0.0.1", self.port.target
            )
        except OSError:
            self.reset()
            return
        self.legs.append(protocol)
        if leg.transport is None or leg.transport.is_closing():
            self.reset()
            return
        protocol.joined(leg)
        leg.joined(protocol)

    def lost(self, leg: _Leg, error: Exception | None) -> None:
        """What was read already is still passed on after an orderly end."""
        self.port.links.discard(self)
        for other in self.legs:
            if other is not leg and other.transport is not None and not other.transport.is_closing():
                _reset(other.transport) if error is not None else other.transport.close()

    def reset(self) -> None:
        self.port.links.discard(self)
        for leg in self.legs:
            if leg.transport is not None:
                _reset(leg.transport)

    def pump(self) -> None:
        for leg in self.legs:
            leg.pump()


class Port:
    """One listening port. All its methods belong to the proxy's loop; :class:`RedisProxy` calls them."""

    def __init__(self, target: int) -> None:
        self.target = target
        #: Bound and never listening: it keeps the number ours while connections are refused.
        self._placeholder = socket.socket()
        self._placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._placeholder.bind(("127.0.0.1", 0))
        self.number = int(self._placeholder.getsockname()[1])
        self.links: set[_Link] = set()
        self.delay_s = 0.0
        self._stalls = 0
        self._refusals = 0
        self._until_reset: int | None = None
        self._server: asyncio.Server | None = None

    @property
    def stalled(self) -> bool:
        """While nothing passes."""
        return self._stalls > 0

    async def listen(self) -> None:
        """Begin, or again after :meth:`refuse`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Leg(_Link(self), replies=False), "127.0.0.1", self.number, reuse_port=True)

    def spends(self, size: int) -> bool:
        """Count bytes of replies; True when the one that just came must not arrive."""
        if self._until_reset is None:
            return False
        self._until_reset -= size
        if self._until_reset >= 0:
            return False
        self._until_reset = None
        return True

    async def reset(self) -> None:
        """All connections, now."""
        for link in list(self.links):
            link.reset()

    async def reset_after_bytes(self, count: int) -> None:
        """The reply that goes beyond ``count`` bytes is lost with its connection: Redis has executed what it answers."""
        self._until_reset = count

    async def stall(self, seconds: float) -> None:
        """Connections stay open and nothing passes. Like the others it may come while one of its kind goes on."""
        self.cut()
        try:
            await asyncio.sleep(seconds)
        finally:
            self.mend()

    def cut(self) -> None:
        """From now on what is sent stays under way, as on a network that is cut."""
        self._stalls += 1

    def mend(self) -> None:
        """What was under way arrives, and all goes on."""
        self._stalls -= 1
        for link in list(self.links):
            link.pump()

    async def refuse(self, seconds: float) -> None:
        """No connection lives and none can be made."""
        self._refusals += 1
        self._deafen()
        await asyncio.sleep(seconds)
        self._refusals -= 1
        if self._refusals == 0:
            await self.listen()

    async def slow(self, delay_s: float, seconds: float) -> None:
        """Each direction takes ``delay_s`` longer, for a while."""
        self.delay_s = delay_s
        try:
            await asyncio.sleep(seconds)
        finally:
            self.delay_s = 0.0

    async def close(self) -> None:
        """For good."""
        self._deafen()
        self._placeholder.close()

    def _deafen(self) -> None:
        """Stop listening and reset what is open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for link in list(self.links):
            link.reset()


class RedisProxy:
    """Ports in front of the server at ``127.0.0.1:<target>``."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._portal = Portal("redis-proxy")
        self._ports: list[Port] = []

    def port(self) -> Port:
        """One more port, listening."""
        port = Port(self._target)
        self._portal.call(port.listen())
        self._ports.append(port)
        return port

    def url(self, port: Port) -> str:
        """What a client of ``port`` is given."""
        return f"redis://127.0.0.1:{port.number}/0"

    async def do(self, fault: Callable[..., Any], *arguments: float) -> None:
        """Run a fault of a port on the proxy's loop, from any other loop; returns when it is over."""
        await asyncio.wrap_future(self._portal.submit(fault(*arguments)))

    def at_once(self, change: Callable[[], None]) -> None:
        """Make a change of a port that takes no time; returns when it is made."""

        async def make() -> None:
            change()

        self._portal.call(make())

    def close(self) -> None:
        """End all connections and the thread."""
        for port in self._ports:
            self._portal.call(port.close())
        self._portal.stop()
