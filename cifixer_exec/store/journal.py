"""The journal of ops and the registry of sandboxes: every verb of ``journal.lua`` as a typed coroutine.

Clients submit, cancel and follow; workers hold a lease, take, publish and finish; every worker sweeps. All verbs may be
repeated after a lost reply. All raise :class:`~cifixer_exec.errors.QueueUnavailableError` if Redis cannot do its part.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from cifixer_exec.errors import InvalidRequestError, error_from_json
from cifixer_exec.model import OutputChunk
from cifixer_exec.store import doorbell, records, streams
from cifixer_exec.store.keys import Keys, check_queue, check_worker_id
from cifixer_exec.store.records import (
    End,
    Entry,
    NewOp,
    NotTaken,
    OpRecord,
    Renewal,
    RunningOp,
    SandboxRecord,
    Submitted,
    Swept,
    Taken,
    WorkerRecord,
)
from cifixer_exec.store.redis_errors import translated
from cifixer_exec.store.script import Script

T = TypeVar("T")

#: Chunks per Lua call: four arguments each, and Lua can unpack about 8000.
_CHUNKS_PER_CALL = 1000
_KEYS_PER_UNLINK = 1000
_TELL_S = 1.0
#: How long a doorbell may go unanswered before who waits for the op rings again.
_REPING_MS = 2000


class Journal:
    """The one entrance to what Redis holds in ``namespace``.

    A final op is kept ``retention_s``, and ``collected_s`` once its caller has the result. ``redis`` must not decode
    responses (:func:`~cifixer_exec.store.connection.connect`) and stays the caller's to close.

    A server that has answered once is waited for up to ``patience_s`` seconds when its connection is lost: every verb may be
    repeated. One that never answered is told of at once: its address may be wrong.
    """

    def __init__(
        self, redis: Redis, *, namespace: str, retention_s: float = 86400, collected_s: float = 600, patience_s: float = 0.0
    ) -> None:
        self.keys = Keys(namespace)
        self._redis = redis
        #: The client, for its owner to close.
        self.redis = redis
        self._collected_ms = records.milliseconds(collected_s)
        self._script = Script(redis, namespace, records.milliseconds(retention_s))
        self._patience_s = patience_s
        self._reached = False

    async def _patiently(self, step: Callable[[], Awaitable[T]]) -> T:
        patience = streams.Patience(self._redis, self._patience_s if self._reached else 0.0)
        with translated(self._redis):
            while True:
                try:
                    answer = await step()
                except streams.LOST as error:
                    await patience.wait(error)
                else:
                    self._reached = True
                    return answer

    async def _call(self, verb: str, *arguments: bytes | str | int) -> list[Any]:
        return _checked(await self._patiently(lambda: self._script(verb, *arguments)))

    def _reader(self, op_id: str) -> streams.Reader:
        return streams.Reader(self._redis, self.keys, op_id, lambda: self._script("tend", op_id, _REPING_MS))

    # ------------------------------------------------------------------------------------------------- clients

    async def submit(self, op: NewOp) -> Submitted:
        """Write an op and ring for it. A known op id with the same payload is answered with its state.

        Raises:
            InvalidRequestError: too big, or a wrong id; nothing was sent.
            OperationConflictError: the op id is known with another payload, or the sandbox id is in use.
            SandboxNotFoundError: no such sandbox, or it was torn down.
            SandboxLostError: the sandbox is lost; the message has the cause.
        """
        return _submitted(await self._call("submit", *_submit_arguments(op)))

    def submit_and_follow(self, op: NewOp, *, patience_s: float = 60.0) -> AsyncIterator[OutputChunk | End]:
        """:meth:`submit` and :meth:`follow` with one write: for short ops the quickest way.

        Raises:
            as both do, at the first step of the iteration.
        """
        command = self._script.command("submit", *_submit_arguments(op))

        async def submit() -> None:
            await self.submit(op)

        def check(reply: list[Any]) -> None:
            self._reached = True
            _checked(reply)

        return streams.submit_and_follow(self._reader(op.op_id), command, check, submit, patience_s=patience_s)

    async def cancel(self, op_id: str) -> str:
        """Cancel a queued op at once; tell the owner of a running one. Returns the state it is in now.

        Raises:
            InvalidRequestError: the op is not known.
        """
        return str((await self._call("cancel", op_id))[1].decode())

    async def collected(self, op_id: str) -> None:
        """The caller has the result: a final op and its output need not be kept long. If this cannot be told, they are. Never raises."""
        await self._tell("collected", op_id, self._collected_ms)

    async def drop(self, op_id: str) -> None:
        """Nobody will ask for the op again: a final one goes now, with its output; else later. Never raises."""
        await self._tell("collected", op_id, 0)

    async def _tell(self, verb: str, *arguments: str | int) -> None:
        """Whoever has a result must not wait for this, nor lose it by this."""
        with suppress(RedisError, TimeoutError):
            async with asyncio.timeout(_TELL_S):
                await self._script(verb, *arguments)

    async def read(self, op_id: str, *, after: str = "0", block_s: float = 5.0) -> list[Entry]:
        """The next entries of an op's stream, waiting up to ``block_s`` (0: not at all) for the first."""
        with translated(self._redis):
            return await self._reader(op_id).read(after, block_s)

    def follow(self, op_id: str, *, after: str = "0", patience_s: float = 60.0) -> AsyncIterator[OutputChunk | End]:
        """Output as it comes, each byte once, then one :class:`End`. What an adopted op repeats is left out.

        A lost connection is mended for up to ``patience_s`` seconds. ``after`` is the id of an entry to go on from.

        Raises:
            QueueUnavailableError: Redis stays away, or the op is not (or no longer) in the journal.
        """
        return streams.follow(self._reader(op_id), after=after, patience_s=patience_s)

    # ------------------------------------------------------------------------------------------------- workers

    async def renew(self, wid: str, ttl_s: float, info: Mapping[str, Any]) -> Renewal:
        """Take or renew the lease.

        After a lapse nothing is owned any more: what ran goes on in its sandbox and is adopted under a higher epoch.
        """
        text = records.dumps(info, "the worker's info")
        _, term, born_ms = await self._call("renew", check_worker_id(wid), records.milliseconds(ttl_s), text)
        return Renewal(term=int(term), born_ms=int(born_ms))

    async def holds(self, wid: str) -> bool:
        """True if the worker's lease lives."""
        with translated(self._redis):
            return bool(await self._redis.exists(self.keys.worker(wid)))

    async def release(self, wid: str) -> int:
        """Give the lease up and hand all sandboxes to their pools. Returns how many."""
        return int((await self._call("release", wid))[1])

    async def hand_over(self, wid: str, sandbox_id: str, epoch: int) -> bool:
        """Hand one sandbox to its pool while the lease goes on (drain). False if it is not the worker's."""
        return _done(await self._call("hand_over", wid, sandbox_id, epoch))

    async def leave(self, wid: str, keep: Iterable[str] = ()) -> int:
        """Hand over all sandboxes of a worker but ``keep`` while its lease goes on (drain). Returns how many."""
        return int((await self._call("leave", wid, *keep))[1])

    async def running(self, wid: str) -> list[RunningOp]:
        """What the journal says that the worker runs."""
        found = await self._call("running", wid)
        return [RunningOp(op_id=o.decode(), sandbox_id=s.decode(), epoch=int(e)) for o, s, e in zip(*[iter(found)] * 3, strict=True)]

    async def take(self, wid: str, op_id: str, nonce: str, term: int) -> Taken | NotTaken:
        """Answer a doorbell: a grant to run the op, or why not. The same ``nonce`` gets the same grant again.

        ``term``: of the lease that the worker knew when it heard the doorbell; under another one it is fenced.
        """
        reply = await self._call("take", wid, op_id, nonce, term)
        if reply[0] == b"taken":
            return records.taken_from(op_id, reply[1:])
        return NotTaken(reason=reply[1].decode())

    async def ring(self, op_id: str) -> bool:
        """Ring again for an op whose doorbell the worker cannot answer (it drains). False if the op needs none."""
        return _done(await self._call("ring", op_id))

    async def publish(self, wid: str, op_id: str, epoch: int, chunks: Sequence[OutputChunk]) -> bool:
        """Add output to the op's stream. False if fenced: then another worker has the sandbox, or the op is over."""
        for part in _parts(chunks):
            if not _done(await self._call("publish", wid, op_id, epoch, *records.chunk_arguments(part))):
                return False
        return True

    async def finish(
        self,
        wid: str,
        op_id: str,
        epoch: int,
        *,
        state: records.OpState,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        body: bytes = b"",
        chunks: Sequence[OutputChunk] = (),
    ) -> bool:
        """End an op with the last of its output. False if fenced; True again for a repetition.

        A ``create`` that ends other than ``done`` closes its sandbox.

        Raises:
            InvalidRequestError: the state is not final, or result and error do not fit it.
        """
        if state not in records.FINAL_STATES or (state == "failed") != (error is not None):
            raise InvalidRequestError(
                f"op {op_id} cannot end as {state!r} with error={error!r}: an error belongs to 'failed', and only there"
            )
        *first, last = _parts(chunks) or [()]
        for part in first:
            if not await self.publish(wid, op_id, epoch, part):
                return False
        text = json.dumps(error if error is not None else result or {}, separators=(",", ":"))
        arguments = records.chunk_arguments(last)
        return _done(await self._call("finish", wid, op_id, epoch, state, text, body, *arguments))

    async def cancelled_ops(self, wid: str) -> list[str]:
        """The ops this worker runs whose cancellation is wanted (the published message may have been missed)."""
        return [op_id.decode() for op_id in await self._call("cancelled_ops", wid)]

    async def ready(self, wid: str, sandbox_id: str, epoch: int, *, handle: Mapping[str, Any], placement: str, queue: str) -> bool:
        """The sandbox exists: register how to reach it, and ring for the ops that waited. False if fenced: destroy it."""
        text = records.dumps(handle, "the sandbox's handle")
        return _done(await self._call("ready", wid, sandbox_id, epoch, text, placement, check_queue(queue)))

    async def close(
        self, sandbox_id: str, *, state: str, cause: str, wid: str | None = None, epoch: int | None = None, keep_op: str = ""
    ) -> bool:
        """End a sandbox ('closed' or 'lost') and all its open ops but ``keep_op``, which the caller finishes itself.

        Without ``wid`` there is no fence (reaper). False if fenced or unknown; True again for one that is over.
        """
        if state not in ("closed", "lost"):
            raise InvalidRequestError(f"a sandbox cannot end as {state!r}: give 'closed' or 'lost'")
        fence = (wid or "", "" if epoch is None else epoch)
        return _done(await self._call("close", sandbox_id, state, cause, *fence, keep_op))

    async def set_expiry(self, sandbox_id: str, expires_in_s: float, *, wid: str, epoch: int) -> bool:
        """Move the end of a sandbox's life to ``expires_in_s`` seconds from now. False if fenced.

        Raises:
            SandboxNotFoundError: no such sandbox, or it was or is being torn down.
            SandboxLostError: it is lost.
        """
        return _done(await self._call("set_expiry", sandbox_id, records.milliseconds(expires_in_s), wid, epoch))

    async def restore(self, record: SandboxRecord) -> bool:
        """Register a living sandbox again that Redis has forgotten. False if it is registered, over, or past its expiry."""
        spec, handle = records.dumps(record.spec, "the sandbox's spec"), records.dumps(record.handle, "the sandbox's handle")
        place = (record.backend, record.placement, check_queue(record.queue))
        times = (record.created_ms, record.expires_ms)
        return _done(await self._call("restore", record.sandbox_id, *place, spec, handle, *times))

    async def queue_lengths(self, queues: Sequence[str]) -> dict[str, int]:
        """How many messages wait in each of these Celery queues."""
        with translated(self.redis):
            async with self.redis.pipeline(transaction=False) as pipeline:
                for queue in queues:
                    pipeline.llen(self.keys.queue(queue))
                return dict(zip(queues, await pipeline.execute(), strict=True))

    async def age_s(self) -> float:
        """How long this registry has been there. A young one may have lost what it knew with its Redis."""
        return int((await self._call("age"))[1]) / 1000

    async def answered(self, op_id: str) -> None:
        """Celery's result backend has the answer to a raw task."""
        await self._call("answered", op_id)

    async def sweep(self, wid: str, *, limit: int = 200, reping_s: float = 2.0) -> Swept:
        """The janitor's round: ring lost doorbells again, end what is overdue, clean up after dead workers."""
        word, rung, expired, cleaned, unanswered = await self._call("sweep", wid, limit, records.milliseconds(reping_s))
        answers = tuple(op_id.decode() for op_id in unanswered)
        return Swept(rung=rung, expired=expired, cleaned=cleaned, unanswered=answers, locked=word == b"locked")

    # ------------------------------------------------------------------------------------------------- reading

    async def op(self, op_id: str) -> OpRecord | None:
        """The op as it stands; None if it is not (or no longer) known."""
        return records.op_from(op_id, await self._patiently(lambda: cast(Any, self._redis.hgetall(self.keys.op(op_id)))))

    async def sandbox(self, sandbox_id: str) -> SandboxRecord | None:
        """The sandbox as registered; None if it is not (or no longer) known."""
        found = await self._sandboxes([sandbox_id])
        return found[0] if found else None

    async def sandboxes(self) -> list[SandboxRecord]:
        """All sandboxes that are neither closed nor lost, by expiry."""
        with translated(self._redis):
            ids = await cast(Any, self._redis.zrange(self.keys.sandboxes, 0, -1))
        return await self._sandboxes(i.decode() for i in ids)

    async def unowned(self) -> list[SandboxRecord]:
        """Those that an owner has left and nobody has taken since."""
        ids = await self._patiently(lambda: cast(Any, self._redis.smembers(self.keys.unowned)))
        return await self._sandboxes(i.decode() for i in ids)

    async def known_sandboxes(self, sandbox_ids: Iterable[str]) -> list[SandboxRecord]:
        """Those of ``sandbox_ids`` that are registered, over or not."""
        return await self._sandboxes(sandbox_ids)

    async def _sandboxes(self, ids: Iterable[str]) -> list[SandboxRecord]:
        wanted = list(ids)

        async def load() -> list[dict[bytes, bytes]]:
            async with self._redis.pipeline(transaction=False) as pipe:
                for sandbox_id in wanted:
                    pipe.hgetall(self.keys.sandbox(sandbox_id))
                return await pipe.execute()

        hashes = await self._patiently(load)
        return [record for i, data in zip(wanted, hashes, strict=True) if (record := records.sandbox_from(i, data))]

    async def workers(self) -> list[WorkerRecord]:
        """The workers whose lease lives, by id."""
        with translated(self._redis):
            ids = sorted(i.decode() for i in await cast(Any, self._redis.smembers(self.keys.workers)))
            infos = await self._redis.mget([self.keys.worker(i) for i in ids]) if ids else []
        return [WorkerRecord(worker_id=i, info=json.loads(info)) for i, info in zip(ids, infos, strict=True) if info is not None]

    async def purge(self) -> int:
        """Delete every key of the namespace, Celery's too. Returns how many. For tests and for taking down an installation."""
        count = 0
        with translated(self._redis):
            batch: list[bytes] = []
            async for key in self._redis.scan_iter(match=f"{self.keys.prefix}*", count=_KEYS_PER_UNLINK):
                batch.append(key)
                if len(batch) >= _KEYS_PER_UNLINK:
                    count += await self._redis.unlink(*batch)
                    batch.clear()
            if batch:
                count += await self._redis.unlink(*batch)
        return count


def _submit_arguments(op: NewOp) -> list[bytes | str | int]:
    first, last = records.submit_arguments(op), records.sandbox_arguments(op.create)
    return [*first, doorbell.template(op.sandbox_id, op.op_id), *last]


def _submitted(reply: Sequence[Any]) -> Submitted:
    return Submitted(created=reply[0] == b"created", state=reply[1].decode())


def _checked(reply: list[Any]) -> list[Any]:
    if reply and reply[0] == b"error":
        raise error_from_json(json.loads(reply[1]))
    return reply


def _done(reply: Sequence[Any]) -> bool:
    return bool(reply[0] == b"ok")


def _parts(chunks: Sequence[OutputChunk]) -> list[Sequence[OutputChunk]]:
    return [chunks[n : n + _CHUNKS_PER_CALL] for n in range(0, len(chunks), _CHUNKS_PER_CALL)]
