"""Jobs and Pods on the stand-in: what real controllers and a real kubelet make of them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from tests.support.kubernetes.images import MISSING_IMAGE, NO_SHELL_IMAGE
from tests.support.kubernetes.rest_client import watch
from tests.support.kubernetes.samples import USER, job, pod_spec
from tests.support.kubernetes.stand_in import StandIn
from tests.support.kubernetes.waiting import changed, conditions, logged, one_pod, pods_of, reasons, until

Json = dict[str, Any]


class TestJobs:
    def test_success_completes_it_and_the_time_to_live_removes_it(self, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one", pod_spec(["true"]), ttlSecondsAfterFinished=2))
        done = until(lambda: (j := jobs.read_namespaced_job("one", ns)).status.completion_time and j)
        assert conditions(done) == {"SuccessCriteriaMet": "CompletionsReached", "Complete": "CompletionsReached"}
        assert done.status.succeeded == 1
        until(lambda: not jobs.list_namespaced_job(ns).items and not pods_of(core, ns))

    def test_failure_is_final_without_a_second_pod(self, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one", pod_spec(["sh", "-c", "exit 3"])))
        done = until(lambda: (j := jobs.read_namespaced_job("one", ns)).status.conditions and "Failed" in conditions(j) and j)
        assert conditions(done) == {"FailureTarget": "BackoffLimitExceeded", "Failed": "BackoffLimitExceeded"}
        (pod,) = pods_of(core, ns)
        ended = pod.status.container_statuses[0].state.terminated
        assert (pod.status.phase, ended.exit_code, ended.reason) == ("Failed", 3, "Error")

    def test_a_deadline_ends_it_and_may_be_moved(self, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one", activeDeadlineSeconds=2))
        jobs.create_namespaced_job(ns, job("two", activeDeadlineSeconds=2))
        jobs.patch_namespaced_job("two", ns, {"spec": {"activeDeadlineSeconds": 60}})
        done = until(lambda: (j := jobs.read_namespaced_job("one", ns)).status.conditions and "Failed" in conditions(j) and j)
        assert conditions(done)["Failed"] == "DeadlineExceeded"
        assert [p.metadata.labels["job-name"] for p in pods_of(core, ns)] == ["two"]
        with pytest.raises(ApiException) as refused:
            jobs.patch_namespaced_job("two", ns, {"spec": {"completions": 3}})
        assert refused.value.status == 422

    def test_a_pod_that_fits_nowhere_waits_with_the_schedulers_words_until_the_deadline(self, jobs: Any, core: Any, ns: str) -> None:
        resources = {"requests": {"cpu": "1000"}, "limits": {"cpu": "1000"}}
        jobs.create_namespaced_job(ns, job("one", changed(pod_spec(), resources, "containers", 0, "resources"), activeDeadlineSeconds=1))
        message = until(lambda: reasons(core, ns).get("FailedScheduling"))
        assert message.startswith("0/1 nodes are available: 1 Insufficient cpu. ")
        until(lambda: "Failed" in conditions(jobs.read_namespaced_job("one", ns)))
        until(lambda: not pods_of(core, ns))

    def test_a_node_that_is_not_there_is_named(self, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one", pod_spec(nodeSelector={"disk": "ssd"})))
        message = until(lambda: reasons(core, ns).get("FailedScheduling"))
        assert "1 node(s) didn't match Pod's node affinity/selector" in message
        (pod,) = pods_of(core, ns)
        assert [(c.type, c.status, c.reason) for c in pod.status.conditions] == [("PodScheduled", "False", "Unschedulable")]


class TestKubelet:
    def test_a_container_is_who_and_where_its_spec_says(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        script = "id -u; pwd; stat -c '%g %a' /workspace; touch /x 2>&1; echo $KUBERNETES_SERVICE_HOST $HOSTNAME; cat /run/note; echo; "
        script += "ls /var/run/secrets 2>&1; grep -c : /proc/net/dev; grep -E 'CapBnd|NoNewPrivs' /proc/self/status"
        spec = pod_spec(["sh", "-c", script])
        fields = [{"path": "note", "fieldRef": {"fieldPath": "metadata.annotations['cifixer.dev/note']"}}]
        spec["volumes"].append({"name": "told", "downwardAPI": {"items": fields}})
        spec["containers"][0]["volumeMounts"].append({"name": "told", "mountPath": "/run/note", "subPath": "note"})
        jobs.create_namespaced_job(ns, job("one", spec))
        pod = one_pod(core, ns, "Succeeded")
        lines = logged(core, ns, pod.metadata.name).splitlines()
        assert lines[:2] == [str(USER), "/workspace"]
        assert lines[2] == f"{USER} 2777" or cluster.one_user
        assert "Read-only file system" in lines[3]
        assert lines[4:6] == [f"10.96.0.1 {pod.metadata.name}", "as it is"]
        assert "No such file" in lines[6]
        assert lines[7] == "1"  # only the loopback
        assert [line.split()[1] for line in lines[8:]] == ["0000000000000000", "1"]

    def test_a_volume_in_memory_is_as_large_as_it_says_and_one_for_all_its_mounts(self, jobs: Any, core: Any, ns: str) -> None:
        script = "head -c 20000000 /dev/zero > /tmp/a && head -c 20000000 /dev/zero > /workspace/b; ls /tmp"
        jobs.create_namespaced_job(ns, job("one", pod_spec(["sh", "-c", script])))
        pod = one_pod(core, ns, "Succeeded")
        assert "No space left on device" in logged(core, ns, pod.metadata.name)
        assert logged(core, ns, pod.metadata.name).splitlines()[-1] == "a"

    def test_a_claim_outlives_its_pods(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        cluster.order("add_claim", namespace=ns, name="work")
        volumes = [{"name": "disk", "persistentVolumeClaim": {"claimName": "work"}}]
        jobs.create_namespaced_job(ns, job("one", pod_spec(["sh", "-c", "echo kept > /workspace/file"], volumes=volumes)))
        one_pod(core, ns, "Succeeded")
        jobs.delete_namespaced_job("one", ns, propagation_policy="Background")
        until(lambda: not pods_of(core, ns))
        jobs.create_namespaced_job(ns, job("two", pod_spec(["cat", "/workspace/file"], volumes=volumes)))
        assert logged(core, ns, one_pod(core, ns, "Succeeded").metadata.name) == "kept\n"

    @pytest.mark.parametrize(
        ("image", "reason"), [(MISSING_IMAGE, "ErrImagePull"), (MISSING_IMAGE, "ImagePullBackOff"), ("Not:an:image", "InvalidImageName")]
    )
    def test_an_image_that_cannot_be_had_is_a_reason_to_wait(self, jobs: Any, core: Any, ns: str, image: str, reason: str) -> None:
        jobs.create_namespaced_job(ns, job("one", changed(pod_spec(), image, "containers", 0, "image")))

        def waiting() -> str:
            statuses = [s for p in pods_of(core, ns) for s in p.status.container_statuses or []]
            return next((s.state.waiting.reason for s in statuses if s.state.waiting), "")

        until(lambda: waiting() == reason)
        assert [p.status.phase for p in pods_of(core, ns)] == ["Pending"]

    def test_a_program_that_is_not_in_the_image_is_a_start_error(self, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one", changed(pod_spec(["sh"]), NO_SHELL_IMAGE, "containers", 0, "image")))
        ended = one_pod(core, ns, "Failed").status.container_statuses[0].state.terminated
        assert (ended.reason, ended.exit_code) == ("StartError", 128)
        assert 'exec: "sh": executable file not found in $PATH' in ended.message

    def test_a_container_without_a_user_of_its_own_is_not_made(self, jobs: Any, core: Any, ns: str) -> None:
        spec = changed(pod_spec(), None, "securityContext", "runAsUser")
        jobs.create_namespaced_job(ns, job("one", spec))

        def waiting() -> Any:
            statuses = [s for p in pods_of(core, ns) for s in p.status.container_statuses or []]
            return next((s.state.waiting for s in statuses if s.state.waiting and s.state.waiting.message), None)

        found = until(waiting)
        assert found.reason == "CreateContainerConfigError"
        assert found.message.startswith("container has runAsNonRoot and image will run as root")

    def test_a_volume_on_the_nodes_disk_is_limited_by_eviction(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        cluster.order("set", eviction_s=0.2)
        spec = pod_spec(["sh", "-c", "head -c 3000000 /dev/zero > /workspace/a; sleep 60"])
        spec["volumes"] = [{"name": "disk", "emptyDir": {"sizeLimit": "1Mi"}}]
        jobs.create_namespaced_job(ns, job("one", spec))
        pod = one_pod(core, ns, "Failed")
        words = 'Usage of EmptyDir volume "disk" exceeds the limit "1Mi". '
        assert (pod.status.reason, pod.status.message) == ("Evicted", words)

    def test_processes_are_limited_where_the_node_says_so(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        if not cluster.limited:
            pytest.skip("control groups cannot be made here")
        cluster.order("set", pids_limit=10)
        jobs.create_namespaced_job(ns, job("one", pod_spec(["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1 & done; wait"])))
        pod = one_pod(core, ns, "Failed")
        cluster.order("set", pids_limit=0)
        assert "Cannot fork" in logged(core, ns, pod.metadata.name)

    def test_memory_over_the_limit_is_an_end_by_the_kernel(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        if not cluster.limited:
            pytest.skip("control groups cannot be made here")
        jobs.create_namespaced_job(ns, job("one", pod_spec(["python3", "-c", "x = b'x' * (400 << 20)"])))
        ended = one_pod(core, ns, "Failed").status.container_statuses[0].state.terminated
        assert (ended.reason, ended.exit_code) == ("OOMKilled", 137)

    def test_memory_over_the_limit_may_end_all_of_the_container(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        """As on cgroup version 2, where the kubelet asks the kernel for it."""
        if not cluster.limited:
            pytest.skip("control groups cannot be made here")
        cluster.order("set", whole_container=True)
        script = "python3 -c 'x = b\"x\" * (400 << 20)'; sleep 60"
        jobs.create_namespaced_job(ns, job("one", pod_spec(["sh", "-c", script])))
        ended = one_pod(core, ns, "Failed").status.container_statuses[0].state.terminated
        assert (ended.reason, ended.exit_code) == ("OOMKilled", 137)
        cluster.order("set", whole_container=False)

    def test_an_evicted_pod_says_so_and_stays(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one"))
        name = one_pod(core, ns, "Running").metadata.name
        cluster.order("evict", namespace=ns, pod=name)
        pod = one_pod(core, ns, "Failed")
        assert pod.status.reason == "Evicted"
        assert pod.status.message.startswith("The node was low on resource: memory.")
        assert conditions(pod)["DisruptionTarget"] == "TerminationByKubelet"
        until(lambda: "Failed" in conditions(jobs.read_namespaced_job("one", ns)))

    def test_a_preempted_pod_is_deleted_with_the_reason_in_its_last_state(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one"))
        pod = one_pod(core, ns, "Running")
        stream = watch.Watch().stream(core.list_namespaced_pod, ns, resource_version=pod.metadata.resource_version, timeout_seconds=10)
        cluster.order("preempt", namespace=ns, pod=pod.metadata.name)
        last = next(event["object"] for event in stream if event["type"] == "DELETED")
        assert conditions(last)["DisruptionTarget"] == "PreemptionByScheduler"

    def test_a_pod_on_a_lost_node_stays_terminating(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one"))
        name = one_pod(core, ns, "Running").metadata.name
        cluster.order("lose_node", namespace=ns, pod=name)
        time.sleep(2.5)
        pod = core.read_namespaced_pod(name, ns)
        assert pod.metadata.deletion_timestamp is not None
        assert (pod.status.phase, conditions(pod)["DisruptionTarget"]) == ("Running", "DeletionByTaintManager")
        cluster.order("collect_lost", namespace=ns, pod=name)
        until(lambda: not pods_of(core, ns))
