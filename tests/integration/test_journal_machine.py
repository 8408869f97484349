"""Random interleavings of clients and workers, with lost leases, doorbells lost and doubled, cancels and closes, on a real redis-server.

After every step the journal must be consistent; at the end, one healthy worker must bring every op to its end.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from uuid import uuid4

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cifixer_exec.errors import ExecutorError
from cifixer_exec.model import OutputChunk, Stream
from cifixer_exec.store.connection import connect
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import FINAL_STATES, NewOp, NewSandbox, NotTaken, Taken

T = TypeVar("T")
WORKERS = ("a@h", "b@h", "c@h")
SANDBOXES = ("s1", "s2")
KINDS = ("start", "start", "start", "read_file", "read_file", "destroy")

#: The steps by their weight.
STEPS = [
    *["submit"] * 5,
    *["hear"] * 7,
    *["publish", "finish", "hear_again"] * 3,
    *["lapse", "renew"] * 2,
    *["create", "cancel", "lose_bell", "double_bell", "release", "hand_over", "reap", "sweep", "forget"],
]


@dataclass(frozen=True)
class Grant:
    """What a worker believes it may do."""

    wid: str
    op_id: str
    sid: str
    kind: str
    epoch: int


@dataclass
class Seen:
    """What was seen of one op, to compare with later."""

    epoch: int = 0
    final: dict[bytes, bytes] = field(default_factory=dict)


class JournalMachine(RuleBasedStateMachine):
    """Three workers, two sandboxes, any number of ops."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.ns = f"m{uuid4().hex[:12]}"
        self.client: Any = redis.Redis.from_url(url)
        self.redis = connect(url)
        self.journal = Journal(self.redis, namespace=self.ns)
        self.ops: dict[str, Seen] = {}
        self.epochs: dict[str, int] = {}
        self.terms: dict[str, int] = {}
        self.grants: list[Grant] = []
        self.heard: list[str] = []

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def hash(self, kind: str, name: str) -> dict[bytes, bytes]:
        return dict(self.client.hgetall(f"{self.ns}:{kind}:{name}"))

    def members(self, kind: str, name: str) -> set[str]:
        return {m.decode() for m in self.client.smembers(f"{self.ns}:{kind}:{name}")}

    def alive(self, wid: str) -> bool:
        return bool(self.client.exists(f"{self.ns}:worker:{wid}"))

    def bells(self, queue: str) -> list[str]:
        return [json.loads(m)["headers"]["id"] for m in self.client.lrange(f"{self.ns}:{queue}", 0, -1)]

    def holds_sandbox(self, grant: Grant) -> bool:
        """True if the worker still is the owner that it was when it got the grant."""
        sandbox = self.hash("sandbox", grant.sid)
        return (sandbox[b"owner"].decode(), int(sandbox[b"epoch"])) == (grant.wid, grant.epoch)

    def holds_op(self, grant: Grant) -> bool:
        """True if the op is the grant's alone."""
        op = self.hash("op", grant.op_id)
        return self.holds_sandbox(grant) and op[b"state"] == b"running" and int(op[b"epoch"]) == grant.epoch

    def pick(self, n: int) -> Grant:
        """Mostly one of the latest grants, else any."""
        return self.grants[-1 - n % min(4, len(self.grants))] if n % 3 else self.grants[n % len(self.grants)]

    # ---------------------------------------------------------------------------------------------- clients

    @initialize()
    def begin(self) -> None:
        """Two workers live, and one has a sandbox already, so that few steps lead deep."""
        for wid in WORKERS[:2]:
            self.terms[wid] = self.do(self.journal.renew(wid, 1000, {})).term
        self.create(SANDBOXES[0], WORKERS[0], 0)
        self.hear(SANDBOXES[0], WORKERS[0], 0)
        self.end(self.grants[0], good=True)

    @rule(what=st.sampled_from(STEPS), sid=st.sampled_from(SANDBOXES), wid=st.sampled_from(WORKERS), n=st.integers(0, 1000))
    def step(self, what: str, sid: str, wid: str, n: int) -> None:
        """One rule for all, so that hypothesis does not leave whole verbs out of an example, and some come more often."""
        getattr(self, what)(sid, wid, n)

    def create(self, sid: str, wid: str, n: int) -> None:
        # One create per sandbox; later ones are repetitions, or refused where the sandbox is all that Redis knows.
        if f"create-{sid}" not in self.ops and self.hash("sandbox", sid):
            return
        create = NewSandbox(backend="local", queue="pool", spec={}, lifetime_s=1000)
        new = self.do(self.journal.submit(NewOp(op_id=f"create-{sid}", sandbox_id=sid, kind="create", create=create)))
        assert new.created == (f"create-{sid}" not in self.ops)
        self.ops.setdefault(f"create-{sid}", Seen())

    def submit(self, sid: str, wid: str, n: int) -> None:
        kind, patient = KINDS[n % len(KINDS)], n % 11
        op = NewOp(op_id=f"op{len(self.ops)}", sandbox_id=sid, kind=kind, payload={"secret": 1}, timeout_s=None if patient else 0.001)
        try:
            assert self.do(self.journal.submit(op)).created
        except ExecutorError:
            assert self.hash("sandbox", sid).get(b"state") in (None, b"closing", b"closed", b"lost")
            return
        self.ops[op.op_id] = Seen()
        assert not self.do(self.journal.submit(op)).created

    def cancel(self, sid: str, wid: str, n: int) -> None:
        if not self.ops:
            return
        op_id = sorted(self.ops)[n % len(self.ops)]
        before = self.hash("op", op_id)[b"state"].decode()
        after = self.do(self.journal.cancel(op_id))
        assert after == ("cancelled" if before == "queued" else before)

    # ---------------------------------------------------------------------------------------------- workers

    def hear(self, sid: str, wid: str, n: int) -> None:
        """A doorbell is delivered, even to a worker whose lease has lapsed."""
        queues = [q for q in ("pool", *(f"{w}.dq2" for w in WORKERS)) if self.client.exists(f"{self.ns}:{q}")]
        if queues:
            queue = queues[n % len(queues)]
            self.heard.append(json.loads(self.client.rpop(f"{self.ns}:{queue}"))["headers"]["id"])
            self.take(wid if queue == "pool" else queue.removesuffix(".dq2"), self.heard[-1])

    def hear_again(self, sid: str, wid: str, n: int) -> None:
        if self.heard:
            self.take(wid, self.heard[n % len(self.heard)])

    def lose_bell(self, sid: str, wid: str, n: int) -> None:
        self.client.rpop(f"{self.ns}:{'pool' if n % 2 else f'{wid}.dq2'}")

    def double_bell(self, sid: str, wid: str, n: int) -> None:
        """As kombu does when it restores what a worker had not acknowledged."""
        queue = f"{self.ns}:{'pool' if n % 2 else f'{wid}.dq2'}"
        if message := self.client.lindex(queue, n % 3):
            self.client.lpush(queue, message)

    def forget(self, sid: str, wid: str, n: int) -> None:
        """Redis loses all it had; then somebody registers again what lives."""
        if n % 4:
            return
        records = self.do(self.journal.sandboxes())
        self.do(self.journal.purge())
        self.ops.clear()
        self.grants.clear()
        self.heard.clear()
        for record in records:
            if record.state == "ready":
                assert self.do(self.journal.restore(record))
            assert not self.do(self.journal.restore(replace(record, expires_ms=1))), "neither twice nor past its end"

    def take(self, wid: str, op_id: str) -> Grant | None:
        nonce = uuid4().hex
        before = self.hash("sandbox", self.hash("op", op_id)[b"sid"].decode())[b"owner"].decode()
        known_term = self.terms.get(wid, 0)
        stale = self.do(self.journal.take(wid, op_id, nonce, known_term - 1))
        assert isinstance(stale, NotTaken), "nothing is granted to a worker that has not noticed a lapse"
        taken = self.do(self.journal.take(wid, op_id, nonce, known_term))
        again = self.do(self.journal.take(wid, op_id, nonce, known_term))
        if isinstance(taken, NotTaken):
            return None
        assert self.alive(wid)
        assert before in ("", wid) or not self.alive(before), "nothing is taken from a living owner"
        assert isinstance(again, Taken)
        assert (again.epoch, again.attempt) == (taken.epoch, taken.attempt)
        assert not [g for g in self.grants if (g.op_id, g.epoch) == (op_id, taken.epoch)], "one grant per epoch"
        assert taken.adopted == any(g.op_id == op_id for g in self.grants)
        assert not [g for g in self.grants if g.sid == taken.sandbox_id and g.epoch == taken.epoch and g.wid != wid], "one owner per epoch"
        self.grants.append(Grant(wid, op_id, taken.sandbox_id, taken.kind, taken.epoch))
        return self.grants[-1]

    def publish(self, sid: str, wid: str, n: int) -> None:
        if not self.grants:
            return
        grant = self.pick(n)
        before, held = self.client.xlen(f"{self.ns}:out:{grant.op_id}"), self.holds_op(grant)
        chunk = OutputChunk(stream=Stream.STDOUT, offset=0, data=b"x")
        landed = self.do(self.journal.publish(grant.wid, grant.op_id, grant.epoch, [chunk]))
        assert landed == held, "fenced writes never land"
        assert self.client.xlen(f"{self.ns}:out:{grant.op_id}") == before + landed

    def finish(self, sid: str, wid: str, n: int) -> None:
        if self.grants:
            self.end(self.pick(n), good=n % 4 > 0)

    def end(self, grant: Grant, good: bool) -> None:
        """What a worker does when the work is done."""
        who: dict[str, Any] = {"wid": grant.wid, "epoch": grant.epoch}
        over = self.hash("sandbox", grant.sid)[b"state"] in (b"closed", b"lost")
        held = self.holds_sandbox(grant)
        if grant.kind == "create" and good:
            good = self.do(self.journal.ready(**who, sandbox_id=grant.sid, handle={}, placement="here", queue="pool"))
            assert good == (held and not over)
        if grant.kind == "destroy" and good:
            good = self.do(self.journal.close(grant.sid, state="closed", cause="asked", **who, keep_op=grant.op_id))
            assert good == held
        held = self.holds_op(grant) or self.hash("op", grant.op_id).get(b"ended_by") == f"{grant.wid} {grant.epoch}".encode()
        error = None if good else {"error": "BackendError", "args": ["no", ""]}
        state: Any = "done" if good else "failed"
        assert self.do(self.journal.finish(**who, op_id=grant.op_id, state=state, error=error)) == held, "fenced writes never land"

    def reap(self, sid: str, wid: str, n: int) -> None:
        if n % 3 == 0:
            self.do(self.journal.close(sid, state="lost" if n % 2 else "closed", cause="reaped"))

    def lapse(self, sid: str, wid: str, n: int) -> None:
        self.client.delete(f"{self.ns}:worker:{wid}")

    def renew(self, sid: str, wid: str, n: int) -> None:
        lapsed = not self.alive(wid)
        term = self.do(self.journal.renew(wid, 1000, {})).term
        assert (term != self.terms.get(wid)) == lapsed, "who renews learns of every lapse"
        assert self.do(self.journal.renew(wid, 1000, {})).term == term, "and may be told again"
        self.terms[wid] = term

    def release(self, sid: str, wid: str, n: int) -> None:
        owned = len(self.members("owned", wid))
        assert self.do(self.journal.release(wid)) == owned

    def hand_over(self, sid: str, wid: str, n: int) -> None:
        if not self.grants:
            return
        grant = self.pick(n)
        held = self.holds_sandbox(grant) and self.hash("sandbox", grant.sid)[b"state"] not in (b"closed", b"lost")
        assert self.do(self.journal.hand_over(grant.wid, grant.sid, grant.epoch)) == held

    def sweep(self, sid: str, wid: str, n: int) -> None:
        self.client.delete(f"{self.ns}:lock:sweep")
        self.do(self.journal.sweep(wid, reping_s=0))
        for op_id in self.ops:
            op = self.hash("op", op_id)
            if op[b"state"] == b"queued":
                sandbox = self.hash("sandbox", op[b"sid"].decode())
                owner = sandbox[b"owner"].decode()
                queue = f"{owner}.dq2" if owner and self.alive(owner) else sandbox[b"queue"].decode()
                assert op_id in self.bells(queue), "no queued op without a doorbell after a sweep"
        assert all(self.alive(w) for w in self.known_workers())

    def known_workers(self) -> set[str]:
        return {w.decode() for w in self.client.smembers(f"{self.ns}:workers")}

    # ------------------------------------------------------------------------------------------- invariants

    @invariant()
    def ops_are_sound(self) -> None:
        with self.client.pipeline(transaction=False) as pipe:
            for op_id in self.ops:
                pipe.hgetall(f"{self.ns}:op:{op_id}")
                pipe.xrange(f"{self.ns}:out:{op_id}")
            found = pipe.execute()
        for (op_id, seen), op, out in zip(self.ops.items(), found[::2], found[1::2], strict=True):
            ends = sum(b"end" in fields for _, fields in out)
            final = op[b"state"].decode() in FINAL_STATES
            assert ends == final, "exactly one end entry"
            assert final or op_id in self.members("open", op[b"sid"].decode())
            assert int(op[b"epoch"]) >= seen.epoch, "epochs only grow"
            seen.epoch = int(op[b"epoch"])
            if final:
                assert not {b"payload", b"body", b"bell", b"nonce"} & set(op), "secrets do not linger"
                assert not seen.final or seen.final == op, "final states never change"
                seen.final = op

    @invariant()
    def sandboxes_are_sound(self) -> None:
        listed = {s.decode() for s in self.client.zrange(f"{self.ns}:sandboxes", 0, -1)}
        live = {s.decode() for s in self.client.zrange(f"{self.ns}:live", 0, -1)}
        for sid in SANDBOXES:
            sandbox = self.hash("sandbox", sid)
            if sandbox:
                over = sandbox[b"state"] in (b"closed", b"lost")
                assert (sid in listed) != over
                owners = [w for w in WORKERS if sid in self.members("owned", w)]
                assert owners == ([] if over or not sandbox[b"owner"] else [sandbox[b"owner"].decode()])
                if epoch := int(sandbox[b"epoch"]):  # 0: nobody has owned it yet, or since Redis lost its data
                    assert epoch >= self.epochs.get(sid, 0), "epochs only grow, even over a loss of all data"
                    self.epochs[sid] = epoch
                opened = self.members("open", sid)
                assert all(self.hash("op", o)[b"state"] in (b"queued", b"running") for o in opened)
                assert (sid in live) == bool(opened)
                cause_only = {o for o in opened if self.hash("op", o)[b"state"] == b"queued"} if over else set()
                assert not cause_only, "nothing waits for a sandbox that is gone"
        cancelling = {o.decode() for o in self.client.smembers(f"{self.ns}:cancelling")}
        assert all(self.hash("op", o)[b"state"] == b"running" for o in cancelling)

    # -------------------------------------------------------------------------------------------------- end

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self.do(self.journal.purge())
            self.do(self.redis.aclose())
            self.client.close()
            self.runner.close()

    def settle(self) -> None:
        """All workers die; a new one, with nothing but doorbells and sweeps, brings every op to its end."""
        for wid in WORKERS:
            self.lapse("", wid, 0)
        self.terms["new@h"] = self.do(self.journal.renew("new@h", 1000, {})).term
        for _ in range(4):
            self.client.delete(f"{self.ns}:lock:sweep")
            self.do(self.journal.sweep("new@h", reping_s=0))
            for queue in ("pool", "new@h.dq2", "pool", "new@h.dq2"):
                while message := self.client.rpop(f"{self.ns}:{queue}"):
                    grant = self.take("new@h", json.loads(message)["headers"]["id"])
                    if grant:
                        self.end(grant, good=True)
        states = {op_id: self.hash("op", op_id)[b"state"].decode() for op_id in self.ops}
        assert set(states.values()) <= FINAL_STATES, states
        self.ops_are_sound()
        assert not self.client.exists(f"{self.ns}:live", f"{self.ns}:cancelling")


@pytest.mark.timeout(120)
def test_any_interleaving(redis_url: str) -> None:
    machine: Any = lambda: JournalMachine(redis_url)  # noqa: E731
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None),
    )
