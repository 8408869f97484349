"""All that lives in a worker process besides Celery: event loops, lease, janitor, cancel messages, and the ops in progress."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any

from cifixer_exec.channel.portal import Portal
from cifixer_exec.errors import ExecutorError
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import Renewal, SandboxRecord, Taken
from cifixer_exec.worker.execution import Executor
from cifixer_exec.worker.lease import Lease
from cifixer_exec.worker.ownership import Ownership
from cifixer_exec.worker.persistence import persist
from cifixer_exec.worker.tally import Tally

log = logging.getLogger(__name__)
SWEEP_INTERVAL_S = 1.0
CANCEL_CHECK_S = 1.0
PULSE_S = 0.5
#: Pause behind an error; a round waits longer, see RESTORE_INTERVAL_S.
RESTORE_S = 1.0
RESTORE_INTERVAL_S = 30.0
FORGOTTEN_CHECK_S = 5.0
#: An event loop that did not get round to its pulse for so long is stuck, not busy.
STUCK_S = 15.0
DRAIN_LOOK_S = 0.25
#: How long a worker whose lease is in doubt waits before it passes a doorbell on, which may come straight back to it.
DOUBT_S = 0.2

#: What :meth:`WorkerRuntime.handle` answers besides the kind of the op and the reasons of :class:`NotTaken`.
DETACHED, PASSED_ON, BUSY = "detached", "passed on", "busy"

#: Listens for op ids to cancel, for ever; given by the wiring.
Listen = Callable[[Callable[[str], None]], Awaitable[None]]
#: Registers again what Redis has forgotten of this worker's sandboxes; given by the wiring.
Restore = Callable[[], Awaitable[object]]
#: Gives Celery the answer to a raw task whose op has ended; given by whoever knows Celery.
Answer = Callable[[Journal, str], Awaitable[None]]


class WorkerRuntime:
    """One per worker process. ``start`` before the first message is consumed, ``stop`` after the last."""

    def __init__(
        self,
        *,
        wid: str,
        portal: Portal,
        lease_portal: Portal,
        lease: Lease,
        journal: Journal,
        ownership: Ownership,
        executor: Executor,
        listen: Listen,
        restore: Restore,
        answer: Answer,
        close: Callable[[], Coroutine[Any, Any, None]],
        drain_s: float,
        most_ops: int,
        breaker_state: Callable[[], str],
        tally: Tally,
        backend: str,
        placement: str,
    ) -> None:
        self.wid = wid
        self._most_ops = most_ops
        self._breaker_state = breaker_state
        self.tally = tally
        self.backend = backend
        self.placement = placement
        self.journal = journal
        self.portal = portal
        self._lease_portal = lease_portal
        self._lease = lease
        self._ownership = ownership
        self._executor = executor
        self._listen = listen
        self._restore = restore
        self._answer = answer
        self._close = close
        self._drain_s = drain_s
        self._background: list[Future[Any]] = []
        self._active: dict[asyncio.Task[Any], Taken | None] = {}
        self._cancels: dict[str, asyncio.Task[None]] = {}
        self._term = 0
        self._looking = asyncio.Event()
        self._suspects: set[str] = set()
        self._pulse_at = time.monotonic()
        self._draining = False
        self.stopped = False

    def start(self) -> None:
        """Take the lease and begin the background work.

        Raises:
            QueueUnavailableError: no lease, so nothing may be consumed.
        """
        self._term = self._lease_portal.call(self._lease.take()).term
        steps: list[tuple[str, float, Callable[[], Awaitable[None]]]] = [
            ("pulse", PULSE_S, self._beat),
            ("sweep", SWEEP_INTERVAL_S, self._sweep),
            ("cancel check", CANCEL_CHECK_S, self._check_cancelled),
            ("cancel messages", 0.5, lambda: self._listen(self._cancel)),
            ("check of what runs", FORGOTTEN_CHECK_S, self._check_forgotten),
            ("look for what Redis forgot", RESTORE_S, self._look_around),
        ]
        self._background = [self._lease_portal.submit(self._lease.keep())]
        self._background += [self.portal.submit(self._for_ever(*step)) for step in steps]

    def handle(self, op_id: str) -> str:
        """Answer a doorbell, in a pool thread: run the op if it is granted. Returns what was done, for the task's log line."""
        try:
            return self.portal.call(self._handle(op_id))
        except CancelledError:
            return DETACHED

    def serves(self, record: SandboxRecord) -> bool:
        """Whether this worker can reach the sandbox, or make one that nobody has made yet."""
        return record.backend == self.backend and record.placement in ("", self.placement)

    def stop(self) -> None:
        """Drain, then give the lease up. A Redis that is away does not keep a worker from ending: its lease lapses by itself."""
        self._draining = True
        self.portal.call(self._drain())
        for future in self._background:
            future.cancel()
        try:
            log.info("drained: the last %d sandboxes handed over", self.portal.call(self.journal.release(self.wid)))
        except ExecutorError as error:
            log.warning("ended without giving the lease up: %s", error)
        self.stopped = True
        self.portal.call(self._close())
        self._lease_portal.stop()
        self.portal.stop()

    def info(self) -> Mapping[str, Any]:
        """What the lease tells about this worker."""
        return {
            "sandboxes": len(self._ownership),
            "active": len(self._active),
            "draining": self._draining,
            "breaker": self._breaker_state(),
        }

    def responsive(self) -> bool:
        """Whether the event loop that carries ops out still turns."""
        return time.monotonic() - self._pulse_at < STUCK_S

    def lease_valid(self) -> bool:
        """Whether this worker may act as owner."""
        return self._lease.valid()

    def trouble(self) -> str:
        """Why this worker is of no use just now, in a sentence; empty when all is well. Asks nobody, in any thread."""
        if said := self.stuck():
            return said
        return "" if self.lease_valid() else "this worker holds no valid lease: Redis does not answer it, or it starts or ends just now"

    def stuck(self) -> str:
        """Why only a restart would mend this worker; empty when it would not. Asks nobody, in any thread."""
        if self._background and not self.responsive():
            return f"the event loop has not turned for {time.monotonic() - self._pulse_at:.0f} s"
        return ""

    def queue_lengths(self, queues: Sequence[str], *, patience_s: float) -> Mapping[str, int] | None:
        """How many doorbells wait in each; None when that is not known within ``patience_s``. In any thread but the loop's."""
        if not self.portal.alive:
            return None
        future = self.portal.submit(self.journal.queue_lengths(queues))
        try:
            return future.result(patience_s)
        except (ExecutorError, TimeoutError, CancelledError):
            future.cancel()
            return None

    async def _beat(self) -> None:
        self._pulse_at = time.monotonic()

    def lease_changed(self, last: Renewal, now: Renewal) -> None:
        """Called from the lease's loop."""
        if now.term != last.term:
            log.warning("the lease had lapsed: this worker owns nothing any more")
            self.portal.loop.call_soon_threadsafe(self._let_go, now.term)
        self.portal.loop.call_soon_threadsafe(self._looking.set)

    def _let_go(self, term: int) -> None:
        """Whoever owned is fenced now, and what it had in progress was rung for anew. Only from here on the new term is used to take."""
        self._term = term
        for task in self._active:
            task.cancel()
        self._ownership.drop_all()

    async def _look_around(self) -> None:
        """Now and then, and at once when Redis was away: it may have forgotten what this worker knows."""
        self._looking.clear()
        await self._restore()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._looking.wait(), RESTORE_INTERVAL_S)

    async def _handle(self, op_id: str) -> str:
        if self._draining or not self._lease.valid():
            await asyncio.sleep(0 if self._draining else DOUBT_S)
            with suppress(ExecutorError):  # a janitor rings again
                await self.journal.ring(op_id)
            return PASSED_ON
        if len(self._active) >= self._most_ops and await self._is_command(op_id):
            return BUSY  # it stays queued and is rung for again: threads are kept for the ops that end commands and feed them
        task = asyncio.current_task()
        assert task is not None  # always within a task: Portal.call made it
        self._active[task] = None
        try:
            nonce = uuid.uuid4().hex
            term = self._term
            outcome = await persist(lambda: self.journal.take(self.wid, op_id, nonce, term))
            if not isinstance(outcome, Taken):
                return outcome.reason
            self._active[task] = outcome
            if outcome.adopted:
                self.tally.adopted()
            await self._executor.execute(outcome)
        finally:
            self._active.pop(task, None)
        return outcome.kind

    async def _is_command(self, op_id: str) -> bool:
        record = await self.journal.op(op_id)
        return record is not None and record.kind == "start"

    async def _check_forgotten(self) -> None:
        """What the journal says that runs here and does not, twice in a row, goes to whoever takes it: nobody else would ever look."""
        found = {op.op_id: op for op in await self.journal.running(self.wid)}
        missing = set(found) - {taken.op_id for taken in self._active.values() if taken is not None}
        for op in [found[op_id] for op_id in missing & self._suspects]:
            log.error("op %s was to run here and does not: sandbox %s is given up", op.op_id, op.sandbox_id)
            self._ownership.drop(op.sandbox_id, op.epoch)
            await self.journal.hand_over(self.wid, op.sandbox_id, op.epoch)
        self._suspects = missing

    async def _drain(self) -> None:
        """With a peer, commands go on in their sandboxes at once and it attaches to them: nobody reads this worker's queue any more, so
        each second here is one in which its sandboxes stand still. Without one, what runs may end within ``drain_s``. What is left then
        waits in its sandbox for the next owner.
        """
        give_up = time.monotonic() + self._drain_s
        peer = await self._has_peer()
        while True:
            if peer:
                await self._detach("start")
            await self._hand_over_idle()
            if not self._active or time.monotonic() >= give_up:
                break
            await asyncio.wait(list(self._active), timeout=DRAIN_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        await self._detach(*{taken.kind for taken in self._active.values() if taken is not None} - {"create"})
        await self._hand_over_idle()
        await self._detach(None, "create")  # at last: the thread that makes a sandbox cannot be stopped
        self._ownership.drop_all()

    async def _detach(self, *kinds: str | None) -> None:
        """Cancel the ops of these kinds (None: those not granted yet) and wait until they have let go."""
        tasks = [task for task, taken in self._active.items() if (taken.kind if taken is not None else None) in kinds]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _has_peer(self) -> bool:
        """Whether another worker can take over what this one has."""
        try:
            found = await self.journal.workers()
        except ExecutorError:
            return False
        here = (self.backend, self.placement, False)
        return any((w.info["backend"], w.info["placement"], w.info["draining"]) == here for w in found if w.worker_id != self.wid)

    async def _hand_over_idle(self) -> None:
        busy = {taken.sandbox_id for taken in self._active.values() if taken is not None}
        for sandbox_id, epoch in self._ownership.epochs().items():
            if sandbox_id not in busy:
                self._ownership.drop(sandbox_id, epoch)
        with suppress(ExecutorError):  # what is left is handed over with the lease
            await self.journal.leave(self.wid, busy)

    async def _sweep(self) -> None:
        if not self._draining and self._lease.valid():
            for op_id in (await self.journal.sweep(self.wid)).unanswered:
                await self._answer(self.journal, op_id)

    async def _check_cancelled(self) -> None:
        """The pub/sub message may have been missed."""
        for op_id in await self.journal.cancelled_ops(self.wid):
            self._cancel(op_id)

    def _cancel(self, op_id: str) -> None:
        if op_id not in self._cancels:
            task = self._cancels[op_id] = asyncio.ensure_future(self._executor.cancel(op_id))
            task.add_done_callback(lambda _: self._cancels.pop(op_id, None))

    async def _for_ever(self, what: str, interval_s: float, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except ExecutorError as error:
                log.warning("%s: %s", what, error)
            except Exception:
                log.exception("%s failed, and will be tried again", what)
            await asyncio.sleep(interval_s)
