"""The audit of Redis: what the journal says of every op, and what is left when all is over."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter, defaultdict
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.chaos.load import Expected
from tests.chaos.report import Report

_LOOK_S = 3.0
#: Keys that may stay for ever when no worker is left: ``born`` is one number, the bindings of the shared queues are as many as
#: there are queues, the deadlines one per exchange. What there is per worker incarnation is looked for apart, while workers live.
_LASTING = re.compile(r"born|_kombu\.binding(_permanent)?\.sbx|_kombu\.binding_deadlines")
_EMPTY_WHEN_QUIET = re.compile(
    r"live|cancelling|answers|sandboxes|unacked.*|owned:.*|open:.*|sandbox\..*|cifixer\.maintenance|(?!_kombu).*\.dq2"
)
_WORKER = re.compile(r"w\d+-[0-9a-f]{8}@chaos")


class JournalAudit:
    """Looks at every op of the namespace while it is kept: final once, with one end, the same for ever, the same that callers saw."""

    def __init__(self, redis: Redis, namespace: str, report: Report) -> None:
        self._redis: Any = redis  # typed for decoded and raw replies at once
        self._prefix = f"{namespace}:"
        self._report = report
        #: op id -> state and result, of the ops that were found final
        self.finals: dict[str, tuple[str, bytes]] = {}
        self.open: dict[str, dict[str, str]] = {}
        #: sandbox id -> epochs under which its ops ended
        self._epochs: defaultdict[str, set[bytes]] = defaultdict(set)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with suppress(RedisError):
                await self.look()
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """Once at everything. Raises RedisError."""
        self.open = {}
        async for key in self._redis.scan_iter(match=f"{self._prefix}op:*", count=2000):
            await self._look_at(key.decode().removeprefix(f"{self._prefix}op:"))
        self._report.ops = len(self.finals) + len(self.open)
        self._report.owner_changes = sum(len(epochs) - 1 for epochs in self._epochs.values())

    async def _look_at(self, op_id: str) -> None:
        raw: dict[bytes, bytes] = await self._redis.hgetall(f"{self._prefix}op:{op_id}")
        state = raw.get(b"state", b"").decode()
        if not raw:
            return
        if state not in ("done", "failed", "cancelled"):
            self.open[op_id] = {k.decode(): v.decode(errors="replace")[:200] for k, v in raw.items() if k not in (b"body", b"bell")}
            if op_id in self.finals:
                self._report.findings.append(f"op {op_id} was final and is {state} again")
            return
        final = (state, raw.get(b"result", b"") or raw.get(b"error", b""))
        if op_id not in self.finals:
            self.finals[op_id] = final
            if raw.get(b"epoch", b"0") != b"0":
                self._epochs[raw[b"sid"].decode()].add(raw[b"epoch"])
            self._report.adoptions += int(raw.get(b"attempt", b"0")) > 1
            await self._check_stream(op_id, final)
        elif self.finals[op_id] != final:
            self._report.findings.append(f"op {op_id} had the final state {self.finals[op_id]} and now has {final}")

    async def _check_stream(self, op_id: str, final: tuple[str, bytes]) -> None:
        entries = await self._redis.xrange(f"{self._prefix}out:{op_id}")
        if not entries and not await self._redis.exists(f"{self._prefix}op:{op_id}"):
            return  # its caller has it and let it go, just now
        ends = [(fields[b"end"].decode(), fields[b"r"]) for _, fields in entries if b"end" in fields]
        if ends != [final] or b"end" not in entries[-1][1]:
            self._report.findings.append(f"op {op_id} is {final}, and its stream of {len(entries)} entries has the ends {ends}")

    def compare(self, book: dict[str, Expected]) -> None:
        """What callers were told is what the journal says."""
        for op_id, expected in book.items():
            if op_id not in self.finals:
                if expected.seen:
                    self._report.findings.append(f"op {op_id} ({expected.shape}) has an answer and was never seen final in the journal")
                continue
            state, text = self.finals[op_id]
            records = json.loads(text or b"{}").get("records") or [] if state == "done" else []
            for results in expected.seen if state == "done" else []:
                told = [(str(r.status), r.exit_code, r.stdout_bytes) for r in results]
                if told != [(r["status"], r.get("exit_code"), r.get("stdout_bytes", 0)) for r in records]:
                    self._report.findings.append(f"op {op_id}: its caller was told {told}, the journal says {records}")


class KeyAudit:
    """What lies in Redis when nothing is going on, and when nobody is there any more."""

    def __init__(self, redis: Redis, namespace: str, report: Report) -> None:
        self._redis: Any = redis  # typed for decoded and raw replies at once
        self._prefix = f"{namespace}:"
        self._report = report

    async def settle(self, patience_s: float, workers: set[str]) -> None:
        """Wait until queues and indexes are empty, with the ``workers`` of these names alive and nothing left of others.

        What does not come to that is a finding.

        The lease of one that was killed at the end of the run must have ended: else it would outlive those who clean up after it.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + patience_s
        while True:
            keys = await self._keys()
            left = [k for k in keys if _EMPTY_WHEN_QUIET.fullmatch(k)]
            dead, leases = await self._dead_workers(), {k.partition(":")[2].partition("-")[0] for k in keys if k.startswith("worker:")}
            if not left and not dead and leases == workers:
                return
            if loop.time() > give_up:
                self._report.findings += [f"key {k} is still there: {await self._show(k)}" for k in left]
                self._report.findings += [f"the dead worker {w} is still in the set 'workers'" for w in dead]
                self._report.findings += [f"leases of {sorted(leases)}, workers {sorted(workers)}"] * (leases != workers)
                return
            await asyncio.sleep(0.25)

    async def check_incarnations(self) -> None:
        """While the last workers live: nothing names one that is gone, else it grows with every start."""
        alive = {k.removeprefix("worker:") for k in await self._keys() if k.startswith("worker:")}
        named: Counter[str] = Counter()
        example: dict[str, str] = {}
        for key in await self._keys():
            if not key.startswith(("op:", "out:", "sandbox:")):
                for text in [key, *await self._members(key)]:
                    if any(w not in alive for w in _WORKER.findall(text)):
                        named[_WORKER.sub("<wid>", key)] += 1
                        example[_WORKER.sub("<wid>", key)] = text
        for key, count in named.items():
            self._report.findings.append(f"key {key} names {count} workers that are gone, such as {example[key]!r}")

    async def check_rest(self) -> None:
        """When all workers have ended: each key ends by itself or is one of a few."""
        for key in await self._keys():
            if await self._redis.ttl(self._prefix + key) == -1 and not _LASTING.fullmatch(key):
                self._report.findings.append(f"key {key} stays for ever: {await self._show(key)}")

    async def _dead_workers(self) -> list[str]:
        names: set[bytes] = await self._redis.smembers(f"{self._prefix}workers")
        return [n.decode() for n in names if not await self._redis.exists(f"{self._prefix}worker:{n.decode()}")]

    async def _keys(self) -> list[str]:
        return [k.decode().removeprefix(self._prefix) async for k in self._redis.scan_iter(match=f"{self._prefix}*", count=5000)]

    async def _members(self, key: str) -> list[str]:
        key, kind = self._prefix + key, (await self._redis.type(self._prefix + key)).decode()
        found: Any = []
        if kind == "set":
            found = await self._redis.smembers(key)
        elif kind == "zset":
            found = await self._redis.zrange(key, 0, -1)
        elif kind == "hash":
            found = await self._redis.hkeys(key)
        elif kind == "list":
            found = await self._redis.lrange(key, 0, 20)
        return [m.decode(errors="replace") for m in found]

    async def _show(self, key: str) -> str:
        return str((await self._members(key))[:3])[:600]
