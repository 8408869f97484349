"""The reaper against a real Redis and real local sandboxes: planted orphans go, live sandboxes never do."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cifixer_exec.backends.base import Backend
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.errors import BackendUnavailableError
from cifixer_exec.model import SandboxHandle, SandboxSpec
from cifixer_exec.queues import placement_queue, pool_queue
from cifixer_exec.reaper import Reaped, Reaper
from cifixer_exec.settings import AppConfig
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import NewOp, NewSandbox, Taken
from cifixer_exec.wiring import make_journal

WORKER = "reaper-test@host"


@pytest.fixture
def config(redis_url: str, namespace: str, tmp_path: Path) -> AppConfig:
    return AppConfig(redis_url=redis_url, namespace=namespace, state_dir=tmp_path)


@pytest.fixture
def backend(config: AppConfig) -> Backend:
    backend = make_backend(config)
    health = backend.probe()
    if not health.ok:
        pytest.skip(f"the local backend does not work here: {health.summary}: {health.remedy}")
    return backend


def spec(name: str) -> SandboxSpec:
    return SandboxSpec(backend="local", sandbox_id=f"{name}-{uuid.uuid4().hex[:8]}", lifetime_s=300)


async def register(journal: Journal, backend: Backend, made: SandboxSpec, *, lifetime_s: float = 300) -> None:
    """As a worker does it: the create op is taken and the sandbox made ready."""
    create = NewSandbox(backend="local", queue=pool_queue("local"), spec=made.to_json(), lifetime_s=lifetime_s)
    op_id = f"create-{made.sandbox_id}"
    term = (await journal.renew(WORKER, 60, {"backend": "local", "placement": backend.placement})).term
    await journal.submit(NewOp(op_id=op_id, sandbox_id=made.sandbox_id, kind="create", create=create, timeout_s=60))
    taken = await journal.take(WORKER, op_id, "nonce", term)
    assert isinstance(taken, Taken)
    handle = SandboxHandle(backend="local", sandbox_id=made.sandbox_id, placement=backend.placement)
    queue = placement_queue("local", backend.placement)
    assert await journal.ready(WORKER, made.sandbox_id, taken.epoch, handle=handle.to_json(), placement=backend.placement, queue=queue)
    assert await journal.finish(WORKER, op_id, taken.epoch, state="done", result={})


def round_of(
    config: AppConfig,
    backend: Backend,
    prepare: Callable[[Journal], Any],
    *,
    clock: Callable[[], float] = time.time,
    grace_s: float = 0.0,
    dry_run: bool = False,
    rounds: int = 1,
) -> list[Reaped]:
    async def go() -> list[Reaped]:
        journal = make_journal(config)
        try:
            await prepare(journal)
            reaper = Reaper(journal=journal, backend=backend, creation_grace_s=grace_s, clock=clock)
            return [await reaper.reap(dry_run=dry_run) for _ in range(rounds)]
        finally:
            await journal.redis.aclose()

    return asyncio.run(go())


async def nothing(_journal: Journal) -> None:
    pass


def alive(backend: Backend, made: SandboxSpec) -> bool:
    return backend.inspect(SandboxHandle(backend="local", sandbox_id=made.sandbox_id, placement=backend.placement)).alive


def ids(backend: Backend) -> set[str]:
    return {owned.handle.sandbox_id for owned in backend.list_owned()}


@pytest.fixture
def destroy_all(backend: Backend) -> Any:
    yield
    for owned in backend.list_owned():
        backend.destroy(owned.handle)
    assert not ids(backend)


@pytest.mark.usefixtures("destroy_all")
class TestReaper:
    def test_an_orphan_goes_and_a_registered_sandbox_stays(self, config: AppConfig, backend: Backend) -> None:
        orphan, live = spec("orphan"), spec("live")
        backend.create(orphan)
        backend.create(live)
        (reaped,) = round_of(config, backend, lambda journal: register(journal, backend, live))
        assert reaped.destroyed == (orphan.sandbox_id,)
        assert ids(backend) == {live.sandbox_id}
        assert alive(backend, live)

    def test_a_young_orphan_may_still_be_in_the_making(self, config: AppConfig, backend: Backend) -> None:
        orphan = spec("young")
        backend.create(orphan)
        (reaped,) = round_of(config, backend, nothing, grace_s=60)
        assert reaped.destroyed == ()
        assert alive(backend, orphan)

    def test_a_dry_run_tells_and_does_nothing(self, config: AppConfig, backend: Backend) -> None:
        orphan = spec("orphan")
        backend.create(orphan)
        (reaped,) = round_of(config, backend, nothing, dry_run=True)
        assert reaped == Reaped(destroyed=(orphan.sandbox_id,), dry_run=True)
        assert alive(backend, orphan)

    def test_two_rounds_do_no_harm(self, config: AppConfig, backend: Backend) -> None:
        orphan = spec("orphan")
        backend.create(orphan)
        first, second = round_of(config, backend, nothing, rounds=2)
        assert first.destroyed == (orphan.sandbox_id,)
        assert second == Reaped()

    def test_an_expired_sandbox_goes_although_it_is_registered(self, config: AppConfig, backend: Backend) -> None:
        old, extended = replace(spec("expired"), lifetime_s=10), spec("extended")
        for made in (old, extended):
            backend.create(made)

        async def prepare(journal: Journal) -> None:
            for made in (old, extended):  # of one the registry has forgotten that it was extended
                await register(journal, backend, made, lifetime_s=10)

        (reaped,) = round_of(config, backend, prepare, clock=lambda: time.time() + 11)
        assert reaped.destroyed == (old.sandbox_id,)
        assert ids(backend) == {extended.sandbox_id}

    def test_an_entry_without_a_sandbox_is_closed_with_the_cause(self, config: AppConfig, backend: Backend) -> None:
        gone = spec("gone")

        async def prepare(journal: Journal) -> None:
            backend.create(gone)
            await register(journal, backend, gone)
            backend.destroy(SandboxHandle(backend="local", sandbox_id=gone.sandbox_id, placement=backend.placement))

        (reaped,) = round_of(config, backend, prepare)
        assert reaped.closed == (gone.sandbox_id,)

        async def look() -> tuple[str, str]:
            journal = make_journal(config)
            record = await journal.sandbox(gone.sandbox_id)
            await journal.redis.aclose()
            assert record is not None
            return record.state, record.cause

        assert asyncio.run(look()) == ("lost", "it was torn down")

    def test_a_half_made_sandbox_goes(self, config: AppConfig, backend: Backend, tmp_path: Path) -> None:
        half = tmp_path / config.namespace / "sandboxes" / "half-made"
        half.mkdir(parents=True)
        (reaped,) = round_of(config, backend, nothing, clock=lambda: time.time() + 1)
        assert reaped.destroyed == ("half-made",)
        assert not half.exists()

    def test_a_platform_that_does_not_answer_ends_the_round(
        self, config: AppConfig, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        live = spec("live")
        backend.create(live)

        def no_answer() -> Any:
            raise BackendUnavailableError("the platform does not answer")

        monkeypatch.setattr(backend, "list_owned", no_answer)
        with pytest.raises(BackendUnavailableError):
            round_of(config, backend, lambda journal: register(journal, backend, live))
        monkeypatch.undo()
        assert alive(backend, live)
