"""The faults: workers that die, freeze or are told to end, a network that cuts, a Redis that is killed, doorbells lost and doubled."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from cifixer_exec import AppConfig
from tests.chaos.plan import ADOPTION_BOUND_S, LEASE_S, TERM_BOUND_S, Cut, Life, Options, cut, ends_by_term, life, stream
from tests.chaos.report import Report
from tests.chaos.workers import Worker, Workers, end_gently
from tests.support.redis_proxy import Port, RedisProxy
from tests.support.redis_server import RedisServer

_LOOK_S = 0.03
#: A new worker surely consumes so long after it was forked.
_START_S = 1.0
#: Rings by hand: the last list that has a bell loses all of them, or has one twice.
_BELL = """
for _, list in ipairs(KEYS) do
  local bell = redis.call('LINDEX', list, 0)
  if bell then
    if ARGV[1] == 'lose' then redis.call('DEL', list) else redis.call('LPUSH', list, bell) end
    return 1
  end
end
return 0
"""


@dataclass
class Slot:
    """A place for one worker after the other, each behind the same port of the proxy."""

    number: int
    port: Port
    config: AppConfig
    worker: Worker | None = None
    #: Since when nothing has disturbed it; in the future while something does.
    at_peace_since: float = float("inf")

    @contextmanager
    def trouble(self, afterwards_s: float = 0.0) -> Iterator[None]:
        """For the time of a fault and what follows from it."""
        self.at_peace_since = float("inf")
        try:
            yield
        finally:
            self.at_peace_since = time.monotonic() + afterwards_s


class Fleet:
    """Keeps ``options.workers`` workers alive by replacing each one that dies, as its fate will have it."""

    def __init__(self, options: Options, workers: Workers, slots: list[Slot], redis: Redis, report: Report) -> None:
        self._options = options
        self._workers = workers
        self._slots = slots
        self._redis: Any = redis  # typed for decoded and raw replies at once
        self._prefix = f"{slots[0].config.namespace}:"
        self._report = report
        self._calm = asyncio.Event()
        self._watching: set[asyncio.Task[None]] = set()
        self._by_pid: dict[int, Worker] = {}
        self._slot_of: dict[int, Slot] = {}
        self._read = 0
        self._wake = stream(options.seed, "wake")

    async def run(self) -> None:
        """Until :meth:`calm` was called and every slot has a worker that nothing will happen to."""
        tail = asyncio.create_task(self._follow_points())
        try:
            await asyncio.gather(*(self._live_and_die(slot) for slot in self._slots))
        finally:
            tail.cancel()

    def calm(self) -> None:
        """No new fates."""
        self._calm.set()

    @property
    def quiet(self) -> bool:
        """Whether the last fate has struck."""
        return self._calm.is_set()

    async def _live_and_die(self, slot: Slot) -> None:
        rng = stream(self._options.seed, f"slot/{slot.number}")
        while not self._calm.is_set():
            plan = life(rng, self._options.backend)
            with slot.trouble(_START_S):
                slot.worker = worker = await self._workers.spawn(slot.config, [plan.arm] if plan.arm else [])
            self._by_pid[worker.pid] = worker
            self._slot_of[worker.pid] = slot
            fate = asyncio.create_task(self._strike(worker, plan))
            code = await worker.ended
            slot.at_peace_since = float("inf")
            self._read_points()
            self._watch_adoption(worker)
            fate.cancel()
            await asyncio.gather(fate, return_exceptions=True)
            self._judge(worker, code)
        slot.worker = await self._workers.spawn(slot.config)

    async def _strike(self, worker: Worker, plan: Life) -> None:
        await asyncio.sleep(plan.after_s)
        if plan.fate in ("pause", "freezepoint") and not worker.frozen:
            await self._pause(worker, plan.pause_s, "at random")
        while worker.frozen:  # noqa: ASYNC110  # set by two, and read here alone
            await asyncio.sleep(_LOOK_S)
        if ends_by_term(plan):
            if await end_gently(worker, TERM_BOUND_S) is None:
                self._report.findings.append(f"worker {worker.name} did not end within {TERM_BOUND_S:g} s of SIGTERM")
            return
        if plan.fate in ("pause", "freezepoint"):
            await asyncio.sleep(1.5 * LEASE_S)  # what it does when it is back matters
        worker.signal(signal.SIGKILL, "at random")

    async def _pause(self, worker: Worker, seconds: float, where: str) -> None:
        worker.frozen = True
        self._report.pauses[where] += 1
        with self._slot_of[worker.pid].trouble(LEASE_S):
            worker.signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            worker.signal(signal.SIGCONT)
        worker.frozen = False

    def _judge(self, worker: Worker, code: int) -> None:
        """A worker ends because of us or not at all."""
        if code == -signal.SIGKILL and worker.cause:
            self._report.kills[worker.cause] += 1
        elif code == -signal.SIGTERM and worker.cause == "end" and not worker.began:
            self._report.notes["told to end before they listened"] += 1
        elif code == 0 and worker.cause == "end":
            self._report.terms += 1
        else:
            self._report.findings.append(f"worker {worker.name} ended with {code} ({worker.cause or 'by itself'})")

    async def _follow_points(self) -> None:
        while True:
            self._read_points()
            await asyncio.sleep(_LOOK_S)

    def _read_points(self) -> None:
        """What the failpoints say: count it, and see to it that who froze wakes up."""
        if self._workers.report.exists():
            text = self._workers.report.read_bytes()[self._read :]
            self._read += len(text)
            for line in text.decode().splitlines():
                action, point, pid = line.split(" ")
                self._passed(action, point, self._by_pid[int(pid)])

    def _passed(self, action: str, point: str, worker: Worker) -> None:
        if action == "kill":
            self._report.points[point] += 1
            worker.cause = "at a point"
        else:
            self._keep(self._pause(worker, self._wake.uniform(1.3, 2.6) * LEASE_S, f"at {point}"))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    # --------------------------------------------------------------------------------------------- adoption

    def _watch_adoption(self, worker: Worker) -> None:
        self._keep(self._measure_adoption(worker, time.monotonic()))

    async def _measure_adoption(self, worker: Worker, died: float) -> None:
        """From the death of an owner with open ops to the next owner's take."""
        with suppress(RedisError):
            left = await self._left_by(worker)
            while left and time.monotonic() - died < 20 * ADOPTION_BOUND_S:
                for sandbox_id, epoch in list(left.items()):
                    now = int(await self._get(sandbox_id, "epoch") or 0)
                    if now > epoch:
                        self._note_adoption(sandbox_id, worker, died)
                    if now > epoch or not await self._has_open_ops(sandbox_id):
                        del left[sandbox_id]
                await asyncio.sleep(_LOOK_S)

    def _note_adoption(self, sandbox_id: str, worker: Worker, died: float) -> None:
        """Apart: those for which a worker was there all the time that nothing disturbed."""
        took_s = time.monotonic() - died
        self._report.latencies_s.append(took_s)
        if took_s > 2 * ADOPTION_BOUND_S:
            at_s = died - self._report.began
            self._report.slow_adoptions.append(f"{sandbox_id}: {took_s:.1f} s after {worker.name} died (second {at_s:.1f} of the run)")
        if any(slot.at_peace_since < died for slot in self._slots):
            self._report.calm_latencies_s.append(took_s)

    async def _left_by(self, worker: Worker) -> dict[str, int]:
        names: set[bytes] = await self._redis.smembers(f"{self._prefix}workers")
        wid = next((n.decode() for n in names if n.startswith(f"{worker.name}-".encode())), "")
        owned: set[bytes] = await self._redis.smembers(f"{self._prefix}owned:{wid}")
        ids = [i.decode() for i in owned]
        return {i: int(await self._get(i, "epoch") or 0) for i in ids if await self._has_open_ops(i)}

    async def _get(self, sandbox_id: str, name: str) -> bytes | None:
        value: bytes | None = await self._redis.hget(f"{self._prefix}sandbox:{sandbox_id}", name)
        return value

    async def _has_open_ops(self, sandbox_id: str) -> bool:
        return bool(await self._redis.exists(f"{self._prefix}open:{sandbox_id}"))


