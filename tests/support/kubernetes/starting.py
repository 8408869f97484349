"""Execs for tests: one Pod with the real runner for a whole module."""

from __future__ import annotations

from typing import Any

from tests.support.kubernetes.rest_client import client, rest_client
from tests.support.kubernetes.samples import job
from tests.support.kubernetes.stand_in import StandIn
from tests.support.kubernetes.waiting import until

Json = dict[str, Any]
NS = "sandboxes"


def started(cluster: StandIn, name: str, spec: Json) -> str:
    """The name of a Job's Pod in the namespace ``sandboxes`` that runs or has ended."""
    cluster.order("create", group="batch", version="v1", resource="jobs", namespace=NS, item=job(name, spec))
    with rest_client(cluster.admin()) as api:

        def ready() -> str:
            pods = client.CoreV1Api(api).list_namespaced_pod(NS, label_selector=f"job-name={name}").items
            return next((str(pod.metadata.name) for pod in pods if pod.status.phase != "Pending"), "")

        return str(until(ready))
