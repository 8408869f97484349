"""Requests to the stand-in: what a real API server answers, seen by an unmodified client."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from tests.support.kubernetes.rest_client import client, rest_client, watch
from tests.support.kubernetes.samples import job, pod_spec
from tests.support.kubernetes.stand_in import StandIn
from tests.support.kubernetes.waiting import changed, one_pod, pods_of, reasons, status_of, until

Json = dict[str, Any]
ROLE: list[Json] = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "watch", "delete", "patch"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "watch"]},
    {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["get"]},
]


def request(cluster: StandIn, path: str, body: Json | None = None, **headers: str) -> tuple[str, Json]:
    """The warnings and the body of an answer, without a client's opinion of it."""
    headers |= {"Authorization": f"Bearer {cluster.token(cluster.admin())}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(cluster.url + path, data, headers), timeout=10) as answer:
        return answer.headers.get("Warning", ""), json.loads(answer.read())


class TestAccess:
    def test_a_token_that_is_not_known_is_401(self, cluster: StandIn, ns: str) -> None:
        kubeconfig = cluster.user("somebody", ROLE, namespace=ns)
        with rest_client(kubeconfig) as old:
            client.BatchV1Api(old).list_namespaced_job(ns)
            renewed = cluster.renew("somebody", namespace=ns)
            with pytest.raises(ApiException) as refused:
                client.BatchV1Api(old).list_namespaced_job(ns)
        assert (refused.value.status, status_of(refused)["message"]) == (401, "Unauthorized")
        with rest_client(renewed) as new:
            client.BatchV1Api(new).list_namespaced_job(ns)

    def test_what_a_role_does_not_give_is_403_in_the_real_words(self, cluster: StandIn, ns: str) -> None:
        with rest_client(cluster.user("worker", ROLE, namespace=ns)) as limited:
            with pytest.raises(ApiException) as refused:
                client.CoreV1Api(limited).list_namespaced_pod(ns)
            with pytest.raises(ApiException) as elsewhere:
                client.BatchV1Api(limited).list_namespaced_job("default")
            with pytest.raises(ApiException) as log:
                client.CoreV1Api(limited).read_namespaced_pod_log("p", ns)
        words = f'pods is forbidden: User "worker" cannot list resource "pods" in API group "" in the namespace "{ns}"'
        assert (refused.value.status, status_of(refused)["message"], status_of(refused)["reason"]) == (403, words, "Forbidden")
        assert status_of(elsewhere)["message"].endswith('cannot list resource "jobs" in API group "batch" in the namespace "default"')
        assert status_of(log)["message"].startswith('pods "p" is forbidden: User "worker" cannot get resource "pods/log"')

    def test_an_access_review_says_what_the_rules_say(self, cluster: StandIn, ns: str) -> None:
        def allowed(**attributes: str) -> bool:
            review = {"spec": {"resourceAttributes": {"namespace": ns, **attributes}}}
            return bool(client.AuthorizationV1Api(limited).create_self_subject_access_review(review).status.allowed)

        with rest_client(cluster.user("worker", ROLE, namespace=ns)) as limited:
            assert allowed(verb="get", resource="pods", subresource="exec")
            assert not allowed(verb="create", resource="pods", subresource="exec")
            assert allowed(verb="create", resource="jobs", group="batch")
            assert not allowed(verb="create", resource="jobs", group="batch", namespace="other")

    def test_what_is_not_here_is_404_and_counted(self, cluster: StandIn, core: Any, ns: str) -> None:
        with pytest.raises(ApiException) as refused:
            core.list_namespaced_secret(ns)
        assert (refused.value.status, status_of(refused)["message"]) == (404, "the server could not find the requested resource")
        assert f"GET /api/v1/namespaces/{ns}/secrets" in cluster.order("asked")["unknown"]


NOT_RESTRICTED = (
    'violates PodSecurity "restricted:latest": runAsNonRoot != true (pod or container "sandbox" must set '
    'securityContext.runAsNonRoot=true), seccompProfile (pod or container "sandbox" must set '
    'securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost")'
)
_POD = ("spec", "template", "spec")
_CONTAINER = (*_POD, "containers", 0)


class TestCreate:
    def test_the_same_name_again_is_409(self, jobs: Any, ns: str) -> None:
        made = jobs.create_namespaced_job(ns, job("one"))
        assert made.metadata.uid
        assert made.spec.selector.match_labels == {"batch.kubernetes.io/controller-uid": made.metadata.uid}
        with pytest.raises(ApiException) as refused:
            jobs.create_namespaced_job(ns, job("one"))
        assert (refused.value.status, status_of(refused)["reason"]) == (409, "AlreadyExists")
        assert status_of(refused)["message"] == 'jobs.batch "one" already exists'

    @pytest.mark.parametrize(
        ("wrong", "field"),
        [
            (changed(job("x"), "n" * 64, "metadata", "name"), "spec.template.labels"),
            (changed(job("x"), "Ä", "metadata", "labels", "app"), "metadata.labels"),
            (changed(job("x"), "Always", *_POD, "restartPolicy"), "spec.template.spec.restartPolicy"),
            (changed(job("x"), {"cpu": "2"}, *_CONTAINER, "resources", "requests"), "spec.template.spec.containers[0].resources.requests"),
            (changed(job("x"), None, *_POD, "volumes"), "spec.template.spec.containers[0].volumeMounts[0].name"),
            (changed(job("x"), -1, "spec", "activeDeadlineSeconds"), "spec.activeDeadlineSeconds"),
            (
                changed(job("x"), "../up", *_CONTAINER, "volumeMounts", 0, "subPath"),
                "spec.template.spec.containers[0].volumeMounts[0].subPath",
            ),
            (changed(job("x"), 2**31, *_POD, "securityContext", "runAsUser"), "spec.template.spec.securityContext.runAsUser"),
        ],
    )
    def test_what_a_real_server_refuses_is_422_with_its_field(self, jobs: Any, ns: str, wrong: Json, field: str) -> None:
        with pytest.raises(ApiException) as refused:
            jobs.create_namespaced_job(ns, wrong)
        assert (refused.value.status, status_of(refused)["reason"]) == (422, "Invalid")
        assert field in [cause["field"] for cause in status_of(refused)["details"]["causes"]]

    def test_unknown_fields_are_dropped_unless_they_must_be_known(self, cluster: StandIn, jobs: Any, ns: str) -> None:
        odd = changed(job("odd"), "x", *_POD, "colour")
        warnings, made = request(cluster, f"/apis/batch/v1/namespaces/{ns}/jobs", odd)
        assert 'unknown field "spec.template.spec.colour"' in warnings
        assert "colour" not in made["spec"]["template"]["spec"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            request(cluster, f"/apis/batch/v1/namespaces/{ns}/jobs?fieldValidation=Strict", odd)
        with refused.value:
            assert refused.value.code == 400

    def test_a_namespace_that_is_not_there_holds_nothing_and_takes_nothing(self, jobs: Any) -> None:
        assert jobs.list_namespaced_job("nowhere").items == []
        with pytest.raises(ApiException) as refused:
            jobs.create_namespaced_job("nowhere", job("one"))
        assert status_of(refused)["message"] == 'namespaces "nowhere" not found'

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            (
                pod_spec(securityContext={}),
                NOT_RESTRICTED,
            ),
            (pod_spec(volumes=[{"name": "disk", "hostPath": {"path": "/"}}]), 'restricted volume types (volume "disk" uses'),
            (pod_spec(serviceAccountName="nobody"), 'serviceaccount "nobody" not found'),
        ],
    )
    def test_a_pod_that_admission_refuses_is_an_event_on_its_job(self, jobs: Any, core: Any, ns: str, spec: Json, words: str) -> None:
        jobs.create_namespaced_job(ns, job("one", spec))
        message = until(lambda: reasons(core, ns).get("FailedCreate"))
        assert message.startswith('Error creating: pods "one-')
        assert words in message
        assert pods_of(core, ns) == []

    def test_a_quota_refuses_pods_and_jobs_in_the_real_words(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        cluster.order("set_quota", namespace=ns, hard={"pods": "1", "count/jobs.batch": "2"})
        jobs.create_namespaced_job(ns, job("one"))
        one_pod(core, ns, "Running")
        jobs.create_namespaced_job(ns, job("two"))
        words = "exceeded quota: sandboxes, requested: pods=1, used: pods=1, limited: pods=1"
        assert words in until(lambda: reasons(core, ns).get("FailedCreate"))
        with pytest.raises(ApiException) as refused:
            jobs.create_namespaced_job(ns, job("three"))
        words = "exceeded quota: sandboxes, requested: count/jobs.batch=1, used: count/jobs.batch=2, limited: count/jobs.batch=2"
        assert status_of(refused)["message"] == f'jobs.batch "three" is forbidden: {words}'

    def test_a_limit_range_completes_and_refuses(self, cluster: StandIn, jobs: Any, core: Any, ns: str) -> None:
        limits = [{"type": "Container", "max": {"cpu": "1"}, "default": {"memory": "128Mi"}, "defaultRequest": {"cpu": "50m"}}]
        item = {"metadata": {"name": "limits"}, "spec": {"limits": limits}}
        cluster.order("create", group="", version="v1", resource="limitranges", namespace=ns, item=item)
        jobs.create_namespaced_job(ns, job("one", changed(pod_spec(), None, "containers", 0, "resources")))
        pod = one_pod(core, ns, "Running")
        given = pod.spec.containers[0].resources
        assert (given.limits, given.requests) == ({"cpu": "1", "memory": "128Mi"}, {"cpu": "50m", "memory": "128Mi"})
        jobs.create_namespaced_job(ns, job("two", changed(pod_spec(), {"limits": {"cpu": "2"}}, "containers", 0, "resources")))
        message = until(lambda: reasons(core, ns).get("FailedCreate"))
        assert message.endswith("is forbidden: maximum cpu usage per Container is 1, but limit is 2")


class TestLists:
    def test_pages_are_of_one_snapshot_and_end_with_the_history(self, cluster: StandIn, jobs: Any, ns: str) -> None:
        cluster.order("forge_jobs", namespace=ns, count=25, labels={"n": "yes"}, annotations={}, age_s=60)
        first = jobs.list_namespaced_job(ns, limit=10)
        assert (len(first.items), first.metadata.remaining_item_count) == (10, 15)
        cluster.order("delete", resource="jobs", namespace=ns, name="forged-00015", options={"propagationPolicy": "Background"})
        second = jobs.list_namespaced_job(ns, limit=10, _continue=first.metadata._continue)
        assert "forged-00015" in [item.metadata.name for item in second.items]
        assert jobs.list_namespaced_job(ns, label_selector="n=yes", limit=10).metadata.remaining_item_count is None
        cluster.order("compact")
        with pytest.raises(ApiException) as gone:
            jobs.list_namespaced_job(ns, limit=10, _continue=second.metadata._continue)
        assert (gone.value.status, status_of(gone)["reason"]) == (410, "Expired")

    def test_only_metadata_comes_when_only_that_is_wanted(self, cluster: StandIn, ns: str) -> None:
        cluster.order("forge_jobs", namespace=ns, count=1, labels={}, annotations={"a": "b"}, age_s=60)
        accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
        _, listed = request(cluster, f"/apis/batch/v1/namespaces/{ns}/jobs", Accept=accept)
        assert listed["kind"] == "PartialObjectMetadataList"
        assert [sorted(item) for item in listed["items"]] == [["apiVersion", "kind", "metadata"]]

    @pytest.mark.parametrize(
        ("selector", "names"),
        [
            ("app=a", ["one"]),
            ("app!=a", ["two"]),
            ("app in (a, b)", ["one", "two"]),
            ("app notin (b)", ["one"]),
            ("extra", ["two"]),
            ("!extra", ["one"]),
        ],
    )
    def test_labels_select(self, cluster: StandIn, jobs: Any, ns: str, selector: str, names: list[str]) -> None:
        cluster.order("set_quota", namespace=ns, hard={"pods": "0"})
        jobs.create_namespaced_job(ns, job("one", labels={"app": "a"}))
        jobs.create_namespaced_job(ns, job("two", labels={"app": "b", "extra": "x"}))
        assert [j.metadata.name for j in jobs.list_namespaced_job(ns, label_selector=selector).items] == names


class TestDelete:
    def test_a_job_leaves_its_pod_running_unless_it_is_told_otherwise(self, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one"))
        one_pod(core, ns, "Running")
        jobs.delete_namespaced_job("one", ns)
        until(lambda: not jobs.list_namespaced_job(ns).items)
        time.sleep(0.3)
        (pod,) = pods_of(core, ns)
        assert (pod.status.phase, pod.metadata.owner_references, pod.metadata.deletion_timestamp) == ("Running", None, None)

    @pytest.mark.parametrize("policy", ["Background", "Foreground"])
    def test_deletion_takes_the_pod_along_after_its_grace(self, jobs: Any, core: Any, ns: str, policy: str) -> None:
        jobs.create_namespaced_job(ns, job("one", pod_spec(["sleep", "60"])))  # PID 1 does not heed SIGTERM
        one_pod(core, ns, "Running")
        began = time.monotonic()
        jobs.delete_namespaced_job("one", ns, body={"propagationPolicy": policy})
        assert bool(jobs.list_namespaced_job(ns).items) is (policy == "Foreground")
        pod = until(lambda: next(iter(pods_of(core, ns)), None))
        assert until(lambda: core.read_namespaced_pod(pod.metadata.name, ns).metadata.deletion_timestamp)
        until(lambda: not pods_of(core, ns) and not jobs.list_namespaced_job(ns).items)
        assert 1.9 < time.monotonic() - began < 6  # a kubelet never gives less than two seconds

    def test_a_namesake_is_not_deleted(self, jobs: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one"))
        with pytest.raises(ApiException) as refused:
            jobs.delete_namespaced_job("one", ns, body={"propagationPolicy": "Background", "preconditions": {"uid": "another"}})
        assert (refused.value.status, status_of(refused)["reason"]) == (409, "Conflict")
        assert jobs.read_namespaced_job("one", ns).metadata.deletion_timestamp is None

    def test_with_a_body_the_query_counts_for_nothing(self, jobs: Any, core: Any, ns: str) -> None:
        jobs.create_namespaced_job(ns, job("one"))
        one_pod(core, ns, "Running")
        jobs.delete_namespaced_job("one", ns, propagation_policy="Background", body={"gracePeriodSeconds": 0})
        until(lambda: not jobs.list_namespaced_job(ns).items)
        time.sleep(0.3)
        assert [p.status.phase for p in pods_of(core, ns)] == ["Running"]

    def test_what_is_gone_is_404_with_its_name(self, jobs: Any, ns: str) -> None:
        with pytest.raises(ApiException) as refused:
            jobs.delete_namespaced_job("one", ns)
        assert status_of(refused)["message"] == 'jobs.batch "one" not found'
        assert status_of(refused)["details"] == {"name": "one", "group": "batch", "kind": "jobs"}


class TestWatch:
    def events(self, jobs: Any, ns: str, **options: Any) -> list[tuple[str, str]]:
        stream = watch.Watch().stream(jobs.list_namespaced_job, ns, timeout_seconds=1, **options)
        return [(event["type"], event["object"].metadata.name or "") for event in stream]

    def test_without_a_version_what_is_there_comes_first(self, cluster: StandIn, jobs: Any, ns: str) -> None:
        cluster.order("forge_jobs", namespace=ns, count=2, labels={}, annotations={}, age_s=1)
        assert self.events(jobs, ns) == [("ADDED", "forged-00000"), ("ADDED", "forged-00001")]

    def test_from_a_version_comes_what_has_happened_since(self, cluster: StandIn, jobs: Any, ns: str) -> None:
        cluster.order("forge_jobs", namespace=ns, count=1, labels={"is": "here"}, annotations={}, age_s=1)
        version = jobs.list_namespaced_job(ns).metadata.resource_version
        jobs.patch_namespaced_job("forged-00000", ns, {"metadata": {"labels": {"is": "there"}}})
        jobs.delete_namespaced_job("forged-00000", ns, propagation_policy="Background")
        name = "forged-00000"
        assert self.events(jobs, ns, resource_version=version) == [("MODIFIED", name), ("DELETED", name)]
        assert self.events(jobs, ns, resource_version=version, label_selector="is=here") == [("DELETED", name)]
        assert self.events(jobs, ns, resource_version=version, label_selector="is=there") == [("ADDED", name), ("DELETED", name)]

    def test_a_version_that_is_forgotten_is_410_and_bookmarks_say_how_far_it_is(self, cluster: StandIn, jobs: Any, ns: str) -> None:
        version = jobs.list_namespaced_job(ns).metadata.resource_version
        cluster.order("forge_jobs", namespace=ns, count=1, labels={}, annotations={}, age_s=1)
        raw = jobs.list_namespaced_job(
            ns, watch=True, resource_version=version, allow_watch_bookmarks=True, timeout_seconds=1, _preload_content=False
        )
        kinds = [json.loads(line) for line in raw.read().splitlines()]
        assert [k["type"] for k in kinds] == ["ADDED", "BOOKMARK"]
        assert int(kinds[1]["object"]["metadata"]["resourceVersion"]) > int(version)
        cluster.order("compact")
        raw = jobs.list_namespaced_job(ns, watch=True, resource_version=version, timeout_seconds=5, _preload_content=False)
        (error,) = [json.loads(line) for line in raw.read().splitlines()]
        assert (error["type"], error["object"]["code"], error["object"]["reason"]) == ("ERROR", 410, "Expired")
