"""The cluster that tests of the Kubernetes backend use: the one that ``CIFIXER_TEST_KUBECONFIG`` names, else a stand-in of this process."""

from __future__ import annotations

import atexit
import os
from contextlib import suppress
from functools import cache
from typing import Any

from cifixer_exec import AppConfig
from cifixer_exec.backends.kubernetes.rights import NEEDED
from cifixer_exec.backends.registry import make_backend
from tests.support.kubernetes.images import RUNNER_IMAGE
from tests.support.kubernetes.stand_in import OwnStandIn, StandIn
from tests.support.own_process import NotHereError

KUBECONFIG = "CIFIXER_TEST_KUBECONFIG"
NAMESPACE = "CIFIXER_TEST_KUBERNETES_NAMESPACE"
#: Of sandboxes, and of the runner; without the latter it is uploaded.
IMAGE, RUNNER = "CIFIXER_TEST_KUBERNETES_IMAGE", "CIFIXER_TEST_KUBERNETES_RUNNER_IMAGE"
WORKER = "system:serviceaccount:ci-fixer:ci-fixer-worker"
_RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


class NoClusterError(Exception):
    """Why there is none."""


def is_real() -> bool:
    """Whether the tests were given a cluster."""
    return bool(os.environ.get(KUBECONFIG))


@cache
def cluster_settings() -> dict[str, Any]:
    """Members of an AppConfig. Raises NoClusterError."""
    namespace = os.environ.get(NAMESPACE, "ci-fixer-sandboxes")
    if not is_real():
        return settings_on(stand_in())
    image = {"image": os.environ[IMAGE]} if os.environ.get(IMAGE) else {}
    return {
        "kubernetes_kubeconfig": os.environ[KUBECONFIG],
        "kubernetes_namespace": namespace,
        "kubernetes_runner_image": os.environ.get(RUNNER, ""),
        **image,
    }


@cache
def stand_in() -> StandIn:
    """The one of this process, which ends with it. Raises NoClusterError."""
    own = OwnStandIn(tls=True)
    try:
        cluster = own.__enter__()
    except NotHereError as error:
        raise NoClusterError(str(error)) from None
    atexit.register(own.close)
    return cluster


def settings_on(cluster: StandIn) -> dict[str, Any]:
    """On a stand-in: its namespace for sandboxes, where Pods are restricted, and a user with what the Role grants and no more."""
    namespace = "ci-fixer-sandboxes"
    with suppress(RuntimeError):  # it is there
        cluster.namespace(namespace, labels=_RESTRICTED, accounts=("ci-fixer-sandbox",))
    return {
        "kubernetes_kubeconfig": str(cluster.user(WORKER, role_rules(), namespace=namespace)),
        "kubernetes_namespace": namespace,
        "kubernetes_runner_image": RUNNER_IMAGE,
    }


def role_rules() -> list[dict[str, Any]]:
    """What ``k8s/rbac/role.yaml`` grants."""
    return [{"apiGroups": [group], "resources": [resource], "verbs": list(verbs)} for group, resource, verbs in NEEDED]


def left_in_cluster(namespace: str) -> list[str]:
    """What is there of one namespace of ours."""
    found = []
    for dispatch in ("queue", "direct"):
        config = AppConfig(execution_backend="kubernetes", dispatch=dispatch, namespace=namespace, **cluster_settings())
        found += [
            f"sandbox {o.handle.sandbox_id} ({dispatch}) {o.handle.data}, made at {o.created_at_s:.3f}"
            for o in make_backend(config).list_owned()
        ]
    return found
