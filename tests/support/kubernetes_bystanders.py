"""Jobs of others beside ours, which nobody of us may touch: another installation's, and one that only looks like ours."""

from __future__ import annotations

from typing import Any

from cifixer_exec import AppConfig
from cifixer_exec.backends.kubernetes.names import APP, APP_VALUE, INSTANCE, SANDBOX, Names
from tests.support.kubernetes_pods import cluster_of, names_of


class Bystanders:
    """Made at once; suspended, so that they need no node."""

    def __init__(self, config: AppConfig) -> None:
        self._cluster = cluster_of(config)
        self._path = self._cluster.path("jobs")
        ours = names_of(config)
        theirs = Names(f"{config.namespace}-of-others")
        wanted = {
            f"others-{config.namespace}": theirs.labels("sandbox", "cluster"),
            # Labelled like ours, without what only we write.
            f"alike-{config.namespace}": {**ours.labels("sandbox", "cluster"), SANDBOX: "somebody-elses"},
            f"unlabelled-{config.namespace}": {APP: APP_VALUE, INSTANCE: ours.labels("sandbox", "cluster")[INSTANCE]},
        }
        self._uids = {name: self._make(name, labels) for name, labels in wanted.items()}

    def _make(self, name: str, labels: dict[str, str]) -> str:
        container: dict[str, Any] = {"name": "main", "image": "busybox:1"}
        template = {"metadata": {"labels": labels}, "spec": {"restartPolicy": "Never", "containers": [container]}}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": labels}}
        made = self._cluster.ask("POST", self._path, "making a bystander", body={**job, "spec": {"suspend": True, "template": template}})
        return str(made.document["metadata"]["uid"])

    def harmed(self) -> list[str]:
        """Those that are not as they were."""
        found = {name: self._cluster.get(f"{self._path}/{name}", "looking after a bystander") for name in self._uids}
        there = {name: answer.document["metadata"] for name, answer in found.items() if answer is not None}
        return [
            f"the Job {name} of somebody else was touched"
            for name, uid in self._uids.items()
            if name not in there or there[name]["uid"] != uid or there[name].get("deletionTimestamp")
        ]

    def remove(self) -> None:
        for name in self._uids:
            self._cluster.delete(f"{self._path}/{name}", "removing a bystander", {"propagationPolicy": "Background"})
