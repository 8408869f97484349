"""One run: start everything, let load and faults meet, let it come to rest, look at what is left."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from kombu.exceptions import OperationalError
from redis.asyncio import Redis

from cifixer_exec import AppConfig
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.wiring import make_journal
from tests.chaos.audit import JournalAudit, KeyAudit
from tests.chaos.beat import Beat
from tests.chaos.faults import Fleet, Slot, Weather
from tests.chaos.load import Load
from tests.chaos.plan import CALL_BOUND_S, COLLECTED_S, DRAIN_S, LEASE_S, RETENTION_S, TERM_BOUND_S, Options
from tests.chaos.platforms import watch_platform
from tests.chaos.report import Report
from tests.chaos.workers import Workers, end_gently
from tests.support.contract_stack import ContractSession, on_backend
from tests.support.redis_proxy import RedisProxy
from tests.support.redis_server import RedisServer, redis_server

_SAY_S = 5.0
_REAP_S = 4.0
_SETTLE_S = 40.0
#: Stories are short, but each call may take its time.
_LAST_STORIES_S = 3 * CALL_BOUND_S
#: What may come behind the faults: the last stories, coming to rest, the end of the workers.
_REST_BOUND_S = _LAST_STORIES_S + _SETTLE_S + 180


class Run:
    """Everything of one run, on one event loop."""

    def __init__(self, options: Options, session: ContractSession, server: RedisServer, say: Callable[[str], object]) -> None:
        self.report = Report(options)
        self.directory = session.state_dir
        self._options = options
        self._session = session
        self._server = server
        self._say = say
        self._config = self._make_config()

    async def run(self) -> Report:
        """Never longer than the options allow and some minutes for the rest."""
        proxy = RedisProxy(self._server.port)
        workers = await Workers.start(self.directory / "run")
        platform = watch_platform(self._session, self._config)
        self._redis = Redis(host="127.0.0.1", port=self._server.port)
        try:
            async with asyncio.timeout(self._options.seconds + _REST_BOUND_S):
                await self._run(proxy, workers)
        except TimeoutError:
            self.report.hung.append("the run itself, which was ended")
        finally:
            await workers.stop()
            await asyncio.to_thread(proxy.close)
            await self._redis.aclose()
            platform.close()
        platform.check(self.report)
        self.report.findings += [f"temporary file {p}" for p in (self.directory / "run/tmp").iterdir()]
        self.report.duration_s = time.monotonic() - self.report.began
        return self.report

    async def _run(self, proxy: RedisProxy, workers: Workers) -> None:
        config = self._config
        slots = [Slot(n, port, config.with_(redis_url=proxy.url(port))) for n in range(self._options.workers) if (port := proxy.port())]
        doors = [proxy.port() for _ in range(2)]
        journal = make_journal(config)
        self._load = Load(self._options, [config.with_(redis_url=proxy.url(d)) for d in doors], journal, self.report)
        self._fleet = Fleet(self._options, workers, slots, self._redis, self.report)
        self._audit = JournalAudit(self._redis, config.namespace, self.report)
        reaping = asyncio.create_task(self._reap(config))
        background = [asyncio.create_task(self._audit.run()), asyncio.create_task(self._tell()), reaping]
        try:
            await self._meet(Weather(self._options, proxy, slots, doors, self._server, self.report))
            await self._settle_platform()
            reaping.cancel()  # before the last look at the queues: nobody would take what is sent after it
            await asyncio.wait([reaping])
            await self._rest(slots)
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await journal.redis.aclose()

    def _make_config(self) -> AppConfig:
        made = AppConfig(
            redis_url=self._server.tcp_url,
            namespace=self._session.namespace,
            state_dir=self.directory / "state",
            lease_s=LEASE_S,
            drain_s=DRAIN_S,
            retention_s=RETENTION_S,
            collected_s=COLLECTED_S,
            creation_grace_s=10.0,
            start_timeout_s=2 * CALL_BOUND_S,
            lifetime_s=600.0,
            worker_concurrency=32,
        )
        return on_backend(self._options.backend, made)

    async def _meet(self, weather: Weather) -> None:
        """Load under faults, until there were enough of them; then the load ends in peace."""
        fleet, load = asyncio.create_task(self._fleet.run()), asyncio.create_task(self._load.run())
        storm = asyncio.create_task(weather.run())
        give_up = time.monotonic() + self._options.seconds
        while self.report.killed < self._options.kills and time.monotonic() < give_up:
            await asyncio.wait([fleet, load, storm], timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            for task in (fleet, load, storm):
                if task.done():
                    await task  # a defect of the engine's own
        self._load.stopping.set()
        await self._end_storm(storm)
        self._fleet.calm()
        try:
            await asyncio.wait_for(asyncio.gather(fleet, load), _LAST_STORIES_S)
        except TimeoutError:
            self.report.hung.append("stories that did not end, although each of their calls is bounded")

    async def _end_storm(self, storm: asyncio.Task[None]) -> None:
        """The cuts that still go on end by themselves, within seconds."""
        storm.cancel()
        await asyncio.gather(storm, return_exceptions=True)
        if self._server.process is None:
            await asyncio.to_thread(self._server.start)

    async def _rest(self, slots: list[Slot]) -> None:
        keys = KeyAudit(self._redis, self._config.namespace, self.report)
        await keys.settle(_SETTLE_S, {slot.worker.name for slot in slots if slot.worker is not None})
        await keys.check_incarnations()
        await self._audit.look()
        self._audit.compare(self._load.book)
        self.report.findings += [f"op {op_id} is not final: {record}" for op_id, record in self._audit.open.items()]
        for slot in slots:
            assert slot.worker is not None
            code = await end_gently(slot.worker, TERM_BOUND_S)
            if code != 0:
                self.report.findings.append(f"the last worker {slot.worker.name} ended with {code} after SIGTERM")
        await keys.check_rest()

    async def _settle_platform(self) -> None:
        """The reaper leaves what is young alone, so its last rounds take a while; what stays is the audit's."""
        backend, give_up = make_backend(self._config), time.monotonic() + self._config.creation_grace_s + 3 * _REAP_S
        while await asyncio.to_thread(backend.list_owned) and time.monotonic() < give_up:  # noqa: ASYNC110  # the platform tells nobody
            await asyncio.sleep(0.25)

    def destroy_rest(self) -> None:
        """Whatever a run that failed or was interrupted did not get to."""
        backend = make_backend(self._config)
        for owned in backend.list_owned():
            backend.destroy(owned.handle)

    async def _tell(self) -> None:
        said = 0
        while True:
            await asyncio.sleep(_SAY_S)
            self._say(self.report.progress())
            for text in self.report.violations[said:]:
                self._say(f"  ! {text}")
            said = len(self.report.violations)

    async def _reap(self, config: AppConfig) -> None:
        """What a creation that was given up left behind goes by the reaper, in a worker, which may die of it."""
        beat = Beat(config)
        try:
            while True:
                await asyncio.sleep(_REAP_S)
                with suppress(OperationalError):
                    await asyncio.to_thread(beat.reap, _REAP_S)
        finally:
            beat.close()


def run_chaos(options: Options, say: Callable[[str], object] = print, keep: Path | None = None) -> Report:
    """A whole run. What workers and Redis left of one with violations is copied to ``keep``; nothing else stays."""
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as server:
        session = ContractSession(server.tcp_url, f"ch{uuid4().hex[:8]}")
        run = Run(options, session, server, say)
        try:
            return asyncio.run(run.run())
        finally:
            if keep is not None and (run.report.violations or sys.exc_info()[1] is not None):
                _keep(run, server, keep)
            run.destroy_rest()
            session.remove()


def _keep(run: Run, server: RedisServer, keep: Path) -> None:
    shutil.copytree(run.directory / "run", keep, dirs_exist_ok=True)
    shutil.copytree(server.directory, keep / "redis", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
