"""Faults that the stand-in makes when it is ordered to."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import urllib3
from kubernetes.client.exceptions import ApiException

from tests.integration.kubernetes_stand_in.conftest import Exec
from tests.support.kubernetes.exec_client import Done, drained, exec_socket
from tests.support.kubernetes.rest_client import client, watch
from tests.support.kubernetes.samples import job, pod_spec
from tests.support.kubernetes.stand_in import StandIn
from tests.support.kubernetes.starting import NS
from tests.support.kubernetes.waiting import conditions, one_pod, pods_of, until

pytestmark = pytest.mark.parametrize("cluster", ["http", "https"], indirect=True, scope="module")


class TestFaults:
    @pytest.mark.parametrize(("kind", "status"), [("429", 429), ("500", 500), ("503", 503)])
    def test_a_request_is_refused_as_often_as_was_ordered(self, cluster: StandIn, core: Any, kind: str, status: int) -> None:
        cluster.order("fault", kind=kind, verb="list", path="/pods$", times=1, seconds=3)
        with pytest.raises(ApiException) as error:
            core.list_namespaced_pod(NS)
        assert error.value.status == status
        assert (error.value.headers or {}).get("Retry-After") == ("3" if kind == "429" else None)
        core.list_namespaced_pod(NS)

    @pytest.mark.parametrize("kind", ["hang", "reset"])
    def test_a_request_gets_no_answer(self, cluster: StandIn, core: Any, kind: str) -> None:
        cluster.order("fault", kind=kind, verb="list", path="/pods$")
        with pytest.raises(urllib3.exceptions.HTTPError):
            core.list_namespaced_pod(NS, _request_timeout=0.5)
        core.list_namespaced_pod(NS)

    def test_a_lost_reply_is_of_something_that_was_done(self, cluster: StandIn, api: Any) -> None:
        cluster.order("fault", kind="lost_reply", verb="create", path="/jobs$")
        with pytest.raises(urllib3.exceptions.HTTPError):
            client.BatchV1Api(api).create_namespaced_job(NS, job("lost", pod_spec(["true"])))
        with pytest.raises(ApiException) as error:
            client.BatchV1Api(api).create_namespaced_job(NS, job("lost", pod_spec(["true"])))
        assert error.value.status == 409

    def test_a_slow_answer_comes_in_the_end(self, cluster: StandIn, core: Any) -> None:
        cluster.order("fault", kind="slow", verb="list", path="/pods$", seconds=0.4)
        began = time.monotonic()
        core.list_namespaced_pod(NS)
        assert time.monotonic() - began >= 0.4

    def test_a_cut_exec_has_no_status(self, cluster: StandIn, token: str, pod: str, run: Exec) -> None:
        async def cut() -> Done:
            async with exec_socket(cluster, token, (NS, pod), ["sh", "-c", "cat > /workspace/other; sleep 5"]) as socket:
                await socket.receive()
                assert await asyncio.to_thread(cluster.order, "cut_execs", pod=pod) >= 1
                return await drained(socket)

        done = asyncio.run(asyncio.wait_for(cut(), 10))
        assert (done.status, done.close_code) == (None, 1006)
        cluster.order("cut_next_exec", after_frames=1)
        done = run("sh", "-c", "cat > /workspace/got; sleep 5", stdin=b"it was taken")
        assert done.status is None
        until(lambda: bytes(run("cat", "/workspace/got").stdout) == b"it was taken")

    def test_watches_are_dropped(self, cluster: StandIn, core: Any) -> None:
        stream = watch.Watch().stream(core.list_namespaced_pod, NS, timeout_seconds=30)
        next(iter(stream))
        began = time.monotonic()
        cluster.order("drop_watches")
        raw = core.list_namespaced_pod(NS, watch=True, timeout_seconds=30, _preload_content=False)
        cluster.order("drop_watches")
        assert raw.read().count(b"ADDED") >= 1
        assert time.monotonic() - began < 5

    def test_pods_outlive_a_restart_of_the_api_server(self, cluster: StandIn, core: Any, pod: str, run: Exec) -> None:
        before = core.read_namespaced_pod(pod, NS)
        cluster.order("restart", down_s=0.3)
        after = core.read_namespaced_pod(pod, NS)
        assert (after.metadata.uid, after.status.phase) == (before.metadata.uid, "Running")
        assert run("cat", "/proc/1/comm").stdout == b"runner\n"

    def test_a_frozen_server_takes_connections_and_answers_nothing(self, cluster: StandIn, core: Any, token: str, pod: str) -> None:
        async def over_the_ice() -> tuple[bool, bytes]:
            async with exec_socket(cluster, token, (NS, pod), ["cat"]) as socket:
                await socket.receive()
                await asyncio.to_thread(cluster.order, "freeze")
                await socket.send_bytes(b"\x00hello")
                try:
                    await asyncio.wait_for(socket.receive(), 0.5)
                    silent = False
                except TimeoutError:
                    silent = True
                await asyncio.to_thread(cluster.order, "thaw")
                return silent, (await asyncio.wait_for(socket.receive(), 5)).data

        cluster.order("freeze")
        with pytest.raises(urllib3.exceptions.HTTPError):
            core.list_namespaced_pod(NS, _request_timeout=0.5)
        cluster.order("thaw")
        core.list_namespaced_pod(NS)
        assert asyncio.run(over_the_ice()) == (True, b"\x01hello")


class TestControllers:
    def test_finished_jobs_stay_without_their_controller(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        cluster.order("set", ttl_controller=False)
        jobs.create_namespaced_job(ns, job("one", pod_spec(["true"]), ttlSecondsAfterFinished=0))
        until(lambda: "Complete" in conditions(jobs.read_namespaced_job("one", ns)))
        time.sleep(0.5)
        assert len(jobs.list_namespaced_job(ns).items) == 1
        cluster.order("set", ttl_controller=True)
        until(lambda: not jobs.list_namespaced_job(ns).items and not pods_of(core, ns))

    def test_pods_outlive_their_job_without_the_collector(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one"))
        one_pod(core, ns, "Running")
        cluster.order("set", collector=False)
        jobs.delete_namespaced_job("one", ns, body={"propagationPolicy": "Background"})
        time.sleep(0.5)
        (pod,) = pods_of(core, ns)
        assert (pod.metadata.deletion_timestamp, pod.metadata.owner_references[0].name) == (None, "one")
        cluster.order("set", collector=True)
        until(lambda: not pods_of(core, ns))

    def test_jobs_wait_without_their_controller(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        cluster.order("set", job_controller=False)
        jobs.create_namespaced_job(ns, job("one"))
        time.sleep(0.5)
        assert (pods_of(core, ns), jobs.read_namespaced_job("one", ns).status.start_time) == ([], None)
        cluster.order("set", job_controller=True)
        one_pod(core, ns, "Running")

    def test_ten_thousand_jobs_are_made_in_seconds_and_are_no_processes(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        began = time.monotonic()
        cluster.order("forge_jobs", namespace=ns, count=10_000, labels={"app": "x"}, annotations={}, age_s=3600)
        assert time.monotonic() - began < 20
        assert jobs.list_namespaced_job(ns, limit=1).metadata.remaining_item_count == 9_999
        assert pods_of(core, ns) == []
