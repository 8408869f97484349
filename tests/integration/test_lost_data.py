"""What a Redis that lost its data means: owners register their sandboxes again, the reaper waits, a runner that refuses is no hang."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.errors import SandboxNotFoundError
from cifixer_exec.model import Capabilities, Health, Inspection, SandboxHandle, SandboxSpec
from cifixer_exec.reaper import Reaper
from cifixer_exec.store.connection import connect
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import NewOp, NewSandbox, SandboxRecord, Taken
from cifixer_exec.worker.ownership import Ownership
from cifixer_exec.worker.restoration import restore

A = "a@h"
NOW_S = 4_000_000_000.0  # far ahead, so that nothing is past its end by the server's clock


class Shelf(Backend):
    """A platform that is a dictionary: what it has, and whether it lives."""

    name = "shelf"

    def __init__(self) -> None:
        self.alive: dict[str, bool] = {}

    placement = "here"
    capabilities = Capabilities(images=False, memory=False, cpus=False, disk=False, max_processes=False, networks=(), readonly_paths=False)

    def probe(self) -> Health:
        return Health(ok=True, summary="it is a dictionary")

    def create(self, spec: SandboxSpec) -> SandboxHandle:
        self.alive[spec.sandbox_id] = True
        return SandboxHandle(backend=self.name, sandbox_id=spec.sandbox_id, placement=self.placement, data={"on": "the shelf"})

    def dial(self, handle: SandboxHandle) -> Any:
        raise NotImplementedError

    def destroy(self, handle: SandboxHandle) -> None:
        self.alive.pop(handle.sandbox_id, None)

    def inspect(self, handle: SandboxHandle) -> Inspection:
        return Inspection(alive=self.alive.get(handle.sandbox_id, False), cause="it fell off")

    def extend(self, handle: SandboxHandle, expires_at_s: float) -> None:
        raise NotImplementedError

    def list_owned(self) -> Sequence[Owned]:
        return [Owned(handle=self.handle(i), created_at_s=NOW_S - 1000, expires_at_s=NOW_S) for i in self.alive]

    def handle(self, sandbox_id: str) -> SandboxHandle:
        return SandboxHandle(backend=self.name, sandbox_id=sandbox_id, placement=self.placement, data={"on": "the shelf"})


class Scene:
    """A worker with sandboxes on a shelf, and its journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.shelf = Shelf()
        self.ownership = Ownership(self.shelf, A)

    async def make(self, sandbox_id: str) -> Taken:
        spec = SandboxSpec(backend="shelf", sandbox_id=sandbox_id, env={"TOKEN": "secret"})
        create = NewSandbox(backend="shelf", queue="pool", spec=spec.to_json(), lifetime_s=1000)
        op_id = f"create-{sandbox_id}"
        term = (await self.journal.renew(A, 60, {})).term
        await self.journal.submit(NewOp(op_id=op_id, sandbox_id=sandbox_id, kind="create", create=create))
        taken = await self.journal.take(A, op_id, "n", term)
        assert isinstance(taken, Taken)
        handle = self.shelf.create(spec)
        assert await self.journal.ready(A, sandbox_id, taken.epoch, handle=handle.to_json(), placement="here", queue="q")
        self.ownership.remember(handle, taken.spec)
        return taken

    async def lose_everything(self) -> None:
        await self.journal.purge()

    async def restore(self) -> list[str]:
        return await restore(journal=self.journal, backend=self.shelf, ownership=self.ownership, wid=A)


@pytest.fixture
def play(redis_url: str, namespace: str) -> Any:
    def run(scene: Any) -> None:
        async def go() -> None:
            redis = connect(redis_url)
            try:
                await scene(Scene(Journal(redis, namespace=namespace)))
            finally:
                await redis.aclose()

        asyncio.run(go())

    return run


def test_an_owner_registers_its_living_sandboxes_again(play: Any) -> None:
    async def scene(s: Scene) -> None:
        for name in ("kept", "dead", "ended"):
            before = await s.make(name)
        s.shelf.alive["dead"] = False
        s.shelf.destroy(s.shelf.handle("ended"))
        await s.lose_everything()
        with pytest.raises(SandboxNotFoundError, match="ask again in a few seconds"):
            await s.journal.submit(NewOp(op_id="o", sandbox_id="kept", kind="start"))
        assert await s.restore() == ["kept"]
        record = await s.journal.sandbox("kept")
        assert record is not None
        assert (record.state, record.owner, record.queue, record.expires_ms) == ("ready", "", "sandbox.shelf.here", NOW_S * 1000)
        assert (record.spec, record.handle) == ({**before.spec, "sandbox_id": "kept"}, s.shelf.handle("kept").to_json())
        assert sorted(s.ownership.known) == ["kept"], "what is gone is forgotten"
        assert await s.restore() == []

    play(scene)


def test_a_restored_sandbox_has_a_higher_epoch_than_ever_before(play: Any) -> None:
    async def scene(s: Scene) -> None:
        before = await s.make("kept")
        await s.lose_everything()
        await s.restore()
        term = (await s.journal.renew(A, 60, {})).term
        await s.journal.submit(NewOp(op_id="o", sandbox_id="kept", kind="start"))
        taken = await s.journal.take(A, "o", "n", term)
        assert isinstance(taken, Taken)
        assert taken.epoch > before.epoch
        assert taken.spec["env"] == {"TOKEN": "secret"}

    play(scene)


def test_what_is_registered_or_past_its_end_is_not_restored(play: Any) -> None:
    async def scene(s: Scene) -> None:
        await s.make("kept")
        record = await s.journal.sandbox("kept")
        assert isinstance(record, SandboxRecord)
        assert not await s.journal.restore(record)
        await s.lose_everything()
        assert not await s.journal.restore(replace(record, expires_ms=1))
        assert await s.journal.restore(record)

    play(scene)


def test_a_young_registry_dooms_nothing_that_it_does_not_know(play: Any) -> None:
    async def scene(s: Scene) -> None:
        s.shelf.alive["unknown"] = True

        async def reap(grace_s: float) -> tuple[str, ...]:
            reaper = Reaper(journal=s.journal, backend=s.shelf, creation_grace_s=grace_s, clock=lambda: NOW_S)
            return (await reaper.reap()).destroyed

        assert await reap(0.3) == ()
        assert s.shelf.alive == {"unknown": True}
        await asyncio.sleep(0.3)
        assert await reap(0.3) == ("unknown",)

    play(scene)
