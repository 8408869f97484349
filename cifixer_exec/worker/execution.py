"""Carrying out one granted op: make, run, ask, end; and the truth about it into the journal."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from cifixer_exec.backends.base import Backend
from cifixer_exec.backends.threads import asking, creating
from cifixer_exec.channel.connection import EpochStaleError
from cifixer_exec.errors import (
    BackendError,
    BackendUnavailableError,
    ExecutorError,
    OutcomeUnknownError,
    SandboxLostError,
    SandboxStartError,
    error_to_json,
)
from cifixer_exec.model import NEVER_BEGUN, Ended, OutputChunk, SandboxHandle, SandboxSpec, Status
from cifixer_exec.operations import commands_from
from cifixer_exec.queues import placement_queue
from cifixer_exec.sandbox import SandboxSession, with_boot_id
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import Taken
from cifixer_exec.worker.ownership import Ownership
from cifixer_exec.worker.persistence import persist
from cifixer_exec.worker.publisher import FencedError, Publisher
from cifixer_exec.worker.tally import DONE, FAILED, Tally

log = logging.getLogger(__name__)
T = TypeVar("T")

#: A runner that refuses its registered owner gets so many chances, with a pause before each: about 4 s.
MOST_ATTEMPTS_WHEN_STALE = 8
STALE_PAUSE_S = 0.5


@dataclass(frozen=True)
class _Running:
    """A command op in progress, as :meth:`Executor.cancel` needs it."""

    session: SandboxSession
    commands: int


class Executor:
    """Runs ops on the worker's event loop."""

    def __init__(
        self,
        *,
        journal: Journal,
        backend: Backend,
        ownership: Ownership,
        wid: str,
        tally: Tally,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._backend = backend
        self._ownership = ownership
        self._wid = wid
        self._tally = tally
        self._clock = clock
        #: How the op of a ``Taken`` ended, by the identity of that object, until :meth:`execute` has told the tally.
        self._outcomes: dict[int, str] = {}
        self._running: dict[str, _Running] = {}
        self._closing: set[str] = set()
        self._kinds: dict[str, Callable[[Taken], Awaitable[None]]] = {
            "create": self._create,
            "destroy": self._destroy,
            "start": self._start,
            "extend": self._extend,
        }

    async def execute(self, taken: Taken) -> None:
        """Carry out ``taken`` and record its end. Never raises for what went wrong with the op itself."""
        begun_s = self._clock()
        try:
            await self._carry_out(taken)
        finally:
            outcome = self._outcomes.pop(id(taken), "")
            if outcome:
                self._tally.ended(taken.kind, outcome, self._clock() - begun_s)

    async def _carry_out(self, taken: Taken) -> None:
        try:
            await self._kinds.get(taken.kind, self._call)(taken)
        except FencedError:
            log.warning("op %s: fenced by Redis, another worker owns sandbox %s now", taken.op_id, taken.sandbox_id)
            self._ownership.drop(taken.sandbox_id, taken.epoch)
        except EpochStaleError:
            log.warning("op %s: fenced by the runner, another worker owns sandbox %s now", taken.op_id, taken.sandbox_id)
            await self._superseded(taken)
        except ExecutorError as error:
            await self._failed(taken, error)
        except Exception as error:
            # A defect of ours must not leave the caller waiting; its text may hold what the sandbox sent, so only the type is told.
            log.exception("op %s (%s) failed in the worker", taken.op_id, taken.kind)
            await self._fail(taken, ExecutorError(f"the worker failed with {type(error).__name__} on op {taken.op_id}: see its log"))

    async def _failed(self, taken: Taken, error: ExecutorError) -> None:
        if taken.adopted and isinstance(error, BackendUnavailableError):  # it tells of this attempt, and there was an earlier one
            error = OutcomeUnknownError(f"its first worker died, and whether it was done cannot be found out: {error}")
        try:
            if isinstance(error, SandboxLostError):
                await self._lost(taken, str(error))
            await self._fail(taken, error)
        except FencedError:
            log.warning("op %s: fenced, another worker owns sandbox %s now", taken.op_id, taken.sandbox_id)

    async def _superseded(self, taken: Taken) -> None:
        """The runner has seen a newer owner. If the registry has not, one of them is wrong: Redis forgot, its clock was set back, or
        hostile code answers for the runner. A new epoch helps in all cases but the last, and the caller must not wait for ever.
        """
        self._ownership.drop(taken.sandbox_id, taken.epoch)
        if taken.attempt >= MOST_ATTEMPTS_WHEN_STALE:
            await self._failed(taken, SandboxLostError("the sandbox's runner claims a newer owner again and again, and there is none"))
            return
        await asyncio.sleep(STALE_PAUSE_S)
        if await persist(lambda: self._journal.hand_over(self._wid, taken.sandbox_id, taken.epoch)):
            log.warning("sandbox %s: its runner knows a newer owner than the registry; it gets a new epoch", taken.sandbox_id)

    async def cancel(self, op_id: str) -> None:
        """Kill the commands of an op, if this worker runs it."""
        running = self._running.get(op_id)
        if running is not None:
            with suppress(ExecutorError, EpochStaleError):
                await running.session.cancel(op_id, running.commands)

    async def _create(self, taken: Taken) -> None:
        if taken.handle is not None:
            # It was made and registered, and others may have used it: if it is gone, a new one in its place would be a lie.
            await self._ownership.session(taken).channel.connect()
            await self._done(taken, taken.handle)
            return
        spec = SandboxSpec.from_json(taken.spec)
        # A thread cannot be cancelled: a drain waits for it, because an adopter must find the sandbox made or not begun.
        handle = await finished(creating(self._backend.create, spec))
        try:
            hello = await self._ownership.add(taken, handle).channel.connect()
        except ExecutorError as error:
            if isinstance(error, SandboxLostError):  # nothing can have run in it yet
                error = SandboxStartError(f"it was lost before it was ready: {error}", error.code)
            await self._unmake(taken, handle, error)
            return
        handle = with_boot_id(handle, hello)
        queue = placement_queue(handle.backend, handle.placement)
        registered = await persist(
            lambda: self._journal.ready(
                self._wid, taken.sandbox_id, taken.epoch, handle=handle.to_json(), placement=handle.placement, queue=queue
            )
        )
        if not registered:
            # Another worker may have adopted the creation: the sandbox is the same one (its name is), so it is not ours to destroy.
            raise FencedError
        self._ownership.remember(handle, taken.spec)
        await self._done(taken, handle.to_json())

    async def _unmake(self, taken: Taken, handle: SandboxHandle, error: ExecutorError) -> None:
        """Redis first: once another worker has adopted the creation, the sandbox is that one's."""
        self._ownership.drop(taken.sandbox_id, taken.epoch)
        if await self._fail(taken, error):
            await asking(self._backend.destroy, handle)

    async def _destroy(self, taken: Taken) -> None:
        self._closing.add(taken.sandbox_id)  # commands that die of it must not report a lost sandbox
        try:
            await self._tear_down(taken)
        finally:
            self._closing.discard(taken.sandbox_id)

    async def _tear_down(self, taken: Taken) -> None:
        self._ownership.drop(taken.sandbox_id, taken.epoch)
        if taken.handle is not None:
            handle = SandboxHandle.from_json(taken.handle)
        else:
            handle = SandboxHandle(backend=self._backend.name, sandbox_id=taken.sandbox_id, placement=self._backend.placement)
        await asking(self._backend.destroy, handle)
        closed = await self._close(taken, state="closed", cause="its user asked for that")
        if not closed:
            raise FencedError
        self._ownership.forget(taken.sandbox_id)
        await self._done(taken, {})

    async def _start(self, taken: Taken) -> None:
        commands = commands_from(taken.payload, taken.body)
        session = self._ownership.session(taken)
        if taken.cancel and not await session.has_begun(taken.op_id):
            await self._done(taken, {"records": [NEVER_BEGUN.to_json()]})
            return
        publisher = Publisher(lambda chunks: persist(lambda: self._journal.publish(self._wid, taken.op_id, taken.epoch, chunks)))
        running = self._running[taken.op_id] = _Running(session, len(commands))
        cancelling = asyncio.create_task(self.cancel(taken.op_id)) if taken.cancel else None
        try:
            async with aclosing(session.run(taken.op_id, commands, begun=taken.adopted)) as items:
                async for item in items:
                    if isinstance(item, OutputChunk):
                        await publisher.add(item)
                    else:
                        await self._ended(taken, item, await publisher.rest())
        finally:
            # After a lapse the same op may have been taken again by this very worker: its entry must stay.
            if self._running.get(taken.op_id) is running:
                del self._running[taken.op_id]
            if cancelling is not None:
                cancelling.cancel()

    async def _ended(self, taken: Taken, ended: Ended, rest: list[OutputChunk]) -> None:
        lost = next((r.cause for r in ended.records if r.status is Status.SANDBOX_LOST), None)
        if lost is not None:
            await self._lost(taken, lost)
        await self._done(taken, {"records": [r.to_json() for r in ended.records]}, chunks=rest)

    async def _extend(self, taken: Taken) -> None:
        lifetime_s = float(taken.payload["lifetime_s"])
        await self._ownership.session(taken).extend(lifetime_s)
        if not await persist(lambda: self._journal.set_expiry(taken.sandbox_id, lifetime_s, wid=self._wid, epoch=taken.epoch)):
            raise FencedError
        await self._done(taken, {})

    async def _call(self, taken: Taken) -> None:
        answer = await self._ownership.session(taken).call(taken.kind, taken.payload, taken.body, request_id=taken.op_id)
        await self._done(taken, answer.document, body=answer.body)

    async def _done(self, taken: Taken, result: Mapping[str, Any], *, body: bytes = b"", chunks: list[OutputChunk] | None = None) -> None:
        written = await persist(
            lambda: self._journal.finish(self._wid, taken.op_id, taken.epoch, state="done", result=result, body=body, chunks=chunks or ())
        )
        if not written:
            raise FencedError
        records = result.get("records")
        self._outcomes[id(taken)] = str(records[-1]["status"]) if records else DONE

    async def _fail(self, taken: Taken, error: ExecutorError) -> bool:
        written = await persist(
            lambda: self._journal.finish(self._wid, taken.op_id, taken.epoch, state="failed", error=error_to_json(error))
        )
        if not written:
            log.warning("op %s: its failure was not recorded, another worker owns it now", taken.op_id)
        else:
            self._outcomes[id(taken)] = FAILED
        return written

    async def _close(self, taken: Taken, *, state: str, cause: str) -> bool:
        return await persist(
            lambda: self._journal.close(taken.sandbox_id, state=state, cause=cause, wid=self._wid, epoch=taken.epoch, keep_op=taken.op_id)
        )

    async def _lost(self, taken: Taken, cause: str) -> None:
        """Close the registry entry; what is left on the platform goes too, so that a lost sandbox leaves nothing behind.

        Raises:
            FencedError: another worker owns the sandbox, and may well reach it: it is not ours to declare lost or to remove.
        """
        if taken.sandbox_id in self._closing:
            return
        self._ownership.drop(taken.sandbox_id, taken.epoch)
        if not await self._close(taken, state="lost", cause=cause):
            raise FencedError
        self._ownership.forget(taken.sandbox_id)
        if taken.handle is not None:
            try:
                await asking(self._backend.destroy, SandboxHandle.from_json(taken.handle))
            except BackendError as error:
                log.warning("lost sandbox %s could not be removed now, the reaper will: %s", taken.sandbox_id, error)
            except Exception:
                log.exception("lost sandbox %s could not be removed now, the reaper will", taken.sandbox_id)


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which goes on to its end even if the caller is cancelled meanwhile; then the cancellation follows."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
