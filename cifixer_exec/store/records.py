"""What goes into the journal and what comes out: frozen values and the pure functions that build them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cifixer_exec.errors import ExecutorError, InvalidRequestError, error_from_json
from cifixer_exec.model import MAX_PAYLOAD_BYTES, MAX_PIECE_BYTES, OutputChunk, Stream, check_id, check_timeout_s, payload_digest
from cifixer_exec.store.keys import check_queue

OpState = Literal["queued", "running", "done", "failed", "cancelled"]
SandboxState = Literal["creating", "ready", "closing", "closed", "lost"]
#: Why a worker did not get an op; ``journal.lua``, ``verbs.take``.
Reason = Literal["gone", "final", "running", "forwarded", "fenced", "cancelled", "expired", "closed", "creating"]

FINAL_STATES = frozenset({"done", "failed", "cancelled"})
#: A body may be one full piece of a file and a little around it.
BODY_LIMIT_BYTES = MAX_PIECE_BYTES + 64 * 1024

_STREAM_CODES: Mapping[Stream, int] = {Stream.STDOUT: 1, Stream.STDERR: 2}
_STREAMS: Mapping[bytes, Stream] = {b"1": Stream.STDOUT, b"2": Stream.STDERR}


@dataclass(frozen=True, kw_only=True)
class NewSandbox:
    """The registry entry that a ``create`` op writes before anything exists. ``queue`` is the pool that shall make it."""

    backend: str
    queue: str
    spec: Mapping[str, Any]
    lifetime_s: float


@dataclass(frozen=True, kw_only=True)
class NewOp:
    """One op to submit. ``timeout_s`` bounds how long it may wait for a worker, ``run_s`` how long it may take from then on
    (None: until the same deadline). ``create`` belongs to kind ``create`` alone. ``raw``: a Celery task of the same id waits for it.
    """

    op_id: str
    sandbox_id: str
    kind: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    timeout_s: float | None = None
    run_s: float | None = None
    raw: bool = False
    create: NewSandbox | None = None


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """``created`` is False if the op was known already; ``state`` is what it is in now."""

    created: bool
    state: str


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """A lease as it stands. Another ``term`` than the last time: it had lapsed in between. Another ``born_ms``: Redis was started anew,
    and may have lost some of its data.
    """

    term: int
    born_ms: int


@dataclass(frozen=True, kw_only=True)
class RunningOp:
    """An op that the journal calls running, with the owner's epoch."""

    op_id: str
    sandbox_id: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A grant to run an op under ``epoch``.

    ``adopted``: it ran before, under a lower epoch; ask the runner what became of it. ``attempt`` counts grants from 1.
    ``remaining_s`` is the time left to the op's deadline, None without one. ``cancel``: its cancellation is already wanted.
    """

    op_id: str
    sandbox_id: str
    kind: str
    payload: Mapping[str, Any]
    body: bytes
    epoch: int
    handle: Mapping[str, Any] | None
    spec: Mapping[str, Any]
    backend: str
    state: str
    remaining_s: float | None
    attempt: int
    cancel: bool

    @property
    def adopted(self) -> bool:
        """True if the op was granted before."""
        return self.attempt > 1


@dataclass(frozen=True, kw_only=True)
class NotTaken:
    """The doorbell needs no work from this worker; ``reason`` says why."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep did: doorbells rung, ops ended, dead workers cleaned up. ``locked``: another sweep was just there.

    ``unanswered``: ended ops of raw Celery tasks, whose answer may have been lost with the worker that waited for them.
    """

    rung: int
    expired: int
    cleaned: int
    unanswered: tuple[str, ...] = ()
    locked: bool = False


@dataclass(frozen=True, kw_only=True)
class End:
    """The end of an op: ``result`` unless ``state`` is ``failed``, then ``error``. ``body`` is binary and may be empty."""

    state: str
    result: Mapping[str, Any] | None
    error: ExecutorError | None
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of an op's stream: ``entry_id`` to read on from, the epoch that wrote it, and what it says."""

    entry_id: str
    epoch: int
    item: OutputChunk | End


