"""The container runtime as the kubelet sees it: starts, execs and kills by the launcher, and control groups around them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifixer_exec.backends.local.cgroups import Cgroups, Limits, detect, kill_all, oom_kills, remove
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.launcher import MAX_MESSAGE_BYTES

_OOM_POLL_S = 0.05


class LaunchError(Exception):
    """A process was not started. ``reason``: ``start`` (its program), ``stopped`` (its container), ``internal``."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass
class Process:
    """A container's PID 1 or an exec. ``status`` becomes its wait status."""

    name: str
    pid: int
    status: asyncio.Future[int]
    groups: list[Path] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """As shells and container runtimes count: 128 + the signal."""
        code = os.waitstatus_to_exitcode(self.status.result())
        return code if code >= 0 else 128 - code

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel has killed anything in its control groups for memory."""
        return any(oom_kills(group) > 0 for group in self.groups)


class Runtime:
    """``one_user``: this process has no other; ``name`` is that of its control groups.

    ``together``: what is out of memory ends as a whole. Without, the kernel's victim does, as in a machine of its own.
    """

    def __init__(self, requests: socket.socket, knobs: Knobs, *, name: str, one_user: bool, together: bool = True) -> None:
        self._requests = requests
        self._requests.setblocking(False)
        self._name = name
        self._one_user = one_user
        self._together = together
        self._knobs = knobs
        self._cgroups: Cgroups | None = detect()
        self._waiting: dict[str, asyncio.Future[int]] = {}
        self._processes: dict[str, Process] = {}
        self._guards: set[asyncio.Task[None]] = set()
        self._number = 0

    @property
    def limited(self) -> bool:
        """Whether memory, processes and CPU can be limited here."""
        return self._cgroups is not None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on answers are read on ``loop``."""
        loop.add_reader(self._requests.fileno(), self._read)

    async def run(self, request: dict[str, Any], descriptors: list[int], limits: Limits) -> Process:
        """A container: its PID 1 has been started when this returns. Raises LaunchError."""
        name = self._new_name()
        try:
            groups = await asyncio.to_thread(self._make_groups, name, limits)
        except OSError as error:
            raise LaunchError(f"control groups: {error}", "internal") from None
        request |= {"groups": [str(g) for g in groups], "group_views": self._views(name)}
        try:
            process = await self._launch({**request, "verb": "run"}, name, descriptors)
        except LaunchError:
            await asyncio.to_thread(remove, groups)
            raise
        process.groups, process.request = groups, request
        self._watch(process)
        return process

    async def execute(self, container: Process, command: list[str], descriptors: list[int], **other: Any) -> Process:
        """A further process in a running container; ``other`` is what it has not from there. Raises LaunchError."""
        request = {**container.request, **other, "verb": "exec", "container": container.name, "command": command}
        return await self._launch(request, self._new_name(), descriptors)

    def kill(self, process: Process, signal_number: int) -> None:
        """Nothing happens when it has ended."""
        if not process.status.done():
            self._send({"verb": "kill", "id": process.name, "signal": signal_number}, [])

    async def clear(self, process: Process) -> None:
        """The control groups of a container that has ended."""
        groups, process.groups = process.groups, []
        await asyncio.to_thread(_clear, groups)

    def groups(self) -> list[str]:
        """Those that are still there."""
        bases = {} if self._cgroups is None else self._cgroups.bases
        return sorted({str(p) for base in bases.values() for p in base.glob(f"cifixer-exec/{self._name}-*")})

    def processes(self) -> list[int]:
        """The pids of containers and execs that still run."""
        return [p.pid for p in self._processes.values() if not p.status.done()]

    def close(self) -> None:
        """The launcher ends, and with it all that it has started."""
        asyncio.get_running_loop().remove_reader(self._requests.fileno())
        self._requests.close()

    def _new_name(self) -> str:
        self._number += 1
        return f"{self._name}-{self._number}"

    def _make_groups(self, name: str, limits: Limits) -> list[Path]:
        return [] if self._cgroups is None else self._cgroups.create(name, limits)

    def _views(self, name: str) -> dict[str, str]:
        """Where a container sees its control groups: name below /sys/fs/cgroup → directory."""
        if self._cgroups is None:
            return {}
        if self._cgroups.version == 2:
            return {"": str(self._cgroups.group("memory", name))}
        return {c: str(self._cgroups.group(c, name)) for c in self._cgroups.bases}

    async def _launch(self, request: dict[str, Any], name: str, descriptors: list[int]) -> Process:
        loop = asyncio.get_running_loop()
        answer = self._waiting[name] = loop.create_future()
        process = self._processes[name] = Process(name, 0, loop.create_future())
        try:
            self._send({**request, "id": name, "one_user": self._one_user}, descriptors)
            process.pid = await answer
        except LaunchError:
            self._processes.pop(name, None)  # its end may have been told already
            raise
        finally:
            del self._waiting[name]
        return process

    def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        packet = json.dumps(message).encode()
        if len(packet) > MAX_MESSAGE_BYTES:
            raise LaunchError("argument list too long", "start")
        self._requests.setblocking(True)
        try:
            socket.send_fds(self._requests, [packet], descriptors)
        except OSError as error:
            raise LaunchError(f"cannot be started: {error}", "internal") from None
        finally:
            self._requests.setblocking(False)

    def _read(self) -> None:
        while True:
            try:
                packet = self._requests.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                sys.stderr.write("the launcher has died, and with it all that it has started\n")
                os._exit(1)
            self._hear(json.loads(packet))

    def _hear(self, message: dict[str, Any]) -> None:
        name = message["id"]
        if "status" in message:
            process = self._processes.pop(name, None)
            if process is not None and not process.status.done():
                process.status.set_result(message["status"])
            return
        answer = self._waiting.get(name)
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(LaunchError(message["error"], message["reason"]))
        else:
            answer.set_result(message["pid"])

    def _watch(self, process: Process) -> None:
        """As the kubelet has it: on cgroup v2 the kernel ends all of a container with one of its processes, on version 1 that one."""
        if self._cgroups is None or not self._together:
            return
        if self._cgroups.version == 2:
            with suppress(OSError):
                (process.groups[0] / "memory.oom.group").write_text("1")
        else:
            task = asyncio.get_running_loop().create_task(self._end_together(process))
            self._guards.add(task)
            task.add_done_callback(self._guards.discard)

    async def _end_together(self, process: Process) -> None:
        while not process.status.done():
            if self._knobs.whole_container and process.out_of_memory:
                self.kill(process, 9)
                return
            await asyncio.sleep(_OOM_POLL_S)


def _clear(groups: list[Path]) -> None:
    kill_all(groups)
    remove(groups)
