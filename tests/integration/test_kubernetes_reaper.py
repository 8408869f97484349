"""The reaper in a cluster: what should not be there goes, whoever else's Jobs never do, and however many there are."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.backends.kubernetes import Address, KubernetesBackend, KubernetesOptions
from cifixer_exec.backends.kubernetes.cluster import PAGE_SIZE
from cifixer_exec.backends.kubernetes.job import manifest
from cifixer_exec.backends.kubernetes.names import INSTANCE, SANDBOX, Names
from cifixer_exec.errors import BackendUnavailableError
from cifixer_exec.model import SandboxHandle, SandboxSpec
from cifixer_exec.queues import placement_queue, pool_queue
from cifixer_exec.reaper import Reaped, Reaper
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import NewOp, NewSandbox, Taken
from cifixer_exec.wiring import make_journal
from tests.support.kubeconfigs import kubeconfig
from tests.support.kubernetes_admin import (
    backend_of,
    found,
    job_path,
    jobs_path,
    left_of,
    listed,
    made,
    pods_path,
    removed,
    sandboxes_of,
    spec_of,
    wait_for,
)
from tests.support.kubernetes_pods import delete_job, end_first_process, names_of
from tests.support.scripted_server import Asked, Reply, scripted_server

Json = dict[str, Any]
Prepare = Callable[[Journal], Awaitable[None]]
WORKER = "reaper-test@host"


@pytest.fixture
def config(namespace: str, redis_url: str) -> Iterator[AppConfig]:
    with sandboxes_of(namespace) as direct:
        queued = direct.with_(dispatch="queue", redis_url=redis_url)
        yield queued
        for owned in backend_of(queued).list_owned():
            backend_of(queued).destroy(owned.handle)
        wait_for(lambda: not left_of(queued))


@pytest.fixture
def backend(config: AppConfig) -> KubernetesBackend:
    return backend_of(config)


async def nothing(_journal: Journal) -> None:
    pass


def registering(backend: KubernetesBackend, handle: SandboxHandle, *, lifetime_s: float = 300) -> Prepare:
    """As a worker does it: the create op is taken and the sandbox is ready."""

    async def register(journal: Journal) -> None:
        sandbox_id = handle.sandbox_id
        spec = SandboxSpec(backend="kubernetes", sandbox_id=sandbox_id)
        create = NewSandbox(backend="kubernetes", queue=pool_queue("kubernetes"), spec=spec.to_json(), lifetime_s=lifetime_s)
        term = (await journal.renew(WORKER, 60, {"backend": "kubernetes", "placement": backend.placement})).term
        op_id = f"create-{sandbox_id}"
        await journal.submit(NewOp(op_id=op_id, sandbox_id=sandbox_id, kind="create", create=create, timeout_s=60))
        taken = await journal.take(WORKER, op_id, "nonce", term)
        assert isinstance(taken, Taken)
        queue = placement_queue("kubernetes", backend.placement)
        place = backend.placement
        assert await journal.ready(WORKER, sandbox_id, taken.epoch, handle=handle.to_json(), placement=place, queue=queue)
        assert await journal.finish(WORKER, op_id, taken.epoch, state="done", result={})

    return register


def rounds(
    config: AppConfig,
    prepare: Prepare = nothing,
    *,
    backend: KubernetesBackend | None = None,
    late_s: float = 0.0,
    grace_s: float = 0.0,
    dry_run: bool = False,
    count: int = 1,
) -> list[Reaped]:
    """``late_s``: by how much the reaper's clock is ahead."""

    async def go() -> list[Reaped]:
        journal = make_journal(config)
        try:
            await prepare(journal)
            reaper = Reaper(
                journal=journal, backend=backend or backend_of(config), creation_grace_s=grace_s, clock=lambda: time.time() + late_s
            )
            return [await reaper.reap(dry_run=dry_run) for _ in range(count)]
        finally:
            await journal.redis.aclose()

    return asyncio.run(go())


def ids(backend: KubernetesBackend) -> list[str]:
    return sorted(owned.handle.sandbox_id for owned in backend.list_owned())


