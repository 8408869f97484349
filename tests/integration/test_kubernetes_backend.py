"""The Kubernetes backend beyond the contract: whose Jobs, how they fail to start, and how they die."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cifixer_exec import AppConfig, create_sandbox
from cifixer_exec.backends.kubernetes import KubernetesBackend
from cifixer_exec.backends.kubernetes.jobs import Jobs
from cifixer_exec.errors import (
    BackendUnavailableError,
    CapacityError,
    ExecutorError,
    InvalidRequestError,
    SandboxLostError,
    SandboxStartError,
)
from cifixer_exec.model import MIB, Inspection, SandboxHandle
from tests.support.kubernetes_admin import (
    admin,
    admin_kubeconfig,
    backend_of,
    found,
    job_path,
    jobs_path,
    left_of,
    listed,
    made,
    namespace_of_its_own,
    pods_path,
    removed,
    sandboxes_of,
    set_quota,
    spec_of,
    wait_for,
)
from tests.support.kubernetes_cluster import is_real, stand_in
from tests.support.kubernetes_pods import delete_job, delete_pod, end_first_process, names_of, pod_of

Json = dict[str, Any]


@pytest.fixture
def config(namespace: str) -> Iterator[AppConfig]:
    with sandboxes_of(namespace) as made_here:
        yield made_here


@pytest.fixture
def backend(config: AppConfig) -> KubernetesBackend:
    return backend_of(config)


def job_of(config: AppConfig, sandbox_id: str = "one") -> Json:
    job = found(job_path(config, sandbox_id))
    assert job is not None
    return job


def death_of(backend: KubernetesBackend, handle: SandboxHandle) -> Inspection:
    wait_for(lambda: not backend.inspect(handle).alive)
    return backend.inspect(handle)


def ids(backend: KubernetesBackend) -> list[str]:
    return sorted(owned.handle.sandbox_id for owned in backend.list_owned())


class TestWhoseItIs:
    def test_a_second_create_adopts_the_same_job_and_pod(self, config: AppConfig, backend: KubernetesBackend) -> None:
        first = backend.create(spec_of())
        again = backend_of(config).create(spec_of())
        assert again == first
        assert len(listed(pods_path(), names_of(config).selector("one"))) == 1

    def test_a_dead_one_of_the_same_id_is_made_anew_at_once(self, config: AppConfig, backend: KubernetesBackend) -> None:
        """The Job does not know yet that its Pod has ended."""
        handle = backend.create(spec_of())
        end_first_process(config, "one")
        death_of(backend, handle)
        again = backend.create(spec_of())
        assert again.data["job_uid"] != handle.data["job_uid"]
        assert backend.inspect(again).alive
        assert not backend.inspect(handle).alive

    def test_one_that_is_being_deleted_gives_way(self, config: AppConfig, backend: KubernetesBackend) -> None:
        handle = backend.create(spec_of())
        delete_job(config, "one", propagation="Foreground")
        again = backend.create(spec_of())
        assert again.data["job_uid"] != handle.data["job_uid"]
        assert backend.inspect(again).alive

    def test_a_job_of_somebody_else_with_its_name_is_refused_and_never_touched(self, config: AppConfig, backend: KubernetesBackend) -> None:
        foreign = stranger(names_of(config).job("taken"))
        handle = SandboxHandle(backend="kubernetes", sandbox_id="taken", placement=backend.placement)
        try:
            with pytest.raises(SandboxStartError, match="is there and not one of ours: delete or rename it"):
                backend.create(spec_of("taken"))
            backend.destroy(handle)
            assert not backend.inspect(handle).alive
            with pytest.raises(SandboxLostError):
                backend.extend(handle, time.time() + 100)
            assert ids(backend) == []
            assert uid_at(names_of(config).job("taken")) == foreign
        finally:
            removed(f"{jobs_path()}/{names_of(config).job('taken')}")

    def test_a_sandbox_that_was_made_anew_is_not_ended_by_the_handle_of_the_former_one(self, backend: KubernetesBackend) -> None:
        former = backend.create(spec_of())
        backend.destroy(former)
        again = backend.create(spec_of())
        backend.destroy(former)
        assert backend.inspect(again).alive

    def test_one_that_is_made_anew_within_a_destroy_stays(self, backend: KubernetesBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever destroys may stand still for as long as it likes between the Job and its Pods."""
        former, delete = backend.create(spec_of()), Jobs._delete
        made: list[SandboxHandle] = []

        def deleting(self: Jobs, path: str, found: Json, **options: Any) -> None:
            delete(self, path, found, **options)
            monkeypatch.setattr(Jobs, "_delete", delete)
            made.append(backend.create(spec_of()))

        monkeypatch.setattr(Jobs, "_delete", deleting)
        backend.destroy(former)
        (again,) = made
        assert backend.inspect(again).alive
        assert not backend.inspect(former).alive

    def test_what_is_torn_down_while_it_starts_is_not_made_again(self, config: AppConfig, backend: KubernetesBackend) -> None:
        """Neither by who made it, nor by who has adopted it and waits as well."""
        nowhere = backend_of(config, kubernetes_cpu_request=10_000.0)
        with ThreadPoolExecutor(2) as threads:
            starts = [threads.submit(nowhere.create, spec_of(cpus=10_000.0)) for _ in range(2)]
            wait_for(lambda: found(job_path(config, "one")) is not None)
            time.sleep(1.5)  # both are waiting
            backend.destroy(SandboxHandle(backend="kubernetes", sandbox_id="one", placement=backend.placement))
            for start in starts:
                with pytest.raises(SandboxStartError, match="deleted"):
                    start.result(timeout=30)
        assert ids(backend) == []

    def test_a_pod_goes_by_force_where_no_grace_is_wanted(self, config: AppConfig) -> None:
        with create_sandbox(config.with_(kubernetes_grace_s=0), sandbox_id="one") as sandbox:
            assert sandbox.run_command("echo on").text == "on\n"
            assert job_of(config)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 0
        assert listed(pods_path(), names_of(config).selector("one")) == []

    def test_a_namesake_that_comes_between_the_look_and_the_deletion_stays(
        self, config: AppConfig, backend: KubernetesBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handle, name = backend.create(spec_of()), names_of(config).job("one")
        seen = job_of(config)
        backend.destroy(handle)
        wait_for(lambda: found(f"{jobs_path()}/{name}") is None)
        foreign = stranger(name)
        try:
            monkeypatch.setattr(Jobs, "find", lambda self, sandbox_id: seen)
            backend.destroy(handle)
            assert uid_at(name) == foreign
        finally:
            removed(f"{jobs_path()}/{name}")

    def test_another_namespace_of_ours_sees_nothing_of_it(self, config: AppConfig, backend: KubernetesBackend) -> None:
        handle = backend.create(spec_of())
        other = backend_of(config, namespace="another")
        assert ids(other) == []
        assert other.token(handle) == backend.token(handle)
        other.destroy(handle)
        assert not other.inspect(SandboxHandle(backend="kubernetes", sandbox_id="one", placement=other.placement)).alive
        assert backend.inspect(handle).alive

    def test_a_handle_works_in_any_form_and_from_a_listing(self, config: AppConfig, backend: KubernetesBackend) -> None:
        handle = backend.create(spec_of())
        (owned,) = backend.list_owned()
        for form in (SandboxHandle.from_json(json.loads(json.dumps(handle.to_json()))), owned.handle):
            assert backend.inspect(form).alive
            assert backend.token(form) == backend.token(handle)
            asyncio.run(opened_and_closed(backend, form))
        assert owned.alive
        assert owned.created_at_s == pytest.approx(time.time(), abs=30)
        assert owned.expires_at_s - owned.created_at_s == pytest.approx(3600, abs=0.01)

    def test_nothing_of_the_environment_is_in_the_job_or_its_pod(self, config: AppConfig, backend: KubernetesBackend) -> None:
        handle = backend.create(spec_of(env={"TOKEN_OF_MINE": "secret-57ad"}))
        for shown in (json.dumps(job_of(config)), json.dumps(pod_of(config, "one"))):
            assert "secret-57ad" not in shown
            assert "TOKEN_OF_MINE" not in shown
            assert backend.token(handle) not in shown


def stranger(name: str) -> str:
    """A Job that is not ours and never runs; its uid."""
    container = {"name": "sandbox", "image": "busybox:1", "command": ["true"]}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"suspend": True, "template": template}}
    return str(made(jobs_path(), document)["metadata"]["uid"])


