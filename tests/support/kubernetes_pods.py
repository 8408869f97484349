"""What other users of a cluster do to a sandbox's Job and Pod, behind everyone's back."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.backends.kubernetes import Address
from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.job import CONTAINER, STOP
from cifixer_exec.backends.kubernetes.names import Names
from cifixer_exec.backends.kubernetes.stream import exec_in
from cifixer_exec.backends.kubernetes.upload import open_channel
from cifixer_exec.backends.kubernetes.verdicts import is_running
from tests.support.kubernetes_cluster import is_real, stand_in

_GONE_S = 20.0


def cluster_of(config: AppConfig) -> Cluster:
    """A way to the cluster of our own, so that no breaker of a backend learns from it."""
    address = Address(kubeconfig=config.kubernetes_kubeconfig, context=config.kubernetes_context, namespace=config.kubernetes_namespace)
    return Cluster(address)


def names_of(config: AppConfig) -> Names:
    return Names(f"{config.namespace}/direct" if config.dispatch == "direct" else config.namespace)


def pod_of(config: AppConfig, sandbox_id: str) -> dict[str, Any]:
    """The Pod of a sandbox."""
    cluster = cluster_of(config)
    path = cluster.path("pods")
    (page,) = cluster.pages(path, "looking", selector=names_of(config).selector(sandbox_id))
    return next(pod for pod in page if not pod["metadata"].get("deletionTimestamp"))


def end_first_process(config: AppConfig, sandbox_id: str) -> None:
    """The container's PID 1, which is the runner, ends; the kernel ends the rest. No other signal reaches it but from its node."""
    pod = str(pod_of(config, sandbox_id)["metadata"]["name"])

    async def stop() -> None:
        if not config.kubernetes_runner_image:  # nobody may have put it in yet
            (await open_channel(cluster_of(config), pod)).close()
        transport = await exec_in(cluster_of(config), pod=pod, container=CONTAINER, command=STOP)
        try:
            while await transport.receive():
                pass
        except ConnectionError:
            pass  # the exec dies with the container
        finally:
            transport.close()

    asyncio.run(stop())


def stop_first_process(config: AppConfig, sandbox_id: str) -> None:
    """It stands still until :func:`continue_first_process`. Skips on a real cluster, where only the node could do that."""
    if is_real():
        pytest.skip("only a node can stop a Pod's first process")
    _signal(config, sandbox_id, signal.SIGSTOP)


def continue_first_process(config: AppConfig, sandbox_id: str) -> None:
    _signal(config, sandbox_id, signal.SIGCONT)


def _signal(config: AppConfig, sandbox_id: str, number: signal.Signals) -> None:
    pod = pod_of(config, sandbox_id)["metadata"]
    stand_in().order("kill", namespace=pod["namespace"], pod=pod["name"], container=CONTAINER, number=int(number))


def disrupt(config: AppConfig, sandbox_id: str, *, what: str) -> None:
    """What a node or the scheduler does, as the stand-in names it. Skips on a real cluster, which does it when it wants to."""
    if is_real():
        pytest.skip("only the cluster itself does that")
    pod = pod_of(config, sandbox_id)["metadata"]
    container = {"container": CONTAINER} if what == "kill" else {}
    stand_in().order(what, namespace=pod["namespace"], pod=pod["name"], **container)
    if what != "lose_node":  # whose Pod is said to run for ever
        wait_ended(config, sandbox_id)


def delete_job(config: AppConfig, sandbox_id: str, *, propagation: str = "Background") -> None:
    """As ``kubectl delete job`` does it; with its Pod, until that has ended."""
    cluster, job = cluster_of(config), names_of(config).job(sandbox_id)
    cluster.delete(cluster.path("jobs", job), "deleting", {"propagationPolicy": propagation})
    if propagation == "Background":
        wait_ended(config, sandbox_id)


def wait_ended(config: AppConfig, sandbox_id: str) -> None:
    """Until nothing of it runs any more, by its status: before, it works on, and says so."""
    cluster = cluster_of(config)
    path, give_up = cluster.path("pods"), time.monotonic() + _GONE_S
    while time.monotonic() < give_up:
        pages = cluster.pages(path, "looking", selector=names_of(config).selector(sandbox_id))
        if not any(is_running(pod) for page in pages for pod in page):
            return
        time.sleep(0.05)


def delete_pod(config: AppConfig, sandbox_id: str, *, grace_s: int = 1) -> None:
    """As ``kubectl delete pod`` does it, until it has ended."""
    cluster, pod = cluster_of(config), pod_of(config, sandbox_id)["metadata"]["name"]
    cluster.delete(cluster.path("pods", pod), "deleting", {"gracePeriodSeconds": grace_s})
    wait_ended(config, sandbox_id)
