"""Somebody who may everything in the cluster of the tests: makes namespaces, users and what other people would leave there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from cifixer_exec import AppConfig
from cifixer_exec.backends.kubernetes import KubernetesBackend
from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.credentials import Address
from cifixer_exec.backends.kubernetes.refusals import RefusedError
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.errors import ExecutorError
from cifixer_exec.model import SandboxSpec
from tests.support.contract_stack import check_daemon
from tests.support.kubernetes_cluster import cluster_settings, is_real, stand_in
from tests.support.kubernetes_pods import names_of

Json = dict[str, Any]
ACCOUNT = "ci-fixer-sandbox"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
_RBAC = "/apis/rbac.authorization.k8s.io/v1/namespaces/{}"


@cache
def admin() -> Cluster:
    """Raises NoClusterError."""
    return Cluster(Address(kubeconfig=admin_kubeconfig(), namespace=cluster_settings()["kubernetes_namespace"]))


def admin_kubeconfig() -> str:
    """Raises NoClusterError."""
    return str(cluster_settings()["kubernetes_kubeconfig"]) if is_real() else str(stand_in().admin())


def jobs_path(namespace: str = "") -> str:
    return f"/apis/batch/v1/namespaces/{namespace or admin().namespace}/jobs"


def pods_path(namespace: str = "") -> str:
    return f"/api/v1/namespaces/{namespace or admin().namespace}/pods"


def made(path: str, document: Json) -> Json:
    """``document`` as the API server has taken it."""
    return admin().ask("POST", path, "making something for a test", body=document).document


def found(path: str) -> Json | None:
    """The object there, if there is one."""
    answer = admin().get(path, "looking in a test")
    return answer.document if answer else None


def listed(path: str, selector: str) -> list[Json]:
    return [item for page in admin().pages(path, "looking in a test", selector=selector) for item in page]


def removed(path: str) -> None:
    """Gone with all that belongs to it, and at once; it may be gone already."""
    admin().delete(path, "cleaning up a test", {"propagationPolicy": "Background", "gracePeriodSeconds": 0})


def wait_for(what: Callable[[], Any], *, timeout_s: float = 20.0) -> Any:
    """The first true answer of ``what``."""
    give_up = time.monotonic() + timeout_s
    while not (answer := what()):
        assert time.monotonic() < give_up, "it does not come to pass"
        time.sleep(0.05)
    return answer


def left_of(config: AppConfig) -> list[str]:
    """Jobs and Pods with our label, also those that are just going."""
    selector, place = names_of(config).selector(), config.kubernetes_namespace
    return [str(item["metadata"]["name"]) for path in (jobs_path(place), pods_path(place)) for item in listed(path, selector)]


@contextmanager
def sandboxes_of(namespace: str) -> Iterator[AppConfig]:
    """Direct use of the cluster of the tests. Nothing of it may be left at the end, also not by tests that leave sandboxes."""
    check_daemon("kubernetes")
    config = AppConfig(execution_backend="kubernetes", dispatch="direct", namespace=namespace, **cluster_settings())
    yield config
    backend = backend_of(config)
    for owned in backend.list_owned():
        backend.destroy(owned.handle)
    wait_for(lambda: not left_of(config))


def backend_of(config: AppConfig, **settings: Any) -> KubernetesBackend:
    backend = make_backend(config.with_(**settings))
    assert isinstance(backend, KubernetesBackend)
    return backend


def spec_of(sandbox_id: str = "one", **members: Any) -> SandboxSpec:
    return SandboxSpec(**{"backend": "kubernetes", "sandbox_id": sandbox_id, **members})


def job_path(config: AppConfig, sandbox_id: str = "one") -> str:
    return f"{jobs_path(config.kubernetes_namespace)}/{names_of(config).job(sandbox_id)}"


@contextmanager
def namespace_of_its_own(labels: Json | None = None, *, account: str = ACCOUNT) -> Iterator[str]:
    """A namespace with the service account of sandboxes; of the level restricted unless ``labels`` say otherwise."""
    name = f"ci-fixer-test-{uuid4().hex[:8]}"
    labels = RESTRICTED if labels is None else labels
    if not is_real():
        stand_in().namespace(name, labels=labels, accounts=(account,))
        yield name
        return
    made("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
    try:
        made(f"/api/v1/namespaces/{name}/serviceaccounts", {"metadata": {"name": account}})
        yield name
    finally:
        removed(f"/api/v1/namespaces/{name}")


def set_quota(namespace: str, hard: dict[str, str]) -> None:
    """It holds when this returns."""
    if not is_real():
        stand_in().order("set_quota", namespace=namespace, hard=hard)
        return
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    made(path, {"metadata": {"name": "sandboxes"}, "spec": {"hard": hard}})
    wait_for(lambda: ((found(f"{path}/sandboxes") or {}).get("status") or {}).get("hard") == hard)


@contextmanager
def user_with(rules: list[Json], directory: Path) -> Iterator[str]:
    """The kubeconfig of somebody with exactly these rules of a Role in the sandboxes' namespace."""
    namespace, name = admin().namespace, f"limited-{uuid4().hex[:8]}"
    if not is_real():
        yield str(stand_in().user(name, rules, namespace=namespace))
        return
    account = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    role, binding = f"{_RBAC.format(namespace)}/roles", f"{_RBAC.format(namespace)}/rolebindings"
    try:
        made(account, {"metadata": {"name": name}})
        made(role, {"metadata": {"name": name}, "rules": rules})
        subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
        made(binding, {"metadata": {"name": name}, "subjects": [subject], "roleRef": reference})
        token = made(f"{account}/{name}/token", {"spec": {"expirationSeconds": 3600}})["status"]["token"]
        path = _kubeconfig(directory / f"{name}.kubeconfig", token, namespace)
        _wait_until_bound(path, namespace, rules)
        yield path
    finally:
        for kind in (binding, role, account):
            removed(f"{kind}/{name}")


def _kubeconfig(path: Path, token: str, namespace: str) -> str:
    configuration = admin().credentials.configuration
    cluster = {"server": configuration.host, "certificate-authority": configuration.ssl_ca_cert}
    context = {"cluster": "c", "user": "u", "namespace": namespace}
    members = {
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "c", "context": context}],
    }
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "c", **members}))
    return str(path)


def _wait_until_bound(kubeconfig: str, namespace: str, rules: list[Json]) -> None:
    """API servers see a new binding a moment later."""
    rule, cluster = rules[-1], Cluster(Address(kubeconfig=kubeconfig))
    resource, _, part = rule["resources"][-1].partition("/")
    asked = {"namespace": namespace, "verb": rule["verbs"][-1], "group": rule["apiGroups"][-1], "resource": resource, "subresource": part}
    body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": asked}}

    def bound() -> bool:
        with suppress(RefusedError, ExecutorError):
            answer = cluster.ask("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", "asking", body=body)
            return bool(answer.document["status"].get("allowed"))
        return False

    wait_for(bound)