class TestWhatGoes:
    def test_what_the_registry_does_not_know_goes_and_what_it_knows_stays(self, config: AppConfig, backend: KubernetesBackend) -> None:
        backend.create(spec_of("unknown"))
        live = backend.create(spec_of("live"))
        dry, wet = rounds(config, registering(backend, live), dry_run=True) + rounds(config)
        assert dry == Reaped(destroyed=("unknown",), dry_run=True)
        assert wet == Reaped(destroyed=("unknown",))
        assert (ids(backend), backend.inspect(live).alive) == (["live"], True)
        assert rounds(config) == [Reaped()]

    def test_what_is_young_may_still_be_in_the_making(self, config: AppConfig, backend: KubernetesBackend) -> None:
        backend.create(spec_of("young"))
        assert rounds(config, grace_s=60) == [Reaped()]
        assert ids(backend) == ["young"]

    def test_what_is_past_its_lifetime_goes_although_it_runs_and_is_registered(self, config: AppConfig, backend: KubernetesBackend) -> None:
        """Whichever of both knows of an extension is right."""
        old, extended = backend.create(spec_of("old", lifetime_s=60)), backend.create(spec_of("extended", lifetime_s=60))
        backend.extend(extended, time.time() + 600)

        async def both(journal: Journal) -> None:
            await registering(backend, old, lifetime_s=60)(journal)
            await registering(backend, extended, lifetime_s=60)(journal)

        assert rounds(config, both, late_s=90) == [Reaped(destroyed=("old",))]
        assert backend.inspect(extended).alive

    def test_what_has_ended_and_no_ttl_has_removed_goes(self, config: AppConfig, backend: KubernetesBackend) -> None:
        """Where the cluster has no TTL controller, or not yet come to it; with the cause for whoever asks."""
        dead = backend.create(spec_of("dead"))
        end_first_process(config, "dead")
        wait_for(lambda: [owned.alive for owned in backend.list_owned()] == [None])  # its Job learns it a moment later
        (reaped,) = rounds(config, registering(backend, dead))
        assert (reaped.closed, reaped.destroyed) == (("dead",), ())
        assert ids(backend) == []

    def test_a_pod_whose_job_went_without_it_goes(self, config: AppConfig, backend: KubernetesBackend) -> None:
        backend.create(spec_of("orphan"))
        delete_job(config, "orphan", propagation="Orphan")
        wait_for(lambda: found(job_path(config, "orphan")) is None)
        assert rounds(config) == [Reaped(destroyed=("orphan",))]
        wait_for(lambda: not listed(pods_path(), names_of(config).selector()))

    def test_an_entry_whose_job_is_gone_is_closed_with_the_cause(self, config: AppConfig, backend: KubernetesBackend) -> None:
        gone = backend.create(spec_of("gone"))

        async def prepare(journal: Journal) -> None:
            await registering(backend, gone)(journal)
            delete_job(config, "gone")
            wait_for(lambda: found(job_path(config, "gone")) is None)

        assert rounds(config, prepare) == [Reaped(closed=("gone",))]

        async def cause() -> str:
            journal = make_journal(config)
            record = await journal.sandbox("gone")
            await journal.redis.aclose()
            return record.cause if record else ""

        assert "deleted" in asyncio.run(cause())

    def test_a_cluster_that_does_not_answer_ends_the_round(self, config: AppConfig, backend: KubernetesBackend, tmp_path: Path) -> None:
        live = backend.create(spec_of("live"))
        away = kubeconfig(tmp_path / "k", "http://127.0.0.1:9", namespace=config.kubernetes_namespace)
        with pytest.raises(BackendUnavailableError):
            rounds(config, registering(backend, live), backend=backend_of(config, kubernetes_kubeconfig=away))
        assert rounds(config) == [Reaped()]
        assert backend.inspect(live).alive


def stranger(name: str, labels: Json, annotations: Json) -> Json:
    """A Job that never runs, which is not ours whatever it looks like."""
    container = {"name": "sandbox", "image": "busybox:1", "command": ["true"]}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    metadata = {"name": name, "labels": labels, "annotations": annotations}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"suspend": True, "template": template}}