@dataclass(frozen=True, kw_only=True)
class OpRecord:
    """An op as it stands in the journal, without payload and body. Times are milliseconds since 1970 by Redis' clock."""

    op_id: str
    sandbox_id: str
    kind: str
    state: str
    epoch: int
    attempt: int
    rings: int
    cancel: bool
    created_ms: int
    started_ms: int | None
    finished_ms: int | None
    deadline_ms: int | None
    result: Mapping[str, Any] | None
    error: ExecutorError | None

    @property
    def final(self) -> bool:
        """True once nothing about it will change."""
        return self.state in FINAL_STATES

    def end(self) -> End:
        """The end as far as the record knows it (the body was only in the stream)."""
        return End(state=self.state, result=self.result, error=self.error)


@dataclass(frozen=True, kw_only=True)
class SandboxRecord:
    """A sandbox as registered. ``owner`` '' means: the next worker to take an op becomes the owner. ``spec`` is {} once it is over."""

    sandbox_id: str
    backend: str
    placement: str
    state: str
    owner: str
    epoch: int
    handle: Mapping[str, Any] | None
    spec: Mapping[str, Any]
    create_op: str
    queue: str
    created_ms: int
    expires_ms: int
    cause: str

    @property
    def over(self) -> bool:
        """True once it is closed or lost."""
        return self.state in ("closed", "lost")


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """A worker whose lease lives, with what it told about itself."""

    worker_id: str
    info: Mapping[str, Any]


# ------------------------------------------------------------------------------------------------ into Redis


def dumps(value: Any, what: str) -> bytes:
    """Compact JSON of ``value``.

    Raises:
        InvalidRequestError: it is no JSON, or more than ``MAX_PAYLOAD_BYTES``.
    """
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{what} cannot be written as JSON ({error}): use str, int, float, bool, None, list, dict") from None
    if len(text) > MAX_PAYLOAD_BYTES:
        raise InvalidRequestError(
            f"{what} is {len(text)} bytes of JSON; at most {MAX_PAYLOAD_BYTES} go through Redis: put the data in a file"
        )
    return text


def milliseconds(seconds: float) -> int:
    """Whole milliseconds."""
    return round(seconds * 1000)


def _optional_ms(seconds: float | None) -> str | int:
    return "" if seconds is None else milliseconds(seconds)


def digest_of(op: NewOp) -> str:
    """What must be equal for a submit to be a repetition: everything but the time-out and the queue.

    It tells a repetition from a mistake of ours, not from an attack, so a quick sum is enough for a piece of a file.
    """
    created = {"backend": op.create.backend, "spec": op.create.spec} if op.create else None
    body = op.body if len(op.body) <= MAX_PAYLOAD_BYTES else b"%d %d" % (len(op.body), zlib.crc32(op.body))
    return payload_digest(op.kind, {"sandbox": op.sandbox_id, "payload": op.payload, "create": created}, body)


def submit_arguments(op: NewOp) -> list[bytes | str | int]:
    """The arguments of the verb ``submit`` but the doorbell, checked.

    Raises:
        InvalidRequestError: an id, a size or a combination that cannot work.
    """
    check_id(op.op_id, "op id")
    check_id(op.sandbox_id, "sandbox id")
    if (op.create is not None) != (op.kind == "create"):
        raise InvalidRequestError(f"op kind {op.kind!r} {'takes no' if op.create else 'needs a'} new sandbox: mend the caller")
    if len(op.body) > BODY_LIMIT_BYTES:
        raise InvalidRequestError(
            f"the body of op {op.op_id} is {len(op.body)} bytes; at most {BODY_LIMIT_BYTES} may go through Redis: send pieces"
        )
    timeout_s, run_s = check_timeout_s(op.timeout_s), check_timeout_s(op.run_s, "run_s")
    payload = dumps(op.payload, f"the payload of op {op.op_id}")
    times = (_optional_ms(timeout_s), _optional_ms(run_s))
    return [op.op_id, op.sandbox_id, op.kind, digest_of(op), payload, op.body, *times, "1" if op.raw else ""]


def sandbox_arguments(create: NewSandbox | None) -> list[bytes | str | int]:
    """The last arguments of the verb ``submit``, for kind ``create``.

    Raises:
        InvalidRequestError: the queue's name or the spec cannot work.
    """
    if create is None:
        return []
    check_timeout_s(create.lifetime_s, "lifetime_s")
    return [create.backend, check_queue(create.queue), dumps(create.spec, "the sandbox's spec"), milliseconds(create.lifetime_s)]


