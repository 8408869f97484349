"""Real Celery workers from a zygote, as the driver's event loop sees them: spawn, signals, how each ended."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cifixer_exec import AppConfig
from tests.support.failpoints import Arm


@dataclass(eq=False)
class Worker:
    """One worker process. ``name`` is the beginning of its node name; the boot id is its own."""

    pid: int
    name: str
    log: Path
    arms: tuple[Arm, ...]
    ended: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    #: What the driver did to it last; an end without a cause is a finding.
    cause: str = ""
    frozen: bool = False

    @property
    def alive(self) -> bool:
        """Not reaped yet, so its pid is surely its own."""
        return not self.ended.done()

    def signal(self, number: signal.Signals, cause: str = "") -> bool:
        """Send it if the worker lives."""
        if not self.alive:
            return False
        self.cause = cause or self.cause
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return True

    @property
    def began(self) -> bool:
        """Whether Celery had set up its signal handlers for sure: its banner comes behind that."""
        return "@chaos v" in self.text()

    def text(self) -> str:
        """All it said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Workers:
    """The zygote and its children. ``report`` is where failpoints write."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        self._process = process
        self._directory = directory
        self.report = directory / "failpoints"
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[int]] = {}
        self._alive: dict[int, Worker] = {}
        self._early: dict[int, int] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, directory: Path) -> Self:
        """``directory`` is for logs; sockets and temporary files of the workers go into ``tmp`` below it."""
        (directory / "tmp").mkdir(parents=True, exist_ok=True)
        environ = {k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")} | {"TMPDIR": str(directory / "tmp")}
        with (directory / "zygote.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.support.zygote",
                env=environ,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        return cls(process, directory)

    async def spawn(self, config: AppConfig, arms: Sequence[Arm] = ()) -> Worker:
        """A new worker; it is not ready yet."""
        number = next(self._numbers)
        name = f"w{number}"
        log = self._directory / f"{name}.log"
        request = {
            "number": number,
            "name": name,
            "log": str(log),
            "env": config.to_env(),
            "arms": [arm.to_json() for arm in arms],
            "report": str(self.report),
        }
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = await answer
        worker = Worker(pid, name, log, tuple(arms))
        if pid in self._early:
            worker.ended.set_result(self._early.pop(pid))
        else:
            self._alive[pid] = worker
        return worker

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            event = json.loads(line)
            if "spawned" in event:
                self._asked.pop(event["spawned"]).set_result(event["pid"])
            elif (worker := self._alive.pop(event["pid"], None)) is not None:
                worker.ended.set_result(os.waitstatus_to_exitcode(event["status"]))
            else:
                self._early[event["pid"]] = os.waitstatus_to_exitcode(event["status"])
        for future in self._asked.values():
            future.set_exception(RuntimeError("the zygote is gone: see its log"))

    async def stop(self) -> None:
        """Kill what is left and end the zygote."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reader


async def end_gently(worker: Worker, patience_s: float) -> int | None:
    """SIGTERM and wait; the exit code, or None for one that had to be killed."""
    worker.signal(signal.SIGCONT)
    worker.signal(signal.SIGTERM, "end")
    try:
        return await asyncio.wait_for(asyncio.shield(worker.ended), patience_s)
    except TimeoutError:
        worker.signal(signal.SIGKILL, "end")
        await worker.ended
        return None
