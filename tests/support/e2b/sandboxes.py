"""All sandboxes: how they are made, found, listed, and how they end."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.e2b.knobs import Knobs
from tests.support.e2b.problems import HttpError, no_such_sandbox
from tests.support.e2b.sandbox import Sandbox
from tests.support.e2b.teams import Team
from tests.support.kubernetes.runtime import LaunchError, Runtime

Json = dict[str, Any]
_EVICTION_S = 0.05
_STOP, _CONTINUE = 19, 18


@dataclass
class _Create:
    body: str
    task: asyncio.Task[Sandbox]


class Sandboxes:
    """By id."""

    def __init__(self, runtime: Runtime, knobs: Knobs, directory: Path) -> None:
        self._runtime = runtime
        self._knobs = knobs
        self._mount_point = str(directory / "root")
        self._found: dict[str, Sandbox] = {}
        self._creates: dict[tuple[str, str], _Create] = {}
        self._starting: dict[str, int] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def all(self) -> list[Sandbox]:
        """Of every team."""
        return list(self._found.values())

    def get(self, sandbox_id: str) -> Sandbox:
        """Of any team. Raises LookupError."""
        return self._found[sandbox_id]

    def find(self, team: Team, sandbox_id: str) -> Sandbox:
        """Raises HttpError (404), for another team's as well."""
        found = self._found.get(sandbox_id)
        if found is None or found.team is not team:
            raise no_such_sandbox(sandbox_id)
        return found

    async def create(self, team: Team, body: Json, key: str) -> Sandbox:
        """With a ``key`` that is known, the sandbox that it made or is making. Raises HttpError.

        It goes on when who asked is gone.
        """
        if not key:
            return await asyncio.shield(self._task(team, body))
        text = json.dumps(body, sort_keys=True)
        known = self._creates.get((team.name, key))
        if known is not None and known.body != text:
            raise HttpError(422, "Idempotency-Key was used with a different request body")
        if known is None or (known.task.done() and known.task.exception() is not None):
            known = self._creates[team.name, key] = _Create(text, self._task(team, body))
        return await asyncio.shield(known.task)

    def _task(self, team: Team, body: Json) -> asyncio.Task[Sandbox]:
        task = asyncio.create_task(self._create(team, body))
        task.add_done_callback(lambda t: t.cancelled() or t.exception())  # it has been seen, though nobody waits
        return task

    async def _create(self, team: Team, body: Json) -> Sandbox:
        timeout_s = self._check(team, body)
        sandbox = Sandbox(team, body, self._knobs, self._runtime)
        self._starting[team.name] = self._starting.get(team.name, 0) + 1
        try:
            await asyncio.sleep(self._knobs.create_s)
            await sandbox.start(self._mount_point)
        except LaunchError as error:
            raise HttpError(500, f"Failed to create sandbox: {error}") from None
        finally:
            self._starting[team.name] -= 1
        sandbox.end_at = time.time() + timeout_s
        self._found[sandbox.id] = sandbox
        return sandbox

    def _check(self, team: Team, body: Json) -> float:
        if body["templateID"] not in self._knobs.templates:
            raise HttpError(404, f"template '{body['templateID']}' not found")
        timeout_s = self.timeout_of(body, 15)
        limit = self._knobs.concurrent
        running = sum(s.team is team and s.state == "running" for s in self._found.values()) + self._starting.get(team.name, 0)
        if limit and running >= limit:
            words = f"you have reached the maximum number of concurrent E2B sandboxes ({limit}). If you need more, "
            raise HttpError(429, f"{words}please contact us at 'https://e2b.dev/docs/getting-help'")
        return timeout_s

    def timeout_of(self, body: Json, default: float) -> float:
        """Raises HttpError (400)."""
        timeout = body.get("timeout", default)
        if not isinstance(timeout, int | float) or isinstance(timeout, bool) or timeout < 0:
            raise HttpError(400, "timeout must be a number of seconds")
        if timeout > self._knobs.max_timeout_s:
            raise HttpError(400, f"Timeout cannot be greater than {self._knobs.max_timeout_s / 3600:g} hours")
        return float(timeout)

    def pause(self, sandbox: Sandbox) -> None:
        """Its processes stand still, its connections are cut. Raises HttpError (409)."""
        if sandbox.state == "paused":
            raise HttpError(409, f"Sandbox '{sandbox.id}' is already paused")
        sandbox.state = "paused"
        sandbox.signal_all(_STOP)
        sandbox.cut_connections()

    def connect(self, sandbox: Sandbox, timeout_s: float) -> None:
        """One that is paused goes on; the time of one that runs is only lengthened."""
        until = time.time() + timeout_s
        if sandbox.state == "paused":
            sandbox.signal_all(_CONTINUE)
            sandbox.state = "running"
            sandbox.end_at = until
        sandbox.end_at = max(sandbox.end_at, until)

    async def kill(self, sandbox: Sandbox) -> None:
        """It is not found any more, and then it is dead; its streams end as the knob says."""
        self._found.pop(sandbox.id, None)
        message = f"the connection to sandbox {sandbox.id} ended before the stream completed"
        for stream in list(sandbox.streams):
            stream.cut(self._knobs.killed_streams, message)
        await asyncio.shield(self._end(sandbox))

    async def vanish(self, sandbox: Sandbox) -> None:
        """As when a node dies: no stream ends in order."""
        self._found.pop(sandbox.id, None)
        sandbox.cut_connections()
        await asyncio.shield(self._end(sandbox))

    def _end(self, sandbox: Sandbox) -> asyncio.Task[None]:
        sandbox.thaw()
        task = asyncio.create_task(sandbox.destroy())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    async def evict(self) -> None:
        """For ever: whose time is over, or whose PID 1 has ended."""
        while True:
            now = time.time()
            for sandbox in self.all():
                if sandbox.has_ended.done() or (sandbox.state == "running" and sandbox.end_at <= now):
                    if sandbox.asked.get("autoPause") and not sandbox.has_ended.done():
                        self.pause(sandbox)
                    else:
                        await self.kill(sandbox)
            await asyncio.sleep(_EVICTION_S)

    async def close(self) -> None:
        """All of them end."""
        for create in self._creates.values():
            await asyncio.wait({create.task})
        await asyncio.gather(*(self.vanish(sandbox) for sandbox in self.all()))
        await asyncio.gather(*self._ending)

    def left(self) -> Json:
        """What is there, by kind."""
        return {"sandboxes": sorted(self._found), "ending": len(self._ending)}