def chunk_arguments(chunks: Sequence[OutputChunk]) -> list[bytes | str | int]:
    """Four arguments for each chunk: index, stream, offset, data."""
    return [value for c in chunks for value in (c.index, _STREAM_CODES[c.stream], c.offset, c.data)]


# -------------------------------------------------------------------------------------------- out of Redis


def _json(value: bytes | None) -> dict[str, Any] | None:
    return json.loads(value) if value else None


def _int(value: bytes | None) -> int | None:
    return int(value) if value else None


def _error(value: bytes | None) -> ExecutorError | None:
    data = _json(value)
    return error_from_json(data) if data else None


def _text(data: Mapping[bytes, bytes], name: str) -> str:
    return data.get(name.encode(), b"").decode()


def taken_from(op_id: str, reply: Sequence[bytes]) -> Taken:
    """From the reply of the verb ``take`` after its first word."""
    sandbox_id, kind, payload, body, epoch, handle, spec, backend, state, remaining_ms, attempt, cancel = reply
    return Taken(
        op_id=op_id,
        sandbox_id=sandbox_id.decode(),
        kind=kind.decode(),
        payload=_json(payload) or {},
        body=body,
        epoch=int(epoch),
        handle=_json(handle),
        spec=_json(spec) or {},
        backend=backend.decode(),
        state=state.decode(),
        remaining_s=int(remaining_ms) / 1000 if remaining_ms not in (b"", "") else None,
        attempt=int(attempt),
        cancel=cancel == b"1",
    )


def op_from(op_id: str, data: Mapping[bytes, bytes]) -> OpRecord | None:
    """From the hash ``op:<id>``; None if there is none."""
    if not data:
        return None
    return OpRecord(
        op_id=op_id,
        sandbox_id=_text(data, "sid"),
        kind=_text(data, "kind"),
        state=_text(data, "state"),
        epoch=_int(data.get(b"epoch")) or 0,
        attempt=_int(data.get(b"attempt")) or 0,
        rings=_int(data.get(b"rings")) or 0,
        cancel=data.get(b"cancel") == b"1",
        created_ms=_int(data.get(b"created_ms")) or 0,
        started_ms=_int(data.get(b"started_ms")),
        finished_ms=_int(data.get(b"finished_ms")),
        deadline_ms=_int(data.get(b"deadline_ms")),
        result=_json(data.get(b"result")),
        error=_error(data.get(b"error")),
    )


def sandbox_from(sandbox_id: str, data: Mapping[bytes, bytes]) -> SandboxRecord | None:
    """From the hash ``sandbox:<id>``; None if there is none."""
    if not data:
        return None
    return SandboxRecord(
        sandbox_id=sandbox_id,
        backend=_text(data, "backend"),
        placement=_text(data, "placement"),
        state=_text(data, "state"),
        owner=_text(data, "owner"),
        epoch=_int(data.get(b"epoch")) or 0,
        handle=_json(data.get(b"handle")),
        spec=_json(data.get(b"spec")) or {},
        create_op=_text(data, "create_op"),
        queue=_text(data, "queue"),
        created_ms=_int(data.get(b"created_ms")) or 0,
        expires_ms=_int(data.get(b"expires_ms")) or 0,
        cause=_text(data, "cause"),
    )


def entry_from(entry_id: bytes, fields: Sequence[bytes] | Mapping[bytes, bytes]) -> Entry:
    """From one entry of the stream ``out:<id>``: its id and its fields, flat or as redis-py makes them."""
    data = fields if isinstance(fields, Mapping) else dict(zip(fields[::2], fields[1::2], strict=True))
    return Entry(entry_id=entry_id.decode(), epoch=int(data[b"e"]), item=_end_from(data) if b"end" in data else _chunk_from(data))


def _chunk_from(data: Mapping[bytes, bytes]) -> OutputChunk:
    return OutputChunk(stream=_STREAMS[data[b"s"]], offset=int(data[b"o"]), data=data[b"d"], index=int(data[b"i"]))


def _end_from(data: Mapping[bytes, bytes]) -> End:
    state = data[b"end"].decode()
    if state == "failed":
        return End(state=state, result=None, error=_error(data[b"r"]), body=data[b"b"])
    return End(state=state, result=_json(data[b"r"]) or {}, error=None, body=data[b"b"])
