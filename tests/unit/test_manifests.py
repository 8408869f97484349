"""The manifests of k8s/: each file by itself, and every overlay and component as kustomize renders it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.cli.program import program
from cifixer_exec.settings import VARIABLES
from tests.support.manifests import (
    K8S,
    OVERLAYS,
    ROOT,
    VARIANTS,
    WORKLOADS,
    Document,
    containers,
    environment,
    files,
    named,
    of_kind,
    ours,
    pod_of,
    read,
    rendered,
)
from tests.support.network_policies import fits
from tests.support.resource_schemas import CUSTOM, NEWEST, OLDEST, faults
from tests.unit.test_compose import SERVICES, STOP_MARGIN_S, command_line_variables, read_yaml

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_overlay = pytest.mark.parametrize("overlay", [f"overlays/{name}" for name in OVERLAYS])
each_version = pytest.mark.parametrize("version", [OLDEST, NEWEST])
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
#: Secrets beyond secret.example.yaml that a component tells its user to make, and their keys.
MORE_SECRETS = {"ci-fixer-e2b": {"api-key"}, "ci-fixer": {"redis-url"}, "ci-fixer-flower-tls": set()}
#: Pods that are not ours: an agent service's.
FOREIGN_APPS = {"ci-fixer-api"}


def identity(document: Document) -> tuple[str, str, str]:
    return document["kind"], document["metadata"].get("namespace", ""), document["metadata"]["name"]


def names(documents: tuple[Document, ...], kind: str) -> set[tuple[str, str]]:
    """Namespace and name of each object of a kind."""
    return {(namespace, name) for found, namespace, name in map(identity, documents) if found == kind}


def secret_keys() -> dict[str, set[str]]:
    (example,) = read(K8S / "deployment" / "secret.example.yaml")
    keys = {name: set(more) for name, more in MORE_SECRETS.items()}
    keys[example["metadata"]["name"]] |= set(example["stringData"])
    return keys


# ------------------------------------------------------------------------------------------------------------ the schemas


@each_version
@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(K8S).as_posix())
def test_every_file_is_what_the_api_server_takes(path: Any, version: str) -> None:
    documents = read(path)
    assert documents
    assert {identity(d): said for d in documents if (said := faults(d, version))} == {}


@each_version
@each_variant
def test_what_kustomize_makes_is_what_the_api_server_takes(variant: str, version: str) -> None:
    assert {identity(d): said for d in rendered(variant) if (said := faults(d, version))} == {}


def test_the_check_against_the_schemas_can_fail() -> None:
    for document in (d for path in files() for d in read(path)):
        for wrong in ({**document, "surplus": 1}, {**document, "metadata": {"name": 1}}, {**document, "apiVersion": "v0"}):
            assert faults(wrong, NEWEST), identity(document)
    (deployment,) = [d for d in read(K8S / "deployment" / "flower.yaml") if d["kind"] == "Deployment"]
    misspelt: Any = copy.deepcopy(deployment)
    misspelt["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    assert "livenesProbe" in faults(misspelt, NEWEST)


def test_only_custom_resources_are_held_against_schemas_of_our_own() -> None:
    used = {
        d["kind"] for path in files() for d in read(path) if "." in d["apiVersion"] and not d["apiVersion"].split("/")[0].endswith("k8s.io")
    }
    assert used == CUSTOM


def test_the_pod_template_is_one() -> None:
    template = read_yaml(K8S / "components" / "pod-template" / "pod-template.yaml")
    assert set(template) <= {"metadata", "spec"}
    spec = {"containers": [{"name": "sandbox", "image": "x"}], **template["spec"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}, "spec": spec}
    assert faults(pod, NEWEST) == ""


# ---------------------------------------------------------------------------------------------------------- what is meant


@each_variant
def test_nothing_is_there_twice_and_all_of_it_is_in_a_namespace_that_there_is(variant: str) -> None:
    documents = rendered(variant)
    found = list(map(identity, documents))
    assert len(found) == len(set(found))
    spaces = {name for kind, _, name in found if kind == "Namespace"}
    assert {namespace for _, namespace, _ in found} <= {"", *spaces}
    assert {kind for kind, namespace, _ in found if not namespace} <= {"Namespace", "PriorityClass", "ClusterRole"}


def test_the_one_file_for_kubectl_is_the_others() -> None:
    listed = read_yaml(K8S / "rbac" / "kustomization.yaml")["resources"]
    assert [d for name in listed for d in read(K8S / "rbac" / name)] == read(K8S / "rbac" / "k8s.yaml")
    assert {path.name for path in (K8S / "rbac").glob("*.yaml")} == {*listed, "k8s.yaml", "kustomization.yaml"}


def references(pod: Document) -> Iterator[tuple[str, str, str]]:
    """Kind, name and key of all that a Pod needs to be there; an empty key means all of it."""
    spec = pod["spec"]
    yield "ServiceAccount", spec["serviceAccountName"], ""
    yield "PriorityClass", spec["priorityClassName"], ""
    for volume in spec.get("volumes", []):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], ""
    for container in containers(pod):
        for source in container.get("envFrom", []):
            yield "ConfigMap", source["configMapRef"]["name"], ""
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                yield "Secret", variable["valueFrom"]["secretKeyRef"]["name"], variable["valueFrom"]["secretKeyRef"]["key"]


@each_variant
def test_what_pods_refer_to_is_there(variant: str) -> None:
    documents = rendered(variant)
    for workload in of_kind(documents, *WORKLOADS):
        pod = pod_of(workload)
        volumes = {
            v["name"]
            for v in [
                *pod["spec"].get("volumes", []),
                *({"name": c["metadata"]["name"]} for c in workload["spec"].get("volumeClaimTemplates", [])),
            ]
        }
        for kind, name, key in references(pod):
            if kind == "Secret":
                assert key in secret_keys()[name], (identity(workload), name, key)
            else:
                namespace = "" if kind == "PriorityClass" else pod["metadata"]["namespace"]
                assert (namespace, name) in names(documents, kind), (identity(workload), kind, name)
        for container in containers(pod):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            ports = {port["name"] for port in container["ports"]}
            probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
            assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= ports


@each_variant
def test_selectors_find_the_pods_that_are_meant(variant: str) -> None:
    documents = rendered(variant)
    pods = {identity(w): pod_of(w) for w in of_kind(documents, *WORKLOADS)}
    for workload in of_kind(documents, *WORKLOADS):
        selected = [who for who, pod in pods.items() if fits(workload["spec"]["selector"], pod["metadata"]["labels"])]
        assert selected == [identity(workload)]
        for spread in pod_of(workload)["spec"].get("topologySpreadConstraints", []):
            assert spread["labelSelector"] == workload["spec"]["selector"]
    for service in of_kind(documents, "Service"):
        wanted = service["spec"]["selector"]
        found = [pod for pod in pods.values() if fits({"matchLabels": wanted}, pod["metadata"]["labels"])]
        assert found or wanted["app"] in FOREIGN_APPS, identity(service)
        for port, pod in ((p["targetPort"], pod) for p in service["spec"]["ports"] for pod in found):
            assert port in {p["name"] for c in containers(pod) for p in c["ports"]}
    budgets = of_kind(documents, "PodDisruptionBudget")
    for who, pod in pods.items():  # an eviction is refused where two budgets hold
        held = [b for b in budgets if fits(b["spec"]["selector"], pod["metadata"]["labels"])]
        assert len(held) == (1 if "worker" in who[2] else 0), who


@each_variant
def test_what_points_at_an_object_points_at_one_that_is_there(variant: str) -> None:
    documents = rendered(variant)
    for scaler in of_kind(documents, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        assert "replicas" not in named(documents, target["kind"], target["name"], scaler["metadata"]["namespace"])["spec"]
        for trigger in scaler["spec"].get("triggers", []):
            assert (scaler["metadata"]["namespace"], trigger["authenticationRef"]["name"]) in names(documents, "TriggerAuthentication")
    for authentication in of_kind(documents, "TriggerAuthentication"):
        for secret in authentication["spec"]["secretTargetRef"]:
            assert secret["key"] in secret_keys()[secret["name"]]
    for ingress in of_kind(documents, "Ingress"):
        for path in (p for rule in ingress["spec"]["rules"] for p in rule["http"]["paths"]):
            service = named(documents, "Service", path["backend"]["service"]["name"], ingress["metadata"]["namespace"])
            assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
        assert {host for tls in ingress["spec"]["tls"] for host in tls["hosts"]} == {rule["host"] for rule in ingress["spec"]["rules"]}
        assert {tls["secretName"] for tls in ingress["spec"]["tls"]} <= set(secret_keys())
    for monitor in of_kind(documents, "ServiceMonitor"):
        watched = [s for s in of_kind(documents, "Service") if fits(monitor["spec"]["selector"], s["metadata"]["labels"])]
        assert {s["metadata"]["labels"][monitor["spec"]["jobLabel"]] for s in watched} == {"cifixer-worker", "cifixer-beat"}
        assert {e["port"] for e in monitor["spec"]["endpoints"]} == {port["name"] for s in watched for port in s["spec"]["ports"]}


def test_the_alerts_are_those_of_the_compose_stack() -> None:
    (rule,) = read(K8S / "components" / "monitoring" / "prometheusrule.yaml")
    assert rule["spec"] == read_yaml(ROOT / "examples" / "monitoring" / "alerts.yml")


# ---------------------------------------------------------------------------------------------------- settings and commands


@each_variant
def test_our_pods_are_given_settings_that_there_are_and_that_can_be_read(variant: str) -> None:
    documents = rendered(variant)
    for workload, container in ours(documents):
        given = {key: value for key, value in environment(container, documents).items() if key.startswith("CIFIXER_")}
        assert set(given) <= {*VARIABLES, *command_line_variables(program)}, identity(workload)
        config = AppConfig.from_env(
            {key: "redis://x" if value == "secret" and key == "CIFIXER_REDIS_URL" else value for key, value in given.items()}
        )
        assert config.redis_url in ("redis://:secret@ci-fixer-redis:6379/0", "redis://x")
        assert (config.metrics_address == "0.0.0.0:9808") == (workload["metadata"]["name"] != "ci-fixer-flower")


@each_variant
def test_what_settings_name_is_there(variant: str) -> None:
    documents = rendered(variant)
    for workload, container in ours(documents):
        given = environment(container, documents)
        namespace = given["CIFIXER_KUBERNETES_NAMESPACE"]
        assert ("", namespace) in names(documents, "Namespace"), identity(workload)
        assert (namespace, given["CIFIXER_KUBERNETES_SERVICE_ACCOUNT"]) in names(documents, "ServiceAccount")
        assert ("", given["CIFIXER_KUBERNETES_PRIORITY_CLASS"]) in names(documents, "PriorityClass")
        if path := given.get("CIFIXER_KUBERNETES_POD_TEMPLATE"):
            (mount,) = [m for m in container["volumeMounts"] if path.startswith(m["mountPath"] + "/")]
            (volume,) = [v for v in workload["spec"]["template"]["spec"]["volumes"] if v["name"] == mount["name"]]
            assert path.rsplit("/", 1)[1] in named(documents, "ConfigMap", volume["configMap"]["name"], "ci-fixer")["data"]


@each_variant
def test_our_pods_get_a_command_that_there_is(variant: str) -> None:
    documents = rendered(variant)
    for workload, container in ours(documents):
        assert "command" not in container, "the image's entry point is cifixer-exec"
        verb, *arguments = container["args"]
        assert program.commands[verb].make_context(verb, list(arguments), resilient_parsing=True).args == []
        if verb == "worker":
            wanted = arguments[arguments.index("--backend") + 1]
            assert wanted == environment(container, documents)["CIFIXER_BACKEND"] == workload["metadata"]["labels"]["cifixer.dev/pool"]


@each_variant
def test_every_image_has_a_version_of_its_own_and_the_runner_is_that_of_the_worker(variant: str) -> None:
    assert VERSION is not None
    documents = rendered(variant)
    for workload in of_kind(documents, *WORKLOADS):
        for container in containers(pod_of(workload)):
            assert re.search(r":\d+\.\d+\.\d+", container["image"]), container["image"]
    for _, container in ours(documents):
        assert container["image"].endswith(f"cifixer-exec:{VERSION[1]}")
        if container["args"] == ["worker", "--backend", "kubernetes"]:
            assert environment(container, documents)["CIFIXER_KUBERNETES_RUNNER_IMAGE"] == container["image"]


@each_variant
def test_a_stop_leaves_time_for_the_drain(variant: str) -> None:
    documents = rendered(variant)
    for workload, container in ours(documents):
        grace_s = pod_of(workload)["spec"]["terminationGracePeriodSeconds"]
        drain_s = float(environment(container, documents)["CIFIXER_DRAIN_S"])
        assert grace_s >= (drain_s + STOP_MARGIN_S if container["args"][0] == "worker" else 20)


@each_variant
def test_there_is_exactly_one_beat_for_each_installation_and_its_workers_are_rolled_one_by_one(variant: str) -> None:
    documents = rendered(variant)
    found = [(w, environment(c, documents)["CIFIXER_NAMESPACE"]) for w, c in ours(documents) if c["args"] == ["beat"]]
    workers = [(w, environment(c, documents)["CIFIXER_NAMESPACE"]) for w, c in ours(documents) if c["args"][0] == "worker"]
    assert sorted(namespace for _, namespace in found) == sorted({namespace for _, namespace in workers})
    for beat, _ in found:
        assert (beat["spec"]["replicas"], beat["spec"]["strategy"]) == (1, {"type": "Recreate"})
    for worker, _ in workers:
        assert worker["spec"]["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def test_redis_is_run_as_in_the_compose_file() -> None:
    (redis,) = [d for d in read(K8S / "deployment" / "redis.yaml") if d["kind"] == "StatefulSet"]
    (container,) = containers(pod_of(redis))
    check, _, start = container["args"][0].partition("; }; ")
    assert start.strip() == SERVICES["redis"]["command"][-1].replace("$$", "$")
    assert '[ -n "$REDIS_PASSWORD" ]' in check
    assert container["image"] == SERVICES["redis"]["image"]


# -------------------------------------------------------------------------------------------------------------- the README


def test_the_readme_explains_every_setting_of_the_backend() -> None:
    explained = set(re.findall(r"`(CIFIXER_KUBERNETES_\w+)`", (K8S / "README.md").read_text()))
    assert explained == {variable for variable in VARIABLES if variable.startswith("CIFIXER_KUBERNETES_")}


def test_the_readme_names_files_that_there_are() -> None:
    text = (K8S / "README.md").read_text()
    for path in set(re.findall(r"k8s/[\w./-]+\w", text)):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"components/([\w-]+)", text):
        assert (K8S / "components" / name).is_dir(), name
    assert set(re.findall(r"overlays/([\w-]+)", text)) == set(OVERLAYS)
