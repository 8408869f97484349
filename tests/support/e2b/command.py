"""A process that envd has started: who listens to it, its input, its end."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from tests.support.e2b.pipes import CHUNK_BYTES, Pipes, feed, finish
from tests.support.e2b.problems import RpcError
from tests.support.kubernetes.runtime import Process, Runtime

Json = dict[str, Any]
_KILL = 9
_QUEUED_EVENTS = 8


class Subscriber:
    """One stream of a command's events. Who does not take them holds the command up."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Json] = asyncio.Queue(_QUEUED_EVENTS)
        self._gone = False

    @property
    def is_empty(self) -> bool:
        """Whether :meth:`get` would wait."""
        return self._events.empty()

    async def put(self, event: Json) -> None:
        """Returns when there is room, or when nobody listens any more."""
        if not self._gone:
            await self._events.put(event)

    async def get(self) -> Json:
        """The next one."""
        return await self._events.get()

    def leave(self) -> None:
        """Who waits in :meth:`put` goes on."""
        self._gone = True
        while not self._events.empty():
            self._events.get_nowait()


class Command:
    """``pid`` is as the sandbox has it. ``end`` becomes its last event, when nobody holds its output open any more."""

    def __init__(self, runtime: Runtime, process: Process, pid: int, asked: Json) -> None:
        self._runtime = runtime
        self._process = process
        self._stdin: asyncio.StreamWriter | None = None
        self._subscribers: list[Subscriber] = []
        self._outputs: list[asyncio.ReadTransport] = []
        self._deadline: asyncio.TimerHandle | None = None
        self.pid = pid
        self.asked = asked
        self.end: asyncio.Future[Json] = asyncio.get_running_loop().create_future()

    @property
    def listed(self) -> Json:
        """For List."""
        tag = {"tag": self.asked["tag"]} if "tag" in self.asked else {}
        return {"pid": self.pid, "config": self.asked.get("process", {}), **tag}

    def subscribe(self) -> Subscriber:
        """To events from now on; the end included, if it has come already."""
        subscriber = Subscriber()
        self._subscribers.append(subscriber)
        return subscriber

    def leave(self, subscriber: Subscriber) -> None:
        """The command goes on."""
        if subscriber in self._subscribers:
            self._subscribers.remove(subscriber)
        subscriber.leave()

    def kill_after(self, timeout_s: float) -> None:
        """Its own process only, as envd does: what that has started goes on."""
        self._deadline = asyncio.get_running_loop().call_later(timeout_s, self.signal, _KILL)

    def signal(self, number: int) -> None:
        """To its own process only."""
        self._runtime.kill(self._process, number)

    async def run(self, pipes: Pipes) -> None:
        """Until its end, and that of everybody who has its output."""
        self._stdin = await pipes.writer()
        try:
            await asyncio.gather(self._copy(pipes, 1, "stdout"), self._copy(pipes, 2, "stderr"))
            await asyncio.shield(self._process.status)
            event = {"end": _end_of(self._process)}
            self.end.set_result(event)
            await self._publish(event)
        finally:
            self._release()

    def _release(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        finish(self._stdin)
        self._stdin = None
        for transport in self._outputs:
            transport.close()

    async def _copy(self, pipes: Pipes, target: int, name: str) -> None:
        reader, transport = await pipes.reader(target)
        self._outputs.append(transport)
        while data := await reader.read(CHUNK_BYTES):
            if self._subscribers:  # who is not there gets nothing, ever: envd keeps none of it
                await self._publish({"data": {name: base64.b64encode(data).decode()}})

    async def _publish(self, event: Json) -> None:
        for subscriber in list(self._subscribers):
            await subscriber.put(event)

    async def write(self, data: bytes) -> None:
        """To its input. Raises RpcError."""
        if self._stdin is None:
            raise RpcError("internal", "error writing to stdin: stdin not enabled or closed")
        if not await feed(self._stdin, data):
            raise RpcError("internal", "error writing to stdin: write |1: broken pipe")

    def close_stdin(self) -> None:
        """Nothing comes any more."""
        finish(self._stdin)
        self._stdin = None


def _end_of(process: Process) -> Json:
    """Of Go's ProcessState; protobuf leaves zeros out."""
    status = process.status.result()
    signal_number = status & 0x7F
    if signal_number:
        words = f"signal: {_SIGNALS.get(signal_number, signal_number)}"
        return {"exitCode": -1, "status": words, "error": words}
    code = status >> 8
    if code == 0:
        return {"exited": True, "status": "exit status 0"}
    return {"exitCode": code, "exited": True, "status": f"exit status {code}", "error": f"exit status {code}"}


#: In Go's words.
_SIGNALS = {1: "hangup", 2: "interrupt", 6: "aborted", 9: "killed", 11: "segmentation fault", 13: "broken pipe", 15: "terminated"}
