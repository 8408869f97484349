"""Each verb of the journal and each refusal, on a real redis-server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from cifixer_exec.errors import (
    ExecutorError,
    InvalidRequestError,
    OperationConflictError,
    QueueUnavailableError,
    SandboxLostError,
    SandboxNotFoundError,
)
from cifixer_exec.model import MAX_PAYLOAD_BYTES, MAX_PIECE_BYTES, OutputChunk, Stream
from cifixer_exec.store.connection import connect
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import End, NewOp, NewSandbox, NotTaken, RunningOp, Submitted, Taken
from tests.support.redis_server import RedisServer, redis_server
from tests.support.run import run

A, B = "a@h", "b@h"
LONG_S = 60.0


class Bench:
    """A journal on a real server, with shorthands."""

    def __init__(self, redis: Redis, namespace: str, **options: float) -> None:
        self.redis: Any = redis
        self.ns = namespace
        self.journal = Journal(redis, namespace=namespace, **options)

    async def create(self, sid: str = "s", op_id: str = "", **options: Any) -> Submitted:
        create = NewSandbox(backend="local", queue="pool", spec={"env": {"TOKEN": "secret"}}, lifetime_s=LONG_S)
        return await self.journal.submit(NewOp(op_id=op_id or f"create-{sid}", sandbox_id=sid, kind="create", create=create, **options))

    async def sandbox(self, wid: str = A, sid: str = "s") -> None:
        """A ready sandbox of a living worker."""
        await self.journal.renew(wid, LONG_S, {})
        await self.create(sid)
        taken = await self.grant(f"create-{sid}", wid)
        assert await self.journal.ready(wid, sid, taken.epoch, handle={"pod": sid}, placement="here", queue="ready-pool")
        assert await self.journal.finish(wid, f"create-{sid}", taken.epoch, state="done", result={})
        await self.bells()

    async def op(self, op_id: str = "o", sid: str = "s", kind: str = "start", **options: Any) -> Submitted:
        return await self.journal.submit(NewOp(op_id=op_id, sandbox_id=sid, kind=kind, **options))

    async def grant(self, op_id: str = "o", wid: str = A, nonce: str = "n") -> Taken:
        taken = await self.journal.take(wid, op_id, nonce, await self.term(wid))
        assert isinstance(taken, Taken), taken
        return taken

    async def refusal(self, op_id: str = "o", wid: str = A, nonce: str = "n") -> str:
        refused = await self.journal.take(wid, op_id, nonce, await self.term(wid))
        assert isinstance(refused, NotTaken), refused
        return refused.reason

    async def bells(self) -> list[tuple[str, str]]:
        """(queue, op id) of all doorbells, which are then gone."""
        found = []
        for queue in ("pool", "ready-pool", f"{A}.dq2", f"{B}.dq2"):
            while message := await self.redis.rpop(f"{self.ns}:{queue}"):
                found.append((queue, json.loads(message)["headers"]["id"]))
        return found

    async def die(self, wid: str) -> None:
        """The lease of a worker lapses."""
        await self.redis.delete(f"{self.ns}:worker:{wid}")

    async def end(self, op_id: str = "o") -> End:
        """The one end entry of an op's stream."""
        entries = await self.journal.read(op_id, block_s=0)
        ends = [e.item for e in entries if isinstance(e.item, End)]
        assert len(ends) == 1
        assert entries[-1].item is ends[0]
        return ends[0]

    async def state(self, op_id: str = "o") -> str:
        record = await self.journal.op(op_id)
        return record.state if record else ""

    async def term(self, wid: str) -> int:
        return int(await self.redis.get(f"{self.ns}:term:{wid}") or 0)

    async def epoch(self, sid: str = "s") -> int:
        record = await self.journal.sandbox(sid)
        assert record is not None
        return record.epoch

    async def hash(self, kind: str, name: str) -> dict[bytes, bytes]:
        return dict(await self.redis.hgetall(f"{self.ns}:{kind}:{name}"))


def chunk(offset: int, data: bytes, index: int = 0, stream: Stream = Stream.STDOUT) -> OutputChunk:
    return OutputChunk(stream=stream, offset=offset, data=data, index=index)


@asynccontextmanager
async def open_bench(url: str, namespace: str, **options: float) -> AsyncIterator[Bench]:
    redis = connect(url)
    bench = Bench(redis, namespace, **options)
    try:
        yield bench
        await bench.journal.purge()
    finally:
        await redis.aclose()


Play = Callable[[Callable[[Bench], Awaitable[None]]], None]


