"""The process of a service: its mounts, its launcher, its listeners."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.e2b.api import Api
from tests.support.e2b.control import Control
from tests.support.e2b.envd import Envd
from tests.support.e2b.faults import Faults
from tests.support.e2b.knobs import Knobs
from tests.support.e2b.launcher import SandboxLauncher
from tests.support.e2b.listener import Listener
from tests.support.e2b.recorder import Recorder
from tests.support.e2b.sandbox import Sandbox
from tests.support.e2b.sandboxes import Sandboxes
from tests.support.e2b.teams import Teams
from tests.support.kubernetes.knobs import Knobs as RuntimeKnobs
from tests.support.kubernetes.launcher import start_launcher
from tests.support.kubernetes.process import end_of_input, enter_namespaces, say
from tests.support.kubernetes.runtime import Runtime


class Machine:
    """Everything of a service."""

    def __init__(self, directory: Path, requests: socket.socket) -> None:
        name = f"stand-in-{directory.name}"
        self.knobs = Knobs()
        self.teams = Teams()
        self.faults = Faults()
        self.recorder = Recorder()
        self.runtime = Runtime(requests, RuntimeKnobs(), name=name, one_user=False, together=False)
        self.sandboxes = Sandboxes(self.runtime, self.knobs, directory)
        api = Api(self.sandboxes, self.teams, self.knobs, self.recorder)
        self.listeners = {
            "api": Listener(api.routes(), self.faults, self.recorder),
            "sandbox": Listener(Envd(self.sandboxes).routes(), self.faults, self.recorder),
        }

    def frozen(self, sandbox: str) -> Sandbox | Listener:
        """What is frozen and thawed by that name."""
        return self.sandboxes.get(sandbox) if sandbox else self.listeners["api"]

    def left(self) -> dict[str, Any]:
        """By kind."""
        found = self.sandboxes.all()
        pids = sorted({pid for sandbox in found for pid in sandbox.pids()} | set(self.runtime.processes()))
        mounts = [f"{pid}:{line}" for pid in self.runtime.processes() for line in _mounts(pid)]
        return {"sandboxes": sorted(s.id for s in found), "processes": pids, "mounts": mounts, "groups": self.runtime.groups()}


def _mounts(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/mounts").read_text().splitlines()
    return []


def main(directory: Path) -> None:
    """Tells on standard output where it is, or why it cannot be; ends when its standard input does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever started it ends it in order
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    words = "E2B sandboxes as local processes have several users, so they need root that may make namespaces"
    try:
        if os.geteuid() != 0 or enter_namespaces():
            say(error=words)
            return
        requests, _ = start_launcher(SandboxLauncher)
    except OSError as error:
        say(error=f"{words}: {error}")
        return
    asyncio.run(_serve(directory, requests))


async def _serve(directory: Path, requests: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    (directory / "root").mkdir()
    machine = Machine(directory, requests)
    machine.runtime.attach(loop)
    for listener in machine.listeners.values():
        await listener.open()
    runner = web.AppRunner(Control(machine).application(), access_log=None)
    await runner.setup()
    await web.UnixSite(runner, str(directory / "control")).start()
    evictor = loop.create_task(machine.sandboxes.evict())
    ports = {name: listener.port for name, listener in machine.listeners.items()}
    say(ports=ports, key=machine.teams.add("default"), limited=machine.runtime.limited)
    ended = loop.create_task(end_of_input(loop))
    await asyncio.wait({ended, evictor}, return_when=asyncio.FIRST_COMPLETED)
    await _end(machine, runner, evictor)
    shutil.rmtree(directory, ignore_errors=True)


async def _end(machine: Machine, runner: web.AppRunner, evictor: asyncio.Task[None]) -> None:
    if evictor.done():
        sys.stderr.write(f"the evictor has died: {evictor.exception()!r}\n")
    evictor.cancel()
    for listener in machine.listeners.values():
        await listener.close()
    await machine.sandboxes.close()
    await runner.cleanup()
    machine.runtime.close()
