"""What a test can order from a running service, over HTTP on a Unix socket: ``POST /<verb>`` with its arguments as JSON."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tests.support.e2b.faults import Fault
from tests.support.e2b.problems import HttpError
from tests.support.e2b.stream import CUTS
from tests.support.verbs import Verbs

if TYPE_CHECKING:
    from tests.support.e2b.process import Machine

Json = dict[str, Any]


class Control(Verbs):
    """Each public method is a verb."""

    refusals = (HttpError,)

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def set(self, **knobs: Any) -> None:
        """Knobs, by name."""
        self._machine.knobs.set(**knobs)

    def reset(self) -> None:
        """The knobs, as in the beginning."""
        self._machine.knobs.reset()

    def add_key(self, team: str) -> str:
        """A further API key, of a team by its name."""
        return self._machine.teams.add(team)

    def revoke_key(self, key: str) -> None:
        """From now on 401."""
        self._machine.teams.revoke(key)

    def fault(self, **order: Any) -> None:
        """See Fault."""
        self._machine.faults.order(Fault(**order))

    def clear_faults(self) -> None:
        """Those that have not been met."""
        self._machine.faults.clear()

    def asked(self) -> Json:
        """Requests by kind, the faults that were met, the creates and the network updates."""
        recorder = self._machine.recorder
        met = dict(self._machine.faults.met)
        return {"requests": dict(recorder.requests), "faults": met, "creates": recorder.creates, "networks": recorder.networks}

    def forget(self) -> None:
        """All of that."""
        recorder = self._machine.recorder
        recorder.requests.clear()
        recorder.creates.clear()
        recorder.networks.clear()
        self._machine.faults.met.clear()

    def cut_streams(self, sandbox: str, how: str = "frame") -> int:
        """All streams of its commands, which go on; how many they were. See stream.CUTS."""
        if how not in CUTS:
            raise ValueError(f"{how}: one of {', '.join(CUTS)}")
        found = list(self._machine.sandboxes.get(sandbox).streams)
        for stream in found:
            stream.cut(how)
        return len(found)

    def cut_connections(self, sandbox: str) -> int:
        """All requests that are under way are reset; what they have started goes on."""
        return self._machine.sandboxes.get(sandbox).cut_connections()

    async def vanish(self, sandbox: str) -> None:
        """Its node dies."""
        await self._machine.sandboxes.vanish(self._machine.sandboxes.get(sandbox))

    def pause(self, sandbox: str) -> None:
        """As by the API."""
        self._machine.sandboxes.pause(self._machine.sandboxes.get(sandbox))

    def freeze(self, sandbox: str = "") -> None:
        """No byte flows to or from its envd; without a name: to new requests at the API."""
        self._machine.frozen(sandbox).freeze()

    def thaw(self, sandbox: str = "") -> None:
        """It goes on where it was."""
        self._machine.frozen(sandbox).thaw()

    async def stop(self, port: str = "api") -> None:
        """``api`` or ``sandbox``: nobody listens, all its connections are reset."""
        await self._machine.listeners[port].close()

    async def start(self, port: str = "api") -> None:
        """There again."""
        await self._machine.listeners[port].open()

    def expire(self, sandbox: str, in_s: float = 0.0) -> None:
        """Its time ends, whatever was agreed."""
        self._machine.sandboxes.get(sandbox).end_in(in_s)

    def pids(self, sandbox: str) -> list[int]:
        """Of all its processes, on this machine."""
        return self._machine.sandboxes.get(sandbox).pids()

    def kill(self, pid: int, number: int = 9) -> None:
        """A signal to one of them, by its number on this machine. Raises LookupError."""
        if not any(pid in sandbox.pids() for sandbox in self._machine.sandboxes.all()):
            raise LookupError(f"no process {pid} in a sandbox")
        os.kill(pid, number)

    def sandboxes(self) -> list[Json]:
        """All of every team, as their owners see them, with ``team`` and ``left_s``."""
        return [{**s.detail(), "team": s.team.name, "left_s": s.left_s} for s in self._machine.sandboxes.all()]

    def left(self) -> Json:
        """Sandboxes, their processes and mounts, and control groups that are there."""
        return self._machine.left()

    def memory_bytes(self) -> int:
        """Resident, of this server."""
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
