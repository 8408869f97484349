"""What the manifests of k8s/ keep apart: rights, networks, secrets, limits; and what probes and autoscalers look at."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.backends.kubernetes.rights import NEEDED
from cifixer_exec.celeryconfig import broker_transport_options
from cifixer_exec.queues import placement_queue, pool_queue
from tests.support.manifests import (
    K8S,
    OVERLAYS,
    VARIANTS,
    WORKLOADS,
    Document,
    containers,
    environment,
    named,
    of_kind,
    ours,
    pod_of,
    read,
    rendered,
)
from tests.support.network_policies import End, reaches
from tests.support.pod_security import violations
from tests.unit.test_manifests import identity, names

each_variant = pytest.mark.parametrize("variant", VARIANTS)
#: What the backend asks of the API server, and so all that its Role may say.
RIGHTS = {
    ("batch", "jobs"): {"create", "get", "list", "patch", "delete"},
    ("", "pods"): {"get", "list", "watch", "delete"},
    ("", "pods/log"): {"get"},
    ("", "pods/exec"): {"get", "create"},
    ("", "events"): {"list"},
}
RESTRICTED = "pod-security.kubernetes.io/enforce"
SANDBOXES = "ci-fixer-sandboxes"
DNS = End(namespace="kube-system", labels={"k8s-app": "kube-dns"})
API_SERVER = End(address="172.18.0.2")
#: What a hostile sandbox would look for: the cloud's metadata, nodes, Services and Pods, the node's loopback, other private nets.
INSIDE = (
    "169.254.169.254",
    "10.96.0.1",
    "10.244.1.7",
    "172.18.0.2",
    "192.168.49.2",
    "100.64.0.1",
    "127.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
)
INSIDE_6 = ("fd00:ec2::254", "fe80::1", "::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "ff02::1")
OUTSIDE = ("1.1.1.1", "140.82.121.4", "2606:4700:4700::1111")


def table(role: Document) -> dict[tuple[str, str], set[str]]:
    found = {(group, kind): set(rule["verbs"]) for rule in role["rules"] for group in rule["apiGroups"] for kind in rule["resources"]}
    assert all(set(rule) == {"apiGroups", "resources", "verbs"} for rule in role["rules"])
    return found


# -------------------------------------------------------------------------------------------------------------- the rights


@each_variant
def test_workers_have_the_rights_that_the_backend_uses_and_no_other(variant: str) -> None:
    roles = of_kind(rendered(variant), "Role", "ClusterRole")
    assert [table(role) for role in roles] == [RIGHTS]


def test_the_rights_are_those_that_the_backend_asks_whether_it_has() -> None:
    assert {(group, kind): set(verbs) for group, kind, verbs in NEEDED} == RIGHTS


@each_variant
def test_only_workers_of_the_cluster_have_rights_and_only_among_sandboxes(variant: str) -> None:
    documents = rendered(variant)
    assert not of_kind(documents, "ClusterRoleBinding")
    (role,) = of_kind(documents, "Role", "ClusterRole")
    privileged = set()
    for binding in of_kind(documents, "RoleBinding"):
        (subject,) = binding["subjects"]
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (role["kind"], role["metadata"]["name"])
        assert role["metadata"].get("namespace", binding["metadata"]["namespace"]) == binding["metadata"]["namespace"]
        assert binding["metadata"]["namespace"].startswith(SANDBOXES)
        assert (subject["namespace"], subject["name"]) in names(documents, "ServiceAccount")
        privileged.add((subject["name"], binding["metadata"]["namespace"]))
    users = {
        (pod_of(w)["spec"]["serviceAccountName"], environment(c, documents)["CIFIXER_KUBERNETES_NAMESPACE"])
        for w, c in ours(documents)
        if c["args"] == ["worker", "--backend", "kubernetes"]
    }
    assert privileged == users
    others = {
        pod_of(w)["spec"]["serviceAccountName"] for w in of_kind(documents, *WORKLOADS) if "worker-kubernetes" not in w["metadata"]["name"]
    }
    assert others == {"ci-fixer"}


@each_variant
def test_only_a_pod_that_uses_a_token_has_one(variant: str) -> None:
    documents = rendered(variant)
    for account in of_kind(documents, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for workload in of_kind(documents, *WORKLOADS):
        wanted = "worker-kubernetes" in workload["metadata"]["name"]
        assert pod_of(workload)["spec"]["automountServiceAccountToken"] is wanted


# ------------------------------------------------------------------------------------------------------------ Pod Security


@each_variant
def test_every_namespace_is_restricted_and_every_pod_of_ours_is_let_in(variant: str) -> None:
    documents = rendered(variant)
    assert {n["metadata"]["labels"][RESTRICTED] for n in of_kind(documents, "Namespace")} == {"restricted"}
    for workload in of_kind(documents, *WORKLOADS):
        pod = pod_of(workload)
        assert violations(pod) == [], identity(workload)
        assert pod["spec"]["enableServiceLinks"] is False
        for container in containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert set(container["resources"]) == {"requests", "limits"}
            assert set(container["resources"]["limits"]) == {"cpu", "memory"}


WRONGS: dict[str, Callable[[Any], Any]] = {
    "hostNetwork": lambda spec: spec.update(hostNetwork=True),
    "volume": lambda spec: spec.setdefault("volumes", []).append({"name": "x", "hostPath": {"path": "/"}}),
    "runAsNonRoot": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "runAsUser": lambda spec: spec["securityContext"].update(runAsUser=0),
    "seccompProfile": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "privileged": lambda spec: spec["containers"][0]["securityContext"].update(privileged=True),
    "allowPrivilegeEscalation": lambda spec: spec["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
    "capabilities": lambda spec: spec["containers"][0]["securityContext"].pop("capabilities"),
    "procMount": lambda spec: spec["containers"][0]["securityContext"].update(procMount="Unmasked"),
    "hostPort": lambda spec: spec["containers"][0].update(ports=[{"containerPort": 1, "hostPort": 1}]),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_the_check_of_pod_security_can_fail(wrong: str) -> None:
    (beat,) = read(K8S / "deployment" / "beat" / "beat.yaml")
    pod: Any = copy.deepcopy(pod_of(beat))
    assert violations(pod) == []
    WRONGS[wrong](pod["spec"])
    assert any(wrong in said for said in violations(pod))


# ---------------------------------------------------------------------------------------------------------------- networks


def sandbox(network: str, namespace: str = SANDBOXES) -> End:
    return End(namespace=namespace, labels={"app": "ci-fixer-sandbox", "cifixer.dev/network": network})


def end(documents: tuple[Document, ...], name: str) -> End:
    (workload,) = [w for w in of_kind(documents, *WORKLOADS) if w["metadata"]["name"] == name]
    return End(namespace="ci-fixer", labels=pod_of(workload)["metadata"]["labels"])


def sandbox_namespaces(documents: tuple[Document, ...]) -> list[str]:
    return sorted(name for _, name in names(documents, "Namespace") if name.startswith(SANDBOXES))


@each_variant
def test_a_sandbox_reaches_nothing_and_is_reached_by_nobody(variant: str) -> None:
    documents = rendered(variant)
    everybody = [End(namespace="ci-fixer", labels=pod_of(w)["metadata"]["labels"]) for w in of_kind(documents, *WORKLOADS)]
    for namespace in sandbox_namespaces(documents):
        for stranger in (sandbox("none", namespace), sandbox("cluster", namespace), End(namespace=namespace)):
            for target in [*everybody, sandbox("none", namespace), *(End(address=a) for a in (*INSIDE, *INSIDE_6, *OUTSIDE))]:
                assert not reaches(documents, stranger, target, 443)
            assert not reaches(documents, stranger, DNS, 53, "UDP")
            for source in [*everybody, sandbox("egress", namespace), End(address="10.0.0.1")]:
                assert not reaches(documents, source, stranger, 80)


@each_variant
def test_a_sandbox_with_egress_reaches_names_and_the_public_internet_only(variant: str) -> None:
    documents = rendered(variant)
    for namespace in sandbox_namespaces(documents):
        asking = sandbox("egress", namespace)
        assert reaches(documents, asking, DNS, 53, "UDP")
        assert reaches(documents, asking, DNS, 53, "TCP")
        assert not reaches(documents, asking, End(namespace="kube-system", labels={"k8s-app": "metrics-server"}), 443)
        for port in (22, 80, 443):
            assert all(reaches(documents, asking, End(address=address), port) for address in OUTSIDE)
            assert not any(reaches(documents, asking, End(address=address), port) for address in (*INSIDE, *INSIDE_6))
        assert not reaches(documents, asking, End(address=OUTSIDE[0]), 25)
        assert not reaches(documents, asking, End(namespace="ci-fixer", labels={"app": "ci-fixer-redis"}), 6379)
        assert not reaches(documents, sandbox("none", namespace), asking, 80)


def test_redis_is_reached_by_those_who_use_it_only() -> None:
    documents = rendered("deployment")
    redis = end(documents, "ci-fixer-redis")
    for name in ("ci-fixer-worker-kubernetes", "ci-fixer-beat", "ci-fixer-flower"):
        assert reaches(documents, end(documents, name), redis, 6379), name
        assert not reaches(documents, end(documents, name), redis, 22)
        assert reaches(documents, end(documents, name), DNS, 53, "UDP")
    assert not reaches(documents, End(namespace="ci-fixer", labels={"app": "other"}), redis, 6379)
    agent = End(namespace="agents", labels={"cifixer.dev/redis": "client"})
    assert not reaches(documents, agent, redis, 6379)
    assert reaches(documents, agent, redis, 6379, namespaces={"agents": {"cifixer.dev/redis-clients": "true"}})
    assert not reaches(documents, redis, End(address=OUTSIDE[0]), 443)


def test_only_workers_reach_the_api_server_and_nobody_the_metadata_service() -> None:
    documents = rendered("deployment")
    for workload in of_kind(documents, *WORKLOADS):
        who = end(documents, workload["metadata"]["name"])
        assert reaches(documents, who, API_SERVER, 6443) == ("worker-kubernetes" in workload["metadata"]["name"])
        assert not any(reaches(documents, who, End(address="169.254.169.254"), port) for port in (80, 443, 6443))


def test_flower_and_metrics_are_reached_from_the_one_namespace_that_a_component_names() -> None:
    nginx, prometheus = End(namespace="ingress-nginx", labels={"app": "x"}), End(namespace="monitoring", labels={"app": "x"})
    keda = End(namespace="keda", labels={"app": "keda-operator"})
    base, more = rendered("deployment"), rendered("overlays/operators")
    for name, source, port in (
        ("ci-fixer-flower", nginx, 5555),
        ("ci-fixer-worker-kubernetes", prometheus, 9808),
        ("ci-fixer-beat", prometheus, 9808),
        ("ci-fixer-redis", keda, 6379),
    ):
        assert not reaches(base, source, end(base, name), port)
        assert reaches(more, source, end(more, name), port)
        assert not reaches(more, End(namespace="other"), end(more, name), port)
        assert not reaches(more, sandbox("egress"), end(more, name), port)


# ----------------------------------------------------------------------------------------------------------------- secrets


@each_variant
def test_no_secret_is_in_a_manifest(variant: str) -> None:
    documents = rendered(variant)
    assert not of_kind(documents, "Secret")
    for workload in of_kind(documents, *WORKLOADS):
        for container in containers(pod_of(workload)):
            for variable in container.get("env", []):
                if re.search("PASSWORD|SECRET|KEY|TOKEN", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]
            assert not re.search(
                r"\$\((REDIS_|\w*PASSWORD|\w*SECRET)", " ".join([*container.get("command", []), *container.get("args", [])])
            )


def test_the_example_of_a_secret_is_empty_and_part_of_nothing() -> None:
    (example,) = read(K8S / "deployment" / "secret.example.yaml")
    assert set(example["stringData"].values()) == {""}
    listed = [name for path in K8S.rglob("kustomization.yaml") for name in read(path)[0].get("resources", [])]
    assert "redis.yaml" in listed
    assert not [name for name in listed if "secret" in name]


# ------------------------------------------------------------------------------------------------------ probes and scaling


@each_variant
def test_probes_are_cheap_and_a_redis_that_is_away_restarts_no_worker(variant: str) -> None:
    for workload, container in ours(rendered(variant)):
        paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
        patience_s = container["livenessProbe"]["periodSeconds"] * container["livenessProbe"]["failureThreshold"]
        if container["args"][0] == "worker":
            assert paths == {"startup": "/livez", "readiness": "/healthz", "liveness": "/livez"}
            assert 30 <= patience_s <= 120
        elif container["args"][0] == "beat":
            assert paths == {"startup": "/livez", "readiness": "/healthz", "liveness": "/healthz"}
            assert patience_s >= 600
        else:
            assert set(paths.values()) == {"/healthcheck"}, identity(workload)


@each_variant
def test_there_are_not_two_autoscalers_of_one_deployment(variant: str) -> None:
    documents = rendered(variant)
    targets = [s["spec"]["scaleTargetRef"]["name"] for s in of_kind(documents, "HorizontalPodAutoscaler", "ScaledObject")]
    assert len(targets) == len(set(targets))


def test_both_autoscalers_are_in_an_overlay() -> None:
    kinds = {d["kind"] for name in OVERLAYS for d in rendered(f"overlays/{name}")}
    assert {"HorizontalPodAutoscaler", "ScaledObject"} <= kinds


def test_keda_looks_at_the_lists_that_doorbells_wait_in() -> None:
    documents = rendered("components/keda")
    (scaled,) = of_kind(documents, "ScaledObject")
    given = environment(containers(pod_of(named(documents, "Deployment", "ci-fixer-worker-kubernetes", "ci-fixer")))[0], documents)
    placement = ".".join(filter(None, [given.get("CIFIXER_KUBERNETES_CLUSTER"), given["CIFIXER_KUBERNETES_NAMESPACE"]]))
    queues = [pool_queue("kubernetes"), placement_queue("kubernetes", placement)]
    prefix = given["CIFIXER_NAMESPACE"] + ":"
    assert [trigger["metadata"]["listName"] for trigger in scaled["spec"]["triggers"]] == [prefix + queue for queue in queues]
    assert broker_transport_options["priority_steps"] == [0]  # else there would be a list for each step
    for trigger in scaled["spec"]["triggers"]:
        host, _, port = trigger["metadata"]["address"].partition(":")
        service, namespace, _ = host.split(".")
        assert int(port) in {p["port"] for p in named(documents, "Service", service, namespace)["spec"]["ports"]}


# ------------------------------------------------------------------------------------------------------------------ limits

UNITS = {"": 1.0, "m": 0.001, "Ki": 1024.0, "Mi": 1024.0**2, "Gi": 1024.0**3}


def amount(text: str) -> float:
    match = re.fullmatch(r"(\d+)(m|Ki|Mi|Gi)?", text)
    assert match, text
    return int(match[1]) * UNITS[match[2] or ""]


@each_variant
def test_the_quota_holds_sandboxes_of_the_configured_size(variant: str) -> None:
    documents = rendered(variant)
    worker = named(documents, "Deployment", "ci-fixer-worker-kubernetes", "ci-fixer")
    config = AppConfig.from_env(
        {k: v for k, v in environment(containers(pod_of(worker))[0], documents).items() if k != "CIFIXER_REDIS_URL"}
    )
    hard = {key: amount(value) for key, value in named(documents, "ResourceQuota", SANDBOXES, SANDBOXES)["spec"]["hard"].items()}
    pods = hard["pods"]
    assert config.memory_bytes is not None
    assert config.cpus is not None
    assert pods >= 10
    assert hard["count/jobs.batch"] >= 5 * pods  # those that have ended stay until their TTL
    assert hard["requests.cpu"] >= pods * config.kubernetes_cpu_request
    assert hard["requests.memory"] >= pods * config.kubernetes_memory_request_bytes
    assert hard["limits.cpu"] >= pods * config.cpus
    assert hard["limits.memory"] >= pods * config.memory_bytes
    (limits,) = named(documents, "LimitRange", SANDBOXES, SANDBOXES)["spec"]["limits"]
    assert amount(limits["max"]["memory"]) >= config.memory_bytes
    assert amount(limits["max"]["cpu"]) >= config.cpus


def test_a_sandbox_pushes_nobody_aside_and_a_worker_goes_before_it() -> None:
    documents = rendered("deployment")
    sandboxes, workers = (named(documents, "PriorityClass", f"ci-fixer-{name}") for name in ("sandbox", "worker"))
    assert sandboxes["preemptionPolicy"] == "Never"
    assert -10 <= sandboxes["value"] < 0 < workers["value"]
    assert not sandboxes.get("globalDefault")
