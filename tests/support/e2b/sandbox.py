"""One sandbox: its processes, its connections, its time."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from aiohttp import web

from cifixer_exec.backends.local.cgroups import Limits
from tests.support.e2b.command import Command, Subscriber
from tests.support.e2b.knobs import Knobs
from tests.support.e2b.pipes import Pipes
from tests.support.e2b.place import ROOT, User, members, request_for, users
from tests.support.e2b.problems import HttpError, RpcError, sandbox_gone
from tests.support.e2b.stream import EventStream
from tests.support.e2b.teams import Team
from tests.support.kubernetes.faults import reset
from tests.support.kubernetes.runtime import LaunchError, Process, Runtime

Json = dict[str, Any]
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass
class Sandbox:
    """``team`` owns it; ``asked`` is the body it was created with."""

    team: Team
    asked: Json
    knobs: Knobs
    runtime: Runtime
    id: str = field(default_factory=lambda: "i" + "".join(secrets.choice(_ALPHABET) for _ in range(19)))
    token: str = field(default_factory=lambda: f"ea_{secrets.token_hex(20)}")
    state: str = "running"
    started_at: float = field(default_factory=time.time)
    end_at: float = 0.0
    network: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory_bytes = self.knobs.memory_bytes
        self.envd_version = self.knobs.envd_version
        self.commands: dict[int, Command] = {}
        self.ended: dict[int, Command] = {}
        self.streams: set[EventStream] = set()
        self.requests: dict[int, web.BaseRequest] = {}
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._init: Process | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.network = dict(self.asked.get("network") or {})

    async def start(self, mount_point: str) -> None:
        """Its PID 1 runs when this returns. Raises LaunchError."""
        limits = Limits(memory_bytes=self.memory_bytes, max_processes=self.knobs.max_processes)
        request = request_for(
            self.id, self.template, mount_point, internet=self.internet and self.knobs.host_network, disk_bytes=self.knobs.disk_bytes
        )
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._init = await self.runtime.run(request, [nothing] * 3, limits)
        finally:
            os.close(nothing)

    @cached_property
    def users(self) -> dict[str, User]:
        """The accounts in it, by name."""
        return users(self.id)

    @property
    def template(self) -> str:
        """Its name."""
        return str(self.asked["templateID"])

    @property
    def internet(self) -> bool:
        """Allowed unless it says otherwise."""
        return self.asked.get("allow_internet_access") is not False

    @property
    def metadata(self) -> dict[str, str]:
        """What it was labelled with."""
        return dict(self.asked.get("metadata") or {})

    @property
    def pid(self) -> int:
        """Of its PID 1, on this machine."""
        return 0 if self._init is None else self._init.pid

    @property
    def has_ended(self) -> asyncio.Future[int]:
        """Done when its PID 1 has ended."""
        assert self._init is not None
        return self._init.status

    def created(self) -> Json:
        """The answer to who creates it or connects."""
        about = {"sandboxID": self.id, "templateID": self.template, "clientID": "standin0", "envdVersion": self.envd_version}
        return {**about, "envdAccessToken": self.token, "domain": None, "alias": self.template}

    def listed(self) -> Json:
        """Among others."""
        about: Json = {"sandboxID": self.id, "templateID": self.template, "clientID": "standin0", "envdVersion": self.envd_version}
        about |= {"alias": self.template, "state": self.state, "metadata": self.metadata}
        about |= {"startedAt": _stamp(self.started_at), "endAt": _stamp(self.end_at)}
        return {**about, "cpuCount": 2, "memoryMB": self.memory_bytes >> 20, "diskSizeMB": 10240}

    def detail(self) -> Json:
        """For its owner."""
        more = {"envdAccessToken": self.token, "domain": None, "network": self.network, "allowInternetAccess": self.internet}
        lifecycle = {"autoResume": False, "onTimeout": "pause" if self.asked.get("autoPause") else "kill"}
        return {**self.listed(), **more, "lifecycle": lifecycle}

    def metrics(self) -> Json:
        """As of now, as far as it is known."""
        now = time.time()
        used = {"cpuUsedPct": 0.0, "memUsed": self.memory_used, "memCache": 0, "diskUsed": 0}
        total = {"cpuCount": 2, "memTotal": self.memory_bytes, "diskTotal": 10 << 30}
        return {"timestamp": _stamp(now), "timestampUnix": int(now), **used, **total}

    @property
    def memory_used(self) -> int:
        """By its control group."""
        groups = [] if self._init is None else self._init.groups
        for path in (group / name for group in groups for name in ("memory.current", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):
                return int(path.read_text())
        return 0

    @property
    def left_s(self) -> float:
        """Until its time is over."""
        return self.end_at - time.time()

    def end_in(self, seconds: float) -> None:
        """From now."""
        self.end_at = time.time() + seconds

    def pids(self) -> list[int]:
        """Of all its processes, on this machine."""
        return [] if self._init is None else members(self._init.pid, self._init.groups)

    async def gate(self) -> None:
        """Waits while it is frozen."""
        await self._thawed.wait()

    def freeze(self) -> None:
        """Connections stay, and no byte flows."""
        self._thawed.clear()

    def thaw(self) -> None:
        """They go on."""
        self._thawed.set()

    def find(self, selector: Json) -> Command:
        """By pid or tag. Raises RpcError."""
        if "tag" in selector:
            found = next((c for c in self.commands.values() if c.asked.get("tag") == selector["tag"]), None)
        else:
            found = self.commands.get(int(selector.get("pid", 0)))
        if found is None:
            what = f"tag {selector['tag']}" if "tag" in selector else f"pid {selector.get('pid', 0)}"
            raise RpcError("not_found", f"process with {what} not found")
        return found

    async def execute(self, asked: Json, user: User, timeout_s: float | None) -> tuple[Command, Subscriber]:
        """It has been started, and all that it writes goes to the subscriber. Raises HttpError or RpcError.

        Who is cancelled meanwhile leaves it running, without a subscriber.
        """
        task = asyncio.create_task(self._execute(asked, user, timeout_s))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_leave)
            raise

    async def _execute(self, asked: Json, user: User, timeout_s: float | None) -> tuple[Command, Subscriber]:
        config = asked.get("process") or {}
        if not config.get("cmd"):
            raise RpcError("invalid_argument", "no command")
        pipes = Pipes(stdin=asked.get("stdin", True))
        told, teller = os.pipe2(os.O_CLOEXEC)
        try:
            process = await self._launch([config["cmd"], *config.get("args", [])], [*pipes.theirs, teller], self._other(config, user))
            pid = int(os.read(told, 32))
        except (HttpError, LaunchError) as error:
            pipes.close()
            if isinstance(error, HttpError):
                raise
            raise RpcError("invalid_argument", f"error starting process: {error}") from None
        finally:
            pipes.close_theirs()
            os.close(told)
            os.close(teller)
        command = self.commands[pid] = Command(self.runtime, process, pid, asked)
        if timeout_s is not None:
            command.kill_after(timeout_s)
        subscriber = command.subscribe()
        self._watch(command, pipes)
        return command, subscriber

    def _other(self, config: Json, user: User) -> Json:
        inherited = {} if self._init is None else self._init.request["environment"]
        environment = {**inherited, **(self.asked.get("envVars") or {}), **user.environment, **config.get("envs", {})}
        return {**user.identity, "environment": environment, "directory": config.get("cwd") or user.home}

    async def _launch(self, command: list[str], descriptors: list[int], other: Json) -> Process:
        assert self._init is not None
        try:
            return await self.runtime.execute(self._init, command, descriptors, **other)
        except LaunchError as error:
            if error.reason == "stopped":
                raise sandbox_gone(self.id) from None
            raise

    async def operate(self, operation: Json, user: User, pipes: Pipes) -> Process:
        """A file operation has begun within it. Raises HttpError or LaunchError."""
        operation = {**operation, "home": user.home, "owner": user.number}
        try:
            return await self._launch([], pipes.theirs, {**ROOT.identity, "file_operation": operation})
        finally:
            pipes.close_theirs()

    def _watch(self, command: Command, pipes: Pipes) -> None:
        task = asyncio.create_task(self._run(command, pipes))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, command: Command, pipes: Pipes) -> None:
        try:
            await command.run(pipes)
        finally:
            self.commands.pop(command.pid, None)
        self.ended[command.pid] = command
        await asyncio.sleep(self.knobs.ended_kept_s)
        if self.ended.get(command.pid) is command:
            del self.ended[command.pid]

    def signal_all(self, number: int) -> None:
        """To every process in it, until no new one appears."""
        seen: set[int] = set()
        while new := set(self.pids()) - seen:
            for pid in new:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            seen |= new

    def cut_connections(self) -> int:
        """All that is under way is reset; how many it were."""
        found = list(self.requests.values())
        for stream in list(self.streams):
            stream.cut("reset")
        for request in found:
            reset(request)
        return len(found)

    async def destroy(self) -> None:
        """Nothing of it runs any more when this returns."""
        if self._init is not None:
            self.runtime.kill(self._init, signal.SIGKILL)
            await asyncio.shield(self._init.status)
            await self.runtime.clear(self._init)
        for task in self._tasks:
            task.cancel()


def _leave(task: asyncio.Task[tuple[Command, Subscriber]]) -> None:
    if not task.cancelled() and task.exception() is None:
        command, subscriber = task.result()
        command.leave(subscriber)


def _stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
