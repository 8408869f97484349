"""All of one cluster in one process: store, controllers, kubelet, users, faults."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.kubernetes.authorization import Users
from tests.support.kubernetes.collector import Collector
from tests.support.kubernetes.faults import Faults
from tests.support.kubernetes.jobs import JobController
from tests.support.kubernetes.kinds import ACCOUNTS, CLAIMS, JOBS, NAMESPACES, NODES, PODS, QUOTAS
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.kubelet import Kubelet
from tests.support.kubernetes.recorder import Recorder
from tests.support.kubernetes.runtime import Runtime
from tests.support.kubernetes.scheduler import NODE, Scheduler
from tests.support.kubernetes.store import Store

Json = dict[str, Any]


class Cluster:
    """To be made on the event loop that it lives on. ``requests`` leads to the launcher."""

    def __init__(self, directory: Path, requests: socket.socket, *, one_user: bool) -> None:
        self._directory = directory
        self.knobs = Knobs()
        self.faults = Faults()
        self.users = Users()
        self.store = Store(lambda: datetime.now(UTC))
        self.recorder = Recorder(self.store)
        self.runtime = Runtime(requests, self.knobs, name=f"stand-in-{directory.name}", one_user=one_user)
        self.jobs = JobController(self.store, self.recorder, self.knobs)
        self.collector = Collector(self.store, self.knobs)
        self.scheduler = Scheduler(self.store, self.recorder, self.knobs)
        self.kubelet = Kubelet(self.store, self.recorder, self.runtime, self.knobs, directory, set_group=not one_user)
        self.store.create(NODES, {"metadata": {"name": NODE, "labels": self.knobs.node_labels}, "status": {}})

    def add_namespace(self, name: str, labels: dict[str, str], accounts: list[str]) -> None:
        """With its ``default`` service account and ``accounts``."""
        self.store.create(NAMESPACES, {"metadata": {"name": name, "labels": labels}, "status": {"phase": "Active"}})
        for account in dict.fromkeys(["default", *accounts]):
            self.store.create(ACCOUNTS, {"metadata": {"name": account, "namespace": name}})

    def add_claim(self, namespace: str, name: str) -> None:
        """A PersistentVolumeClaim, bound."""
        spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        self.store.create(CLAIMS, {"metadata": {"name": name, "namespace": namespace}, "spec": spec, "status": {"phase": "Bound"}})

    def set_quota(self, namespace: str, hard: dict[str, str]) -> None:
        """Named ``sandboxes``; the one before is replaced; an empty one is none."""
        self.store.remove(QUOTAS, namespace, "sandboxes")
        if hard:
            self.store.create(QUOTAS, {"metadata": {"name": "sandboxes", "namespace": namespace}, "spec": {"hard": hard}})

    def left(self) -> dict[str, list[str]]:
        """What there still is of Jobs and Pods, and of their processes, mounts and control groups."""
        names = {k.resource: [f"{i['metadata']['namespace']}/{i['metadata']['name']}" for i in self.store.all(k)] for k in (JOBS, PODS)}
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        mounts = [point for point in points if point.startswith(f"{self._directory}/")]
        processes = [str(pid) for pid in self.runtime.processes()]
        return {**names, "workers": self.kubelet.pods, "processes": processes, "mounts": mounts, "groups": self.runtime.groups()}