def test_what_only_looks_like_ours_is_never_touched(config: AppConfig, backend: KubernetesBackend) -> None:
    """Each lacks one thing; all are past any lifetime."""
    names = names_of(config)
    ours = manifest(
        SandboxSpec(backend="kubernetes", sandbox_id="one", lifetime_s=1),
        names=names,
        placement=backend.placement,
        options=KubernetesOptions(),
        now_s=time.time() - 86_400,
    )["metadata"]
    labels, told = ours["labels"], ours["annotations"]
    other = Names(f"{config.namespace}0")
    kinds = [
        (labels, {}),
        (labels, told | {"cifixer.dev/namespace": other.namespace}),
        ({k: v for k, v in labels.items() if k != SANDBOX}, {k: v for k, v in told.items() if k != "cifixer.dev/sandbox-id"}),
        ({"app": labels["app"]}, told),
        (labels | {"app": "something-else"}, told),
        (labels | {INSTANCE: other.labels("one", "none")[INSTANCE]}, told),
        ({}, told),
    ]
    bystanders = [made(jobs_path(), stranger(f"{config.namespace}-{n}", *kind))["metadata"] for n, kind in enumerate(kinds)]
    direct = backend_of(config, dispatch="direct")
    try:
        handle = direct.create(spec_of("direct"))
        backend.create(spec_of("unknown"))
        assert rounds(config, late_s=86_400, count=2) == [Reaped(destroyed=("unknown",)), Reaped()]
        assert direct.inspect(handle).alive
        for bystander in bystanders:
            now = found(f"{jobs_path()}/{bystander['name']}")
            assert now is not None, bystander
            assert now["metadata"]["uid"] == bystander["uid"]
            assert "deletionTimestamp" not in now["metadata"]
    finally:
        for bystander in bystanders:
            removed(f"{jobs_path()}/{bystander['name']}")


def many_jobs(count: int, namespace: str) -> Callable[[Asked], Reply]:
    """An API server with so many running Jobs of ours, each as big as they are, and with their Pods."""
    placeholder = "z" * 16
    spec = SandboxSpec(backend="kubernetes", sandbox_id=placeholder)
    job = manifest(spec, names=Names(namespace), placement="ns", options=KubernetesOptions(), now_s=time.time())
    job["metadata"] |= {"uid": placeholder, "creationTimestamp": "2026-01-01T00:00:00Z"}
    job["metadata"]["labels"][SANDBOX] = placeholder
    job["status"] = {"active": 1, "startTime": "2026-01-01T00:00:00Z", "uncountedTerminatedPods": {}}
    text = {kind: json.dumps(item) for kind, item in (("jobs", job), ("pods", {"metadata": job["metadata"]}))}

    def answer(asked: Asked) -> Reply:
        at, limit = int(asked.query.get("continue") or 0), int(asked.query["limit"])
        more = {"continue": str(at + limit)} if at + limit < count else {}
        one = text[asked.path.rpartition("/")[2]]
        items = ",".join(one.replace(placeholder, f"{number:016}") for number in range(at, min(count, at + limit)))
        return Reply(text=f'{{"metadata": {json.dumps(more)}, "items": [{items}]}}'.encode())

    return answer


def peak_bytes(tmp_path: Path, count: int) -> int:
    """Of all that is held while so many are listed one by one."""
    with scripted_server(many_jobs(count, "ours")) as server:
        address = Address(kubeconfig=kubeconfig(tmp_path / f"{count}", server.url))
        backend = KubernetesBackend(address=address, namespace="ours")
        next(iter(backend.list_owned()))  # what is made once
        tracemalloc.start()
        try:
            assert sum(1 for owned in backend.list_owned() if owned.alive) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            assert max(int(a.query["limit"]) for a in server.asked) == PAGE_SIZE


def test_ten_thousand_jobs_take_hardly_more_memory_than_two_thousand(tmp_path: Path) -> None:
    few, many = peak_bytes(tmp_path, 2_000), peak_bytes(tmp_path, 10_000)
    assert many < 1.3 * few + 2_000_000, (few, many)
