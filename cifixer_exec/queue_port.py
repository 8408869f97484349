"""A sandbox through the queue: every call is an op in the journal, carried out by the worker that owns the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from cifixer_exec.channel.frames import Answer
from cifixer_exec.errors import ExecutorError, InvalidRequestError, QueueUnavailableError, SandboxLostError, SandboxNotFoundError
from cifixer_exec.model import NEVER_BEGUN, Command, Ended, ExecRecord, OutputChunk, SandboxSpec
from cifixer_exec.operations import commands_payload, new_op_id, run_time_s
from cifixer_exec.queues import pool_queue
from cifixer_exec.settings import AppConfig
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import End, NewOp, NewSandbox

#: Output larger than this is dropped from Redis soon after its caller has it; less is not worth a round trip.
COLLECT_ABOVE_BYTES = 64 * 1024
#: For a caller who gives up waiting: so long may saying so take.
ABANDON_S = 2.0


class QueuePort:
    """See :class:`cifixer_exec.environment.SandboxPort`. Used on one event loop."""

    def __init__(self, journal: Journal, config: AppConfig, sandbox_id: str, spec: SandboxSpec | None) -> None:
        self._journal = journal
        self._config = config
        self._sandbox_id = sandbox_id
        self._spec = spec

    async def check_exists(self) -> None:
        """Raises SandboxNotFoundError, or SandboxLostError with the cause."""
        record = await self._journal.sandbox(self._sandbox_id)
        if record is None or record.state in ("closed", "closing"):
            raise SandboxNotFoundError(
                f"sandbox {self._sandbox_id!r} is not registered: it was never made, or torn down, or Redis has just lost its data"
                " (then its worker registers it again: ask again in a few seconds)"
            )
        if record.state == "lost":
            raise SandboxLostError(f"sandbox {self._sandbox_id!r} is lost: {record.cause}")

    async def create(self) -> None:
        spec = self._spec
        if spec is None:
            raise SandboxNotFoundError(f"sandbox {self._sandbox_id!r} was attached to, so it cannot be initialised again")
        # The op id follows from the sandbox id, so that a repeated create is the same op.
        op_id = f"create-{self._sandbox_id}"
        try:
            await self._ask(create_op(op_id, spec, wait_s=self._wait_s))
        except (asyncio.CancelledError, QueueUnavailableError):
            with suppress(TimeoutError):  # its own deadlines end what cannot be ended from here
                await asyncio.shield(asyncio.wait_for(self._abandon(op_id), ABANDON_S))
            raise
        await self.check_exists()  # a repeated create of a sandbox that was torn down since is answered with its old success

    async def _abandon(self, op_id: str) -> None:
        """The caller gave up waiting: what may still be made has no user, so it is to go at once, not at the end of its lifetime."""
        with suppress(QueueUnavailableError):
            state = ""
            with suppress(InvalidRequestError):  # Redis does not know the op, and may have forgotten it
                state = await self._journal.cancel(op_id)
            if state != "cancelled":
                await self._journal.submit(self._op("destroy", {}))

    async def destroy(self) -> None:
        await self._ask(self._op("destroy", {}))

    async def start(self, op_id: str, commands: Sequence[Command]) -> None:
        await self._journal.submit(command_op(op_id, self._sandbox_id, commands, wait_s=self._wait_s))

    async def run(self, op_id: str, commands: Sequence[Command]) -> AsyncGenerator[OutputChunk | Ended, None]:
        source = self._journal.submit_and_follow(
            command_op(op_id, self._sandbox_id, commands, wait_s=self._wait_s), patience_s=self._config.redis_patience_s
        )
        async for item in self._until_end(op_id, source):
            yield item

    async def follow(self, op_id: str) -> AsyncGenerator[OutputChunk | Ended, None]:
        record = await self._journal.op(op_id)
        if record is None or record.sandbox_id != self._sandbox_id:
            raise InvalidRequestError(
                f"op {op_id!r} is not known for this sandbox: it was never submitted, or its result was kept long enough", "op_unknown"
            )
        async for item in self._until_end(op_id, self._journal.follow(op_id, patience_s=self._config.redis_patience_s)):
            yield item

    async def pending(self, op_id: str) -> bool:
        """Queued, or taken by a worker that may be just about to start it."""
        record = await self._journal.op(op_id)
        return record is not None and not record.final

    async def call(self, verb: str, arguments: Mapping[str, Any], body: bytes = b"") -> Answer:
        end = await self._ask(self._op(verb, arguments, body))
        return Answer(end.result or {}, end.body)

    async def cancel(self, op_id: str) -> None:
        """Returns when the op is over: a running one has no process left then."""
        if await self._journal.cancel(op_id) in ("queued", "running"):
            async for _ in self._journal.follow(op_id, patience_s=self._config.redis_patience_s):
                pass

    async def extend(self, lifetime_s: float) -> None:
        await self._ask(self._op("extend", {"lifetime_s": lifetime_s}))

    async def close(self) -> None:
        await self._journal.redis.aclose()

    @property
    def _wait_s(self) -> float:
        return self._config.start_timeout_s

    def _op(self, kind: str, payload: Mapping[str, Any], body: bytes = b"") -> NewOp:
        return NewOp(op_id=new_op_id(), sandbox_id=self._sandbox_id, kind=kind, payload=payload, body=body, timeout_s=self._wait_s)

    async def _ask(self, op: NewOp) -> End:
        async for item in self._journal.submit_and_follow(op, patience_s=self._config.redis_patience_s):
            if isinstance(item, End):
                if item.body:
                    await self._journal.drop(op.op_id)  # a piece of a file, which nobody will ask for under this id again
                if item.error is not None:
                    raise item.error
                return item
        raise ExecutorError(f"op {op.op_id} ended without an answer")

    async def _until_end(self, op_id: str, source: AsyncIterator[OutputChunk | End]) -> AsyncGenerator[OutputChunk | Ended, None]:
        size = 0
        async for item in source:
            if isinstance(item, OutputChunk):
                size += len(item.data)
                yield item
                continue
            if size > COLLECT_ABOVE_BYTES:
                await self._journal.collected(op_id)
            yield _ended(item)


def command_op(op_id: str, sandbox_id: str, commands: Sequence[Command], *, wait_s: float) -> NewOp:
    """The op that runs ``commands``; it may wait ``wait_s`` for a worker and then run as long as they may."""
    payload, body = commands_payload(commands)
    run_s = run_time_s(commands)
    return NewOp(op_id=op_id, sandbox_id=sandbox_id, kind="start", payload=payload, body=body, timeout_s=wait_s, run_s=run_s)


def create_op(op_id: str, spec: SandboxSpec, *, wait_s: float) -> NewOp:
    """The op that makes a sandbox, in the pool of its backend."""
    created = NewSandbox(backend=spec.backend, queue=pool_queue(spec.backend), spec=spec.to_json(), lifetime_s=spec.lifetime_s)
    return NewOp(op_id=op_id, sandbox_id=spec.sandbox_id, kind="create", create=created, timeout_s=wait_s)


def _ended(end: End) -> Ended:
    if end.error is not None:
        raise end.error
    if end.state == "cancelled":
        return Ended(records=(NEVER_BEGUN,))
    records = (end.result or {}).get("records") or []
    return Ended(records=tuple(ExecRecord.from_json(r) for r in records))