def uid_at(name: str) -> str:
    job = found(f"{jobs_path()}/{name}")
    return "" if job is None else str(job["metadata"]["uid"])


async def opened_and_closed(backend: KubernetesBackend, handle: SandboxHandle) -> None:
    (await backend.dial(handle)()).close()


#: What is asked for: settings, members of the spec, the error, its words, how long it may take.
FAILURES: dict[str, tuple[Json, Json, type[ExecutorError], str, float]] = {
    "an image that is nowhere": (
        {},
        {"image": "registry.invalid/no/such:image"},
        SandboxStartError,
        "(ErrImagePull|ImagePullBackOff): .*imagePullSecrets",
        20,
    ),
    "an image name that is none": ({}, {"image": "UPPER/Case"}, SandboxStartError, "InvalidImageName: .*correct the name of the image", 6),
    "more cpus than any node has": (
        {"kubernetes_cpu_request": 900.0, "start_timeout_s": 3.0},
        {"cpus": 900},
        CapacityError,
        "does not run in time: Unschedulable: .*Insufficient cpu.*CIFIXER_KUBERNETES_CPU_REQUEST",
        8,
    ),
    "a service account that is not there": (
        {"kubernetes_service_account": "no-such-account"},
        {},
        SandboxStartError,
        "does not let its Pod be: .*no-such-account",
        6,
    ),
    "a claim that is not there": (
        {"kubernetes_volume_claim": "no-such-claim", "start_timeout_s": 3.0},
        {},
        CapacityError,
        'persistentvolumeclaim "no-such-claim" not found',
        8,
    ),
    "a priority class that is not there": (
        {"kubernetes_priority_class": "no-such-class"},
        {},
        SandboxStartError,
        "no PriorityClass with name no-such-class was found",
        6,
    ),
    "a namespace that is not there": (
        {"kubernetes_namespace": "no-such-namespace"},
        {},
        BackendUnavailableError,
        'namespaces? .*"?no-such-namespace"?.*(create it|grant it)',
        5,
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_start_that_fails_says_why_soon_and_leaves_nothing(config: AppConfig, what: str) -> None:
    settings, members, kind, said, soon_s = FAILURES[what]
    begun = time.monotonic()
    with pytest.raises(kind, match=said):
        backend_of(config, **settings).create(spec_of(**members))
    assert time.monotonic() - begun < soon_s
    wait_for(lambda: not left_of(config))


@pytest.fixture
def alone(config: AppConfig) -> Iterator[AppConfig]:
    """With a namespace of the cluster for this test alone."""
    with namespace_of_its_own() as place:
        yield config.with_(kubernetes_namespace=place, kubernetes_kubeconfig=admin_kubeconfig())


class TestNamespacesWithRules:
    @pytest.mark.parametrize("hard", [{"pods": "0"}, {"count/jobs.batch": "0"}, {"limits.memory": "1Gi"}], ids=["pods", "jobs", "memory"])
    def test_a_quota_is_want_of_room_in_its_own_words(self, alone: AppConfig, hard: dict[str, str]) -> None:
        set_quota(alone.kubernetes_namespace, hard)
        begun = time.monotonic()
        with pytest.raises(CapacityError, match=f"exceeded quota: sandboxes.*{next(iter(hard))}"):
            backend_of(alone).create(spec_of())
        assert time.monotonic() - begun < 6
        wait_for(lambda: not left_of(alone))

    def test_pod_security_is_quoted(self, alone: AppConfig, tmp_path: Path) -> None:
        (tmp_path / "template").write_text("spec: {hostNetwork: true}")
        with pytest.raises(SandboxStartError, match='violates PodSecurity "restricted:latest": host namespaces'):
            backend_of(alone, kubernetes_pod_template=str(tmp_path / "template")).create(spec_of())
        wait_for(lambda: not left_of(alone))

    def test_a_limit_range_is_quoted(self, alone: AppConfig) -> None:
        limits = [{"type": "Container", "max": {"cpu": "500m"}}]
        made(f"/api/v1/namespaces/{alone.kubernetes_namespace}/limitranges", {"metadata": {"name": "l"}, "spec": {"limits": limits}})
        with pytest.raises(SandboxStartError, match="maximum cpu usage per Container is 500m, but limit is 1"):
            backend_of(alone).create(spec_of())
        wait_for(lambda: not left_of(alone))

    def test_a_namespace_without_rules_does_as_well(self, config: AppConfig) -> None:
        with (
            namespace_of_its_own({}) as place,
            create_sandbox(config, kubernetes_namespace=place, kubernetes_kubeconfig=admin_kubeconfig()) as sandbox,
        ):
            assert sandbox.run_command("echo here").text == "here\n"


class TestLifetimes:
    def test_a_job_whose_deadline_was_moved_outlives_the_old_one(self, config: AppConfig) -> None:
        with create_sandbox(config, sandbox_id="one", lifetime_s=5.0) as sandbox:
            begun = time.monotonic()
            sandbox.extend(60)
            assert job_of(config)["spec"]["activeDeadlineSeconds"] > 50
            (owned,) = backend_of(config).list_owned()
            assert owned.expires_at_s == pytest.approx(time.time() + 60, abs=5)
            time.sleep(max(0.0, begun + 7.5 - time.monotonic()))
            assert sandbox.run_command("echo alive").text == "alive\n"

    def test_its_end_is_told(self, backend: KubernetesBackend) -> None:
        assert death_of(backend, backend.create(spec_of(lifetime_s=2))).cause == "its lifetime ended"

    def test_the_end_of_the_jobs_own_deadline_is_told(self, config: AppConfig, backend: KubernetesBackend) -> None:
        """As when the runner is gone, or was made not to heed its own."""
        handle = backend.create(spec_of())
        admin().patch(f"{jobs_path()}/{names_of(config).job('one')}", "shortening", {"spec": {"activeDeadlineSeconds": 1}})
        assert death_of(backend, handle).cause == "its lifetime ended"
        with pytest.raises(SandboxLostError):
            backend.extend(handle, time.time() + 100)


def evict(config: AppConfig) -> None:
    name = pod_of(config, "one")["metadata"]["name"]
    if is_real():
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
        made(f"{pods_path()}/{name}/eviction", eviction)
    else:
        stand_in().order("evict", namespace=config.kubernetes_namespace, pod=name)


#: How; the cause at once; and later, when the Pod is gone with what it told.
DEATHS: dict[str, tuple[Callable[[AppConfig], object], str, str]] = {
    "its Job is deleted": (lambda config: delete_job(config, "one"), "its Job was deleted", "its Job was deleted"),
    "its Pod is deleted": (lambda config: delete_pod(config, "one", grace_s=1), "its Pod (was|is being) deleted", "its Pod was deleted"),
    "with force": (lambda config: delete_pod(config, "one"), "its Pod (was|is being) deleted", "its Pod was deleted"),
    "its first process ends": (lambda config: end_first_process(config, "one"), "killed from outside", "killed from outside"),
    "it is evicted": (evict, "its Pod was evicted", "its Pod was (evicted|deleted)"),
}


@pytest.mark.parametrize("how", DEATHS)
def test_the_cause_of_death_is_told_at_once_and_later(config: AppConfig, backend: KubernetesBackend, how: str) -> None:
    die, at_once, later = DEATHS[how]
    handle = backend.create(spec_of())
    die(config)
    assert re.search(at_once, death_of(backend, handle).cause)
    wait_for(lambda: not any(pod["status"].get("phase") == "Running" for pod in listed(pods_path(), names_of(config).selector())))
    wait_for(lambda: (found(job_path(config)) or {"status": {"failed": 1}})["status"].get("failed"))  # the Job has learnt it
    assert re.search(later, backend.inspect(handle).cause)


@pytest.mark.parametrize("how", ["preempt", "lose_node"])
def test_what_happens_on_big_clusters_is_told_too(config: AppConfig, backend: KubernetesBackend, how: str) -> None:
    if is_real():
        pytest.skip("only the stand-in can be told to do it: unset CIFIXER_TEST_KUBECONFIG")
    handle = backend.create(spec_of())
    pod = pod_of(config, "one")["metadata"]["name"]
    stand_in().order(how, namespace=config.kubernetes_namespace, pod=pod)
    cause = {"preempt": "preempted by one of a higher priority", "lose_node": "its node"}[how]
    assert cause in death_of(backend, handle).cause
    if how == "lose_node":
        stand_in().order("collect_lost", namespace=config.kubernetes_namespace, pod=pod)


def test_a_sandbox_that_is_out_of_memory_says_so(config: AppConfig, backend: KubernetesBackend) -> None:
    if not is_real() and not stand_in().limited:
        pytest.skip("memory cannot be limited here: run as root, or with delegated control groups")
    with create_sandbox(config, sandbox_id="one", memory_bytes=64 * MIB) as sandbox:
        handle = next(iter(backend.list_owned())).handle
        for _ in range(20):
            with suppress(ExecutorError):  # first commands are killed; when files have all the memory, what the runner needs is too much
                sandbox.run_command("head -c 200M /dev/zero >> /dev/shm/x", timeout_s=3)
                sandbox.write_file("file", bytes(4 * MIB))
            if not backend.inspect(handle).alive:
                break
        assert "out of memory" in death_of(backend, handle).cause


def test_a_pod_whose_job_went_without_it_is_listed_lives_and_can_be_destroyed(config: AppConfig, backend: KubernetesBackend) -> None:
    handle = backend.create(spec_of())
    delete_job(config, "one", propagation="Orphan")
    wait_for(lambda: found(f"{jobs_path()}/{names_of(config).job('one')}") is None)
    (owned,) = backend.list_owned()
    assert (owned.handle.sandbox_id, owned.alive) == ("one", None)
    assert backend.inspect(owned.handle).alive
    backend.destroy(owned.handle)
    wait_for(lambda: not left_of(config))
    assert not backend.inspect(handle).alive


def test_destroying_what_is_gone_is_no_error(backend: KubernetesBackend) -> None:
    handle = backend.create(spec_of())
    for _ in range(3):
        backend.destroy(handle)


def test_without_policies_a_network_that_is_not_there_is_refused(backend: KubernetesBackend) -> None:
    with pytest.raises(InvalidRequestError, match=r"network='none' is not possible.*take one of cluster"):
        backend.create(spec_of(network="none"))
