"""The cluster that tests of the Kubernetes backend use: the one that ``CIFIXER_TEST_KUBECONFIG`` names, else a stand-in of this process."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from cifixer_exec import AppConfig
from cifixer_exec.backends.kubernetes import KubernetesBackend
from cifixer_exec.backends.registry import make_backend

KUBECONFIG = "CIFIXER_TEST_KUBECONFIG"
NAMESPACE, IMAGE, RUNNER_IMAGE = (
    "CIFIXER_TEST_KUBERNETES_NAMESPACE",
    "CIFIXER_TEST_KUBERNETES_IMAGE",
    "CIFIXER_TEST_KUBERNETES_RUNNER_IMAGE",
)


class NoClusterError(Exception):
    """Why there is none."""


@cache
def cluster_settings() -> dict[str, Any]:
    """Members of an AppConfig. Raises NoClusterError."""
    if not os.environ.get(KUBECONFIG):
        raise NoClusterError(f"{KUBECONFIG} is not set")
    image = {"image": os.environ[IMAGE]} if os.environ.get(IMAGE) else {}
    return {
        "kubernetes_kubeconfig": os.environ[KUBECONFIG],
        "kubernetes_namespace": os.environ.get(NAMESPACE, "ci-fixer-sandboxes"),
        "kubernetes_runner_image": os.environ.get(RUNNER_IMAGE, ""),
        **image,
    }


def left_in_cluster(namespace: str) -> list[str]:
    """What is there of one namespace of ours, and not just going."""
    found = []
    for dispatch in ("queue", "direct"):
        config = AppConfig(execution_backend="kubernetes", dispatch=dispatch, namespace=namespace, **cluster_settings())
        backend = make_backend(config)
        assert isinstance(backend, KubernetesBackend)
        found += [f"sandbox {owned.handle.sandbox_id} ({dispatch})" for owned in backend.list_owned()]
    return found