@pytest.fixture
def play(redis_url: str, namespace: str) -> Play:
    """Runs a coroutine function on a bench."""

    def play(scene: Callable[[Bench], Awaitable[None]], **options: float) -> None:
        async def whole() -> None:
            async with open_bench(redis_url, namespace, **options) as bench:
                await scene(bench)

        run(whole())

    return play


async def raised(awaitable: Awaitable[object]) -> ExecutorError:
    with pytest.raises(ExecutorError) as info:
        await awaitable
    return info.value


# ------------------------------------------------------------------------------------------------------ submit


def test_create_registers_the_intent_first(play: Play) -> None:
    async def scene(b: Bench) -> None:
        assert await b.create() == Submitted(created=True, state="queued")
        record = await b.journal.sandbox("s")
        assert record is not None
        assert (record.state, record.owner, record.epoch, record.create_op, record.queue) == ("creating", "", 0, "create-s", "pool")
        assert record.expires_ms - record.created_ms == LONG_S * 1000
        assert [s.sandbox_id for s in await b.journal.sandboxes()] == ["s"]
        assert await b.bells() == [("pool", "create-s")]

    play(scene)


def test_the_same_submit_again_is_answered_and_rings_no_more(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        assert (await b.op(payload={"x": 1}, body=b"1")).created
        assert await b.op(payload={"x": 1}, body=b"1") == Submitted(created=False, state="queued")
        assert await b.bells() == [("a@h.dq2", "o")]
        taken = await b.grant()
        await b.journal.finish(A, "o", taken.epoch, state="done", result={})
        assert await b.op(payload={"x": 1}, body=b"1", timeout_s=5.0) == Submitted(created=False, state="done")

    play(scene)


@pytest.mark.parametrize("change", [{"payload": {"x": 2}}, {"body": b"2"}, {"kind": "kill"}, {"sid": "s2"}])
def test_another_payload_under_a_known_op_id_is_refused(play: Play, change: dict[str, Any]) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.sandbox(sid="s2")
        await b.op(payload={"x": 1}, body=b"1")
        error = await raised(b.op(**{"payload": {"x": 1}, "body": b"1", **change}))
        assert isinstance(error, OperationConflictError)
        assert "o " in str(error)

    play(scene)


def test_a_sandbox_id_in_use_is_refused(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.create()
        assert not (await b.create()).created
        assert isinstance(await raised(b.create(op_id="other")), OperationConflictError)
        assert await b.journal.op("other") is None

    play(scene)


def test_ops_on_sandboxes_that_are_not_there(play: Play) -> None:
    async def scene(b: Bench) -> None:
        assert isinstance(await raised(b.op()), SandboxNotFoundError)
        assert (await b.op("gone", "unknown", "destroy")).state == "done"  # Redis may have forgotten it
        assert isinstance(await raised(b.op("late", "unknown")), SandboxNotFoundError)
        await b.sandbox()
        await b.journal.close("s", state="lost", cause="evicted by the node")
        error = await raised(b.op())
        assert isinstance(error, SandboxLostError)
        assert "evicted by the node" in str(error)
        await b.sandbox(sid="s2")
        await b.journal.close("s2", state="closed", cause="asked to")
        assert isinstance(await raised(b.op(sid="s2")), SandboxNotFoundError)
        assert await b.op("d", sid="s2", kind="destroy") == Submitted(created=True, state="done")
        assert (await b.end("d")).state == "done"
        assert await b.bells() == []

    play(scene)


def test_what_is_too_big_is_refused_before_redis() -> None:
    async def scene() -> None:
        b = Bench(connect("redis://127.0.0.1:1/0"), "n")
        wrong: list[dict[str, Any]] = [
            {"payload": {"x": "a" * MAX_PAYLOAD_BYTES}},
            {"body": b"a" * (MAX_PIECE_BYTES + 65537)},
            {"payload": {"x": object()}},
            {"payload": {"x": float("nan")}},
            {"timeout_s": -1.0},
            {"op_id": "a b"},
            {"sid": "a:b"},
            {"kind": "create"},
        ]
        for options in wrong:
            assert type(await raised(b.op(**{"op_id": "o", **options}))) is InvalidRequestError

    run(scene())


def test_the_biggest_that_fits(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        body = bytes(range(256)) * 4096
        await b.op(payload={"x": "a" * (MAX_PAYLOAD_BYTES - 8)}, body=body)
        assert (await b.grant()).body == body

    play(scene)


# -------------------------------------------------------------------------------------------------------- take


def test_a_grant_has_all_that_the_worker_needs(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op(payload={"argv": ["é"]}, body=b"\xff\0", timeout_s=30.0)
        taken = await b.grant()
        assert (taken.payload, taken.body, taken.kind, taken.epoch) == ({"argv": ["é"]}, b"\xff\0", "start", await b.epoch())
        assert (taken.handle, taken.spec, taken.backend, taken.state) == ({"pod": "s"}, {"env": {"TOKEN": "secret"}}, "local", "ready")
        assert taken.remaining_s is not None
        assert 25 < taken.remaining_s <= 30
        assert (taken.adopted, taken.attempt, taken.cancel) == (False, 1, False)

    play(scene)


def test_the_time_to_run_begins_with_the_first_grant(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op(timeout_s=5.0, run_s=600.0)
        taken = await b.grant()
        assert taken.remaining_s is not None
        assert 590 < taken.remaining_s <= 600

    play(scene)


def test_a_take_is_idempotent_by_nonce(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        assert await b.grant() == await b.grant()
        assert await b.refusal(nonce="other") == "running"

    play(scene)


def test_reasons_not_to_take(play: Play) -> None:
    async def scene(b: Bench) -> None:
        assert await b.refusal("nothing") == "gone"
        await b.sandbox()
        await b.op()
        assert await b.refusal(wid=B) == "fenced"
        await b.journal.renew(B, LONG_S, {})
        await b.bells()
        assert await b.refusal(wid=B) == "forwarded"
        assert await b.bells() == [("a@h.dq2", "o")]
        taken = await b.grant()
        assert await b.refusal(wid=B) == "running"
        await b.journal.finish(A, "o", taken.epoch, state="done")
        assert await b.refusal() == "final"
        await b.op("o2")
        await b.journal.cancel("o2")
        assert await b.refusal("o2") == "cancelled"

    play(scene)


def test_an_op_past_its_deadline_is_not_run(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op(timeout_s=0.001)
        await asyncio.sleep(0.01)
        assert await b.refusal() == "expired"
        end = await b.end()
        assert isinstance(end.error, QueueUnavailableError)
        assert "ready-pool" in str(end.error)

    play(scene)


def test_a_create_that_no_worker_took_leaves_no_sandbox(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.journal.renew(A, LONG_S, {})
        await b.create(timeout_s=0.001)
        await b.op()
        await asyncio.sleep(0.01)
        assert await b.refusal("create-s") == "expired"
        assert isinstance((await b.end()).error, SandboxNotFoundError)
        assert await b.journal.sandboxes() == []

    play(scene)


def test_ops_wait_until_the_sandbox_is_made(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.journal.renew(A, LONG_S, {})
        await b.create()
        await b.op()
        await b.bells()
        assert await b.refusal() == "creating"
        taken = await b.grant("create-s")
        assert await b.refusal() == "creating"
        await b.journal.ready(A, "s", taken.epoch, handle={}, placement="here", queue="ready-pool")
        assert await b.bells() == [("a@h.dq2", "o")]
        assert (await b.grant()).state == "ready"

    play(scene)


def test_a_failed_create_ends_what_waited_for_it(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.journal.renew(A, LONG_S, {})
        await b.create()
        await b.op()
        taken = await b.grant("create-s")
        error = {"error": "SandboxStartError", "args": ["no image", ""]}
        assert await b.journal.finish(A, "create-s", taken.epoch, state="failed", error=error)
        assert isinstance((await b.end()).error, SandboxNotFoundError)
        record = await b.journal.sandbox("s")
        assert record is not None
        assert record.state == "closed"
        assert not await b.journal.ready(A, "s", taken.epoch, handle={}, placement="here", queue="q")

    play(scene)


def test_a_dead_owners_op_is_adopted_under_a_higher_epoch(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        await b.op("o2")
        before = (await b.grant()).epoch
        await b.journal.cancel("o")
        await b.bells()
        await b.die(A)
        await b.journal.renew(B, LONG_S, {})
        taken = await b.grant(wid=B)
        assert (taken.epoch > before, taken.adopted, taken.attempt, taken.cancel) == (True, True, 2, True)
        assert await b.bells() == [("b@h.dq2", "o2")]  # the other came along
        assert not (await b.grant("o2", wid=B)).adopted
        for writing in (b.journal.publish(A, "o", before, [chunk(0, b"late")]), b.journal.finish(A, "o", before, state="done")):
            assert not await writing
        assert await b.refusal(wid=A) == "fenced"

    play(scene)


def test_an_op_left_at_a_lower_epoch_is_adopted_by_the_new_owner(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        await b.op("o2")
        before = (await b.grant()).epoch
        await b.die(A)
        await b.journal.renew(B, LONG_S, {})
        assert (await b.grant("o2", wid=B)).epoch > before
        await b.bells()
        assert (await sweep(b))[0] == 1  # though its sandbox has a living owner
        assert await b.bells() == [("b@h.dq2", "o")]
        await b.journal.renew(A, LONG_S, {})
        assert await b.refusal(wid=A) == "forwarded"
        assert not await b.journal.finish(B, "o", await b.epoch(), state="done")  # its sandbox, but not granted
        assert (await b.grant(wid=B)).adopted

    play(scene)


def test_destroy_makes_the_sandbox_closing(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op("d", kind="destroy")
        await b.op()
        taken = await b.grant("d")
        assert taken.state == "closing"
        assert isinstance(await raised(b.op("late")), SandboxNotFoundError)
        assert await b.refusal() == "closed"
        assert await b.journal.close("s", state="closed", cause="asked to", wid=A, epoch=taken.epoch, keep_op="d")
        assert await b.journal.finish(A, "d", taken.epoch, state="done", result={})
        assert (await b.end("d")).state == "done"

    play(scene)


def test_destroy_whose_worker_died_after_the_close_is_done(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op("d", kind="destroy")
        taken = await b.grant("d")
        await b.journal.close("s", state="closed", cause="asked to", wid=A, epoch=taken.epoch, keep_op="d")
        await b.journal.renew(B, LONG_S, {})
        assert await b.refusal("d", wid=B) == "running"
        await b.die(A)
        assert await b.refusal("d", wid=B) == "closed"
        assert (await b.end("d")).state == "done"

    play(scene)


# ---------------------------------------------------------------------------------------- publish, finish, close


def test_output_then_one_end(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op(payload={"env": "secret"}, body=b"secret")
        epoch = (await b.grant()).epoch
        assert await b.journal.publish(A, "o", epoch, [chunk(0, b"ab"), chunk(0, b"\xff", index=1, stream=Stream.STDERR)])
        last: dict[str, Any] = {"state": "done", "result": {"records": [1]}, "body": b"\0", "chunks": [chunk(2, b"c")]}
        assert await b.journal.finish(A, "o", epoch, **last)
        assert await b.journal.finish(A, "o", epoch, **last)
        assert not await b.journal.finish(B, "o", epoch, **last)
        assert not await b.journal.finish(A, "o", epoch + 1, **last)
        assert not await b.journal.publish(A, "o", epoch, [chunk(3, b"late")])
        entries = await b.journal.read("o")
        assert [e.epoch for e in entries] == [epoch] * 4
        assert [e.item for e in entries[:3]] == [chunk(0, b"ab"), chunk(0, b"\xff", index=1, stream=Stream.STDERR), chunk(2, b"c")]
        assert await b.end() == End(state="done", result={"records": [1]}, error=None, body=b"\0")
        assert await b.journal.read("o", after=entries[2].entry_id) == entries[3:]
        assert not {b"payload", b"body", b"bell"} & set(await b.hash("op", "o"))
        for kind in ("op", "out"):
            assert 0 < await b.redis.ttl(f"{b.ns}:{kind}:o") <= 86400
        await b.journal.collected("o")
        for kind in ("op", "out"):
            assert 0 < await b.redis.ttl(f"{b.ns}:{kind}:o") <= 600

    play(scene)


def test_many_chunks_at_once(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        epoch = (await b.grant()).epoch
        await b.journal.publish(A, "o", epoch, [chunk(n, b"x") for n in range(2500)])
        assert await b.journal.finish(A, "o", epoch, state="done", chunks=[chunk(n, b"x") for n in range(2500, 5000)])
        items = [item async for item in b.journal.follow("o")]
        assert len(items) == 5001
        assert all(isinstance(i, OutputChunk) and i.offset == n for n, i in enumerate(items[:-1]))

    play(scene)


def test_collected_leaves_an_open_op_alone(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        await b.journal.collected("o")
        await b.journal.collected("nothing")
        assert await b.redis.ttl(f"{b.ns}:op:o") == -1

    play(scene)


@pytest.mark.parametrize("end", [{"state": "running"}, {"state": "failed"}, {"state": "done", "error": {"error": "x"}}])
def test_an_end_must_be_one(play: Play, end: dict[str, Any]) -> None:
    async def scene(b: Bench) -> None:
        assert type(await raised(b.journal.finish(A, "o", 1, **end))) is InvalidRequestError
        assert type(await raised(b.journal.close("s", state="ready", cause=""))) is InvalidRequestError

    play(scene)


@pytest.mark.parametrize(("state", "error"), [("closed", SandboxNotFoundError), ("lost", SandboxLostError)])
def test_close_ends_every_open_op_but_one(play: Play, state: str, error: type[ExecutorError]) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        for op_id, kind in (("queued", "start"), ("run", "start"), ("read", "read_file"), ("kept", "destroy")):
            await b.op(op_id, kind=kind)
            if op_id != "queued":
                epoch = (await b.grant(op_id)).epoch
        assert not await b.journal.close("s", state=state, cause="why", wid=B, epoch=epoch)
        assert not await b.journal.close("s", state=state, cause="why", wid=A, epoch=epoch + 1)
        assert not await b.journal.close("nothing", state=state, cause="why")
        for _ in range(2):
            assert await b.journal.close("s", state=state, cause="why", wid=A, epoch=epoch, keep_op="kept")
        assert type((await b.end("queued")).error) is error
        assert (await b.end("run")).result == {"records": [{"status": "sandbox_lost", "cause": "why"}]}
        assert isinstance((await b.end("read")).error, SandboxLostError)
        assert await b.state("kept") == "running"
        assert await b.journal.finish(A, "kept", epoch, state="done")
        assert not await b.journal.finish(A, "run", epoch, state="done")
        record = await b.journal.sandbox("s")
        assert record is not None
        assert (record.state, record.cause, record.spec) == (state, "why", {})
        assert await b.journal.sandboxes() == []
        assert await b.redis.exists(f"{b.ns}:owned:{A}", f"{b.ns}:open:s", f"{b.ns}:live") == 0
        assert await b.redis.ttl(f"{b.ns}:sandbox:s") > 0

    play(scene)


# ------------------------------------------------------------------------------------------------------- cancel


def test_cancel(play: Play) -> None:
    async def scene(b: Bench) -> None:
        assert type(await raised(b.journal.cancel("nothing"))) is InvalidRequestError
        await b.sandbox()
        await b.op("queued")
        assert await b.journal.cancel("queued") == "cancelled"
        assert await b.end("queued") == End(state="cancelled", result={}, error=None)
        await b.op()
        epoch = (await b.grant()).epoch
        async with b.redis.pubsub() as channel:
            await channel.subscribe(b.journal.keys.control(A))
            await channel.get_message(timeout=1)
            assert await b.journal.cancel("o") == "running"
            assert (await channel.get_message(timeout=1))["data"] == b"o"
        assert await b.journal.cancelled_ops(A) == ["o"]
        assert await b.journal.cancelled_ops(B) == []
        await b.journal.finish(A, "o", epoch, state="cancelled", result={"records": []})
        assert await b.journal.cancelled_ops(A) == []
        assert await b.journal.cancel("o") == "cancelled"

    play(scene)


def test_a_cancelled_create_leaves_no_sandbox(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.create()
        await b.op()
        assert await b.journal.cancel("create-s") == "cancelled"
        assert isinstance((await b.end()).error, SandboxNotFoundError)
        assert isinstance(await raised(b.op("o2")), SandboxNotFoundError)

    play(scene)


# ------------------------------------------------------------------------------------------------------- leases


def test_lease(play: Play) -> None:
    async def scene(b: Bench) -> None:
        first = await b.journal.renew(A, 0.05, {"pid": 1})
        assert await b.journal.renew(A, 0.05, {"pid": 2}) == first
        assert await b.journal.holds(A)
        assert [(w.worker_id, w.info) for w in await b.journal.workers()] == [(A, {"pid": 2})]
        await asyncio.sleep(0.08)
        assert not await b.journal.holds(A)
        assert await b.journal.workers() == []
        again = await b.journal.renew(A, 0.05, {})
        assert (again.term > first.term, again.born_ms) == (True, first.born_ms)
        assert type(await raised(b.journal.renew("a b", 1, {}))) is InvalidRequestError

    play(scene)


def test_a_lapsed_lease_brings_no_ownership_back(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        before = (await b.grant()).epoch
        await b.bells()
        await b.die(A)
        await b.journal.renew(A, LONG_S, {})
        assert await b.bells() == [("ready-pool", "o")]
        assert not await b.journal.finish(A, "o", before, state="done")
        taken = await b.grant()
        assert (taken.epoch > before, taken.adopted) == (True, True)

    play(scene)


def test_release_hands_all_over(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.sandbox(sid="idle")
        await b.op()
        before = (await b.grant()).epoch
        await b.bells()
        assert await b.journal.release(A) == 2
        assert await b.journal.release(A) == 0
        assert await b.bells() == [("ready-pool", "o")]
        await b.journal.renew(B, LONG_S, {})
        assert (await b.grant(wid=B)).epoch > before

    play(scene)


def test_hand_over_of_one(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        before = await b.epoch()
        assert not await b.journal.hand_over(A, "s", before + 1)
        assert not await b.journal.hand_over(B, "s", before)
        assert await b.journal.hand_over(A, "s", before)
        await b.op()
        assert await b.bells() == [("ready-pool", "o")]
        assert await b.journal.ring("o")
        assert not await b.journal.ring("nothing")
        assert await b.bells() == [("ready-pool", "o")]
        assert (await b.grant()).epoch > before

    play(scene)


def test_expiry(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.sandbox(sid="s2")
        before = await b.journal.sandbox("s")
        assert await b.journal.set_expiry("s", 10, wid=A, epoch=await b.epoch())
        after = await b.journal.sandbox("s")
        assert before is not None
        assert after is not None
        assert after.expires_ms < before.expires_ms
        assert not await b.journal.set_expiry("s", 0.001, wid=A, epoch=await b.epoch() - 1)
        assert not await b.journal.set_expiry("s", 0.001, wid=B, epoch=await b.epoch())
        assert await b.journal.sandbox("s") == after
        assert isinstance(await raised(b.journal.set_expiry("nothing", 1, wid=A, epoch=1)), SandboxNotFoundError)
        await b.journal.close("s", state="lost", cause="why")
        assert isinstance(await raised(b.journal.set_expiry("s", 1, wid=A, epoch=1)), SandboxLostError)
        assert [s.sandbox_id for s in await b.journal.sandboxes()] == ["s2"]

    play(scene)


# -------------------------------------------------------------------------------------------------------- sweep


async def sweep(b: Bench, wid: str = B, reping_s: float = 0.0) -> tuple[int, int, int]:
    await b.redis.delete(f"{b.ns}:lock:sweep")
    done = await b.journal.sweep(wid, reping_s=reping_s)
    assert not done.locked
    return done.rung, done.expired, done.cleaned


def test_sweep_rings_lost_doorbells_again(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        await b.bells()
        assert await sweep(b, reping_s=5) == (0, 0, 0)
        assert await sweep(b) == (1, 0, 0)
        assert await b.bells() == [("a@h.dq2", "o")]
        await b.grant()
        assert await sweep(b) == (0, 0, 0)
        assert (await b.journal.sweep(B)).locked

    play(scene)


def test_doorbells_do_not_pile_up_in_a_busy_queue(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        for _ in range(30):
            await asyncio.sleep(0.01)
            await sweep(b, reping_s=0.01)
        assert 2 <= len(await b.bells()) <= 6

    play(scene)


def test_sweep_closes_what_nobody_is_there_to_reap(play: Play) -> None:
    """A host that was replaced took its placement along."""

    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.sandbox(B, "s2")
        for sid in ("s", "s2"):
            await b.redis.zadd(f"{b.ns}:sandboxes", {sid: 1})
        await b.die(A)
        await sweep(b)
        record = await b.journal.sandbox("s")
        assert record is not None
        assert (record.state, record.spec) == ("lost", {})
        assert 0 < await b.redis.ttl(f"{b.ns}:sandbox:s") <= 86400
        assert [r.sandbox_id for r in await b.journal.sandboxes()] == ["s2"]

    play(scene)


def test_leave_keeps_what_is_busy(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.sandbox(sid="busy")
        await b.op()
        await b.bells()
        assert await b.journal.leave(A, ["busy"]) == 1
        assert [r.sandbox_id for r in await b.journal.unowned()] == ["s"]
        assert await b.bells() == [("ready-pool", "o")]
        await b.journal.renew(B, LONG_S, {})
        await b.grant(wid=B)
        assert await b.journal.unowned() == []

    play(scene)


def test_running_is_what_the_journal_believes_of_a_worker(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        await b.op("queued")
        await b.grant()
        assert await b.journal.running(A) == [RunningOp(op_id="o", sandbox_id="s", epoch=await b.epoch())]
        assert await b.journal.running(B) == []
        assert await b.journal.hand_over(A, "s", await b.epoch())
        assert await b.journal.running(A) == []

    play(scene)


def test_a_grant_under_a_lease_that_has_lapsed_since_is_refused(play: Play) -> None:
    """Else it would be cancelled with all that the worker drops when it notices the lapse, and nobody would run it."""

    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        term = await b.term(A)
        await b.die(A)
        await b.journal.renew(A, LONG_S, {})
        late = await b.journal.take(A, "o", "n", term)
        assert isinstance(late, NotTaken)
        assert (late.reason, await b.state()) == ("fenced", "queued")
        assert (await b.grant()).op_id == "o"

    play(scene)


def test_sweep_cleans_up_after_a_dead_worker(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        await b.op("o2")
        before = (await b.grant()).epoch
        members = {
            "_kombu.binding.C.dq2": f"{A}\x06\x16\x06\x16{A}.dq2",
            "_kombu.binding_permanent.C.dq2": f"{A}\x06\x16\x06\x16{A}.dq2",
            "_kombu.binding.celery.pidbox": f"\x06\x16\x06\x16{A}.celery.pidbox",
        }
        for table, member in members.items():
            await b.redis.sadd(f"{b.ns}:{table}", member, "other")
        await b.die(A)
        assert (await sweep(b))[2] == 1
        assert sorted(set(await b.bells())) == [("ready-pool", "o"), ("ready-pool", "o2")]
        record = await b.journal.sandbox("s")
        assert record is not None
        assert (record.owner, record.epoch) == ("", before)
        assert await b.redis.exists(f"{b.ns}:{A}.dq2", f"{b.ns}:owned:{A}", f"{b.ns}:workers") == 0
        for table in members:
            assert await b.redis.smembers(f"{b.ns}:{table}") == {b"other"}

    play(scene)


def test_sweep_ends_what_is_overdue(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        for op_id in ("queued", "alive", "orphan"):
            await b.op(op_id, timeout_s=0.001 if op_id == "queued" else 5.0)
        await b.grant("alive")
        await b.grant("orphan")
        await asyncio.sleep(0.01)
        for op_id in ("alive", "orphan"):  # a minute and more past its deadline
            await b.redis.hset(f"{b.ns}:op:{op_id}", "deadline_ms", 1)
        assert (await sweep(b))[1] == 1
        assert isinstance((await b.end("queued")).error, QueueUnavailableError)
        assert await b.state("alive") == "running"
        await b.journal.finish(A, "alive", await b.epoch(), state="done")
        await b.die(A)
        assert (await sweep(b))[1] == 1
        assert isinstance((await b.end("orphan")).error, QueueUnavailableError)

    play(scene)


# ------------------------------------------------------------------------------------------------------- follow


async def collect(stream: AsyncIterator[OutputChunk | End]) -> list[Any]:
    return [(i.index, i.stream, i.offset, i.data) if isinstance(i, OutputChunk) else i.state async for i in stream]


def test_follow_joins_what_several_epochs_wrote(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        await b.grant()
        await b.journal.publish(A, "o", await b.epoch(), [chunk(0, b"abc"), chunk(0, b"E", stream=Stream.STDERR), chunk(0, b"x", index=1)])
        await b.die(A)
        await b.journal.renew(B, LONG_S, {})
        await b.grant(wid=B)
        again = [chunk(0, b"ab"), chunk(2, b"cd"), chunk(9, b"gap"), chunk(0, b"xy", index=1)]
        await b.journal.finish(B, "o", await b.epoch(), state="done", chunks=again)
        out = Stream.STDOUT
        assert await collect(b.journal.follow("o")) == [
            (0, out, 0, b"abc"),
            (0, Stream.STDERR, 0, b"E"),
            (1, out, 0, b"x"),
            (0, out, 3, b"d"),
            (0, out, 9, b"gap"),
            (1, out, 1, b"y"),
            "done",
        ]

    play(scene)


def test_follow_live(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        following = asyncio.create_task(collect(b.journal.follow("o")))
        await asyncio.sleep(0.05)
        await b.grant()
        await b.journal.publish(A, "o", await b.epoch(), [chunk(0, b"a")])
        await asyncio.sleep(0.05)
        await b.journal.finish(A, "o", await b.epoch(), state="done")
        assert await following == [(0, Stream.STDOUT, 0, b"a"), "done"]

    play(scene)


def test_submit_and_follow(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()

        async def work() -> None:
            await asyncio.sleep(0.05)
            assert await b.bells() == [("a@h.dq2", "o")]
            await b.journal.finish(A, "o", (await b.grant()).epoch, state="done", chunks=[chunk(0, b"a")])

        working = asyncio.create_task(work())
        for _ in range(2):  # the second time it is known
            stream = b.journal.submit_and_follow(NewOp(op_id="o", sandbox_id="s", kind="start"))
            assert await collect(stream) == [(0, Stream.STDOUT, 0, b"a"), "done"]
        await working
        await b.redis.script_flush()  # a restarted server does not know the script
        assert (await collect(b.journal.submit_and_follow(NewOp(op_id="o", sandbox_id="s", kind="start"))))[-1] == "done"
        refused = b.journal.submit_and_follow(NewOp(op_id="o", sandbox_id="s", kind="start", body=b"other"))
        assert isinstance(await raised(collect(refused)), OperationConflictError)
        assert await b.state() == "done"  # no stray reply on a pooled connection

    play(scene)


def test_follow_takes_the_end_from_the_record_if_the_stream_has_none(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifixer_exec.store.streams._BLOCK_S", 0.05)

    async def scene(b: Bench) -> None:
        await b.sandbox()
        await b.op()
        await b.grant()
        error = {"error": "SandboxFileError", "args": ["no such file", "ENOENT"]}
        await b.journal.finish(A, "o", await b.epoch(), state="failed", error=error)
        await b.redis.delete(f"{b.ns}:out:o")
        (end,) = [item async for item in b.journal.follow("o")]
        assert isinstance(end, End)
        assert end.error is not None
        assert end.error.code == "ENOENT"
        assert isinstance(await raised(collect(b.journal.follow("nothing"))), QueueUnavailableError)

    play(scene)


def test_follow_translates_what_waiting_cannot_mend(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.redis.set(b.journal.keys.out("o"), "no stream")
        assert isinstance(await raised(collect(b.journal.follow("o"))), QueueUnavailableError)

    play(scene)


def test_a_reader_that_gives_up_leaves_no_reply_behind(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.sandbox()
        for op_id, follow in (("o", b.journal.submit_and_follow), ("o2", lambda op: b.journal.follow(op.op_id))):
            await b.op(op_id)
            following = asyncio.create_task(collect(follow(NewOp(op_id=op_id, sandbox_id="s", kind="start"))))
            await asyncio.sleep(0.05)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            assert [await b.state(op_id) for _ in range(5)] == ["queued"] * 5

    play(scene)


def test_purge_leaves_other_namespaces_alone(play: Play) -> None:
    async def scene(b: Bench) -> None:
        await b.create()
        other = Journal(b.redis, namespace=f"{b.ns}x")
        await other.renew(A, LONG_S, {})
        assert await b.journal.purge() >= 5
        assert await b.journal.purge() == 0
        assert await other.purge() == 4

    play(scene)


# --------------------------------------------------------------------------------------------- trouble with Redis


@pytest.mark.parametrize("namespace", ["", "a:b", "a*", "ä"])
def test_a_namespace_must_be_plain(namespace: str) -> None:
    with pytest.raises(InvalidRequestError):
        Bench(connect("redis://127.0.0.1:1/0"), namespace)


def test_follow_survives_lost_connections(namespace: str) -> None:
    async def scene(server: RedisServer) -> None:
        async with open_bench(server.tcp_url, namespace) as b:
            await b.sandbox()
            await b.op()
            await b.grant()
            following = asyncio.create_task(collect(b.journal.follow("o", patience_s=5)))
            for n in range(3):
                await asyncio.sleep(0.05)
                await b.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await b.journal.publish(A, "o", await b.epoch(), [chunk(n, b"x")])
            await b.journal.finish(A, "o", await b.epoch(), state="done")
            assert await following == [(0, Stream.STDOUT, n, b"x") for n in range(3)] + ["done"]

    with redis_server() as server:
        run(scene(server))


def test_follow_loses_patience(namespace: str) -> None:
    async def scene(server: RedisServer) -> None:
        redis = connect(server.tcp_url)
        b = Bench(redis, namespace)
        await b.sandbox()
        await b.op()
        following = asyncio.create_task(collect(b.journal.follow("o", patience_s=0.5)))
        await asyncio.sleep(0.1)
        server.stop()
        error = await raised(following)
        assert isinstance(error, QueueUnavailableError)
        assert f"127.0.0.1:{server.port}" in str(error)
        assert isinstance(await raised(b.op("o2")), QueueUnavailableError)
        server.start()  # it has lost everything
        assert isinstance(await raised(b.op("o2")), SandboxNotFoundError)
        await redis.aclose()

    with redis_server() as server:
        run(scene(server))


def test_a_full_server_changes_nothing(namespace: str) -> None:
    async def scene(server: RedisServer) -> None:
        async with open_bench(server.tcp_url, namespace) as b:
            await b.sandbox()
            await b.redis.config_set("maxmemory", 1)
            error = await raised(b.op())
            assert isinstance(error, QueueUnavailableError)
            assert "maxmemory" in str(error)
            await b.redis.config_set("maxmemory", 0)
            assert await b.journal.op("o") is None

    with redis_server("--maxmemory-policy", "noeviction") as server:
        run(scene(server))


@pytest.mark.parametrize(("login", "remedy"), [("", "redis://:password@host"), (":wr0ng@", "correct user and password")])
def test_a_wrong_login_is_told_without_the_password(login: str, remedy: str) -> None:
    async def scene(server: RedisServer) -> None:
        redis = connect(server.tcp_url.replace("redis://", f"redis://{login}"))
        error = await raised(Journal(redis, namespace="n").renew(A, 1, {}))
        await redis.aclose()
        assert remedy in str(error)
        assert "wr0ng" not in str(error)

    with redis_server("--requirepass", "s3cret") as server:
        run(scene(server))