class Weather:
    """The faults that strike from outside: network, Redis, doorbells."""

    def __init__(self, options: Options, proxy: RedisProxy, slots: list[Slot], clients: list[Port], server: RedisServer, report: Report):
        self._options = options
        self._proxy = proxy
        self._slots = slots
        self._ports = [("worker", s.port) for s in slots] + [("client", p) for p in clients]
        self._server = server
        self._report = report

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.gather(self._cuts(), self._restarts(), self._bells())

    async def _cuts(self) -> None:
        rng, busy = stream(self._options.seed, "cuts"), set[asyncio.Task[None]]()
        while True:
            await asyncio.sleep(rng.uniform(0.3, 2.0))
            (whose, port), fault = rng.choice(self._ports), cut(rng)
            self._report.cuts[f"{whose} {fault.kind}"] += 1
            busy.add(asyncio.create_task(self._cut(port, fault)))
            for task in [t for t in busy if t.done()]:
                busy.discard(task)
                task.result()  # a defect of the proxy ends the run

    async def _cut(self, port: Port, fault: Cut) -> None:
        with ExitStack() as stack:
            for slot in self._slots:
                if slot.port is port:
                    stack.enter_context(slot.trouble(LEASE_S))
            await self._proxy.do(getattr(port, fault.kind), *fault.arguments)

    async def _restarts(self) -> None:
        """Killed, away for a moment, and back with all that it had acknowledged."""
        rng = stream(self._options.seed, "restarts")
        while True:
            await asyncio.sleep(rng.uniform(15, 35))
            with ExitStack() as stack:
                for slot in self._slots:
                    stack.enter_context(slot.trouble(LEASE_S))
                self._server.stop()
                self._report.redis_restarts += 1
                await asyncio.sleep(rng.uniform(0.1, 1.5))
                await asyncio.shield(asyncio.to_thread(self._server.start))

    async def _bells(self) -> None:
        rng = stream(self._options.seed, "bells")
        while True:
            await asyncio.sleep(rng.uniform(0.5, 2.5))
            what = rng.choice(("lose", "double"))
            with suppress(RedisError, TimeoutError):
                async with asyncio.timeout(3), Redis(host="127.0.0.1", port=self._server.port) as redis:
                    await self._one_bell(redis, what)

    async def _one_bell(self, redis: Any, what: str) -> None:
        """The next that waits anywhere."""
        prefix = f"{self._slots[0].config.namespace}:"
        while True:
            names: set[bytes] = await redis.smembers(f"{prefix}workers")
            lists = [f"{prefix}{n.decode()}.dq2" for n in names]
            lists += [k.decode() async for k in redis.scan_iter(match=f"{prefix}sandbox.*", count=5000)]
            if await redis.eval(_BELL, len(lists), *lists, what):
                self._report.bells[what] += 1
                return
            await asyncio.sleep(0.01)
