"""What a test can order from a running cluster, over HTTP on a Unix socket: ``POST /<verb>`` with its arguments as JSON."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

from tests.support.kubernetes import objects
from tests.support.kubernetes.authorization import Grant
from tests.support.kubernetes.cluster import Cluster
from tests.support.kubernetes.deletion import delete
from tests.support.kubernetes.kinds import JOBS, PODS, kind_of
from tests.support.kubernetes.pod_worker import PodWorker
from tests.support.kubernetes.problems import ApiError
from tests.support.kubernetes.server import ApiServer
from tests.support.kubernetes.store import stamp
from tests.support.verbs import Verbs

if TYPE_CHECKING:
    from tests.support.kubernetes.process import Listener

Json = dict[str, Any]


class Control(Verbs):
    """Each public method is a verb."""

    refusals = (ApiError,)

    def __init__(self, cluster: Cluster, server: ApiServer, listener: Listener) -> None:
        self._cluster = cluster
        self._server = server
        self._listener = listener

    def add_namespace(self, name: str, labels: dict[str, str], accounts: list[str]) -> None:
        """See Cluster."""
        self._cluster.add_namespace(name, labels, accounts)

    def add_claim(self, namespace: str, name: str) -> None:
        """See Cluster."""
        self._cluster.add_claim(namespace, name)

    def set_quota(self, namespace: str, hard: dict[str, str]) -> None:
        """See Cluster."""
        self._cluster.set_quota(namespace, hard)

    def add_user(self, name: str, is_admin: bool, grants: list[Json]) -> str:
        """Returns the token."""
        return self._cluster.users.add(name, is_admin=is_admin, grants=[Grant(g["namespace"], g["rules"]) for g in grants]).token

    def rotate_token(self, name: str) -> str:
        """The old one is expired; returns the new one."""
        return self._cluster.users.rotate(name)

    def set(self, **knobs: Any) -> None:
        """Knobs, by name."""
        self._cluster.knobs.set(**knobs)

    def fault(self, **order: Any) -> None:
        """See Faults.order."""
        self._cluster.faults.order(**order)

    def clear_faults(self) -> None:
        """Those that have not been met."""
        self._cluster.faults.clear()

    def asked(self) -> Json:
        """Requests by verb and resource, those for what is not here, and the faults that were met."""
        return {"requests": dict(self._server.requests), "unknown": self._server.unknown, "faults": dict(self._cluster.faults.met)}

    def cut_execs(self, pod: str = "") -> int:
        """See ApiServer."""
        return self._server.cut_execs(pod)

    def cut_next_exec(self, after_frames: int) -> None:
        """The next one is cut when it has taken so many stdin frames."""
        self._server.cut_after_frames = after_frames

    def drop_watches(self) -> int:
        """See ApiServer."""
        return self._server.drop_watches()

    def compact(self) -> None:
        """Watches and pages that go on from before are 410 Gone."""
        self._cluster.store.compact()

    def freeze(self) -> None:
        """Connections are accepted and nothing is answered."""
        self._server.freeze()

    def thaw(self) -> None:
        """It goes on where it was."""
        self._server.thaw()

    async def restart(self, down_s: float) -> None:
        """Every connection is cut; after ``down_s`` it is there again with all its objects."""
        await self._listener.close()
        await asyncio.sleep(down_s)
        await self._listener.open()

    async def stop_api(self) -> None:
        """Until :meth:`start_api`."""
        await self._listener.close()

    async def start_api(self) -> None:
        """On the same port."""
        await self._listener.open()

    def evict(self, namespace: str, pod: str) -> None:
        """By the kubelet, for want of memory."""
        message = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 42Mi. Container sandbox was using 1Gi, "
        message += "request is 512Mi, has larger consumption of memory. "
        condition = {"type": "DisruptionTarget", "reason": "TerminationByKubelet", "message": message}
        self._worker(namespace, pod).evict("Evicted", message, condition)

    def preempt(self, namespace: str, pod: str) -> None:
        """By the scheduler, for a Pod of a higher priority."""
        found = self._cluster.store.get(PODS, namespace, pod)
        message = "default-scheduler: preempting to accommodate a higher priority pod"
        self._disrupt(namespace, pod, "PreemptionByScheduler", message)
        words = "Preempted by pod 6b1f5c62-0000-4000-8000-000000000000 on node stand-in"
        self._cluster.recorder.tell(found, "Preempted", words, source="default-scheduler")
        delete(self._cluster.store, PODS, namespace, pod, {})

    def lose_node(self, namespace: str, pod: str) -> None:
        """The Pod's node does not answer any more; the taint manager deletes the Pod, which stays Terminating."""
        self._worker(namespace, pod).lose()

        def unknown(item: Json) -> None:
            for told in item["status"]["conditions"]:
                if told["type"] == "Ready":
                    told |= {"status": "False", "lastTransitionTime": stamp(self._cluster.store.now())}

        self._cluster.store.change(PODS, namespace, pod, unknown)
        found = self._cluster.store.get(PODS, namespace, pod)
        self._cluster.recorder.tell(found, "NodeNotReady", "Node is not ready", source="node-controller", warning=True)
        self._disrupt(namespace, pod, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
        delete(self._cluster.store, PODS, namespace, pod, {})

    def collect_lost(self, namespace: str, pod: str) -> None:
        """The pod garbage collector removes what was on a node that is gone."""
        item = self._cluster.store.change(PODS, namespace, pod, lambda p: p["status"].update(phase="Failed"))
        if item is not None:
            delete(self._cluster.store, PODS, namespace, pod, {"gracePeriodSeconds": 0})

    def kill(self, namespace: str, pod: str, container: str, number: int = signal.SIGKILL) -> None:
        """A signal to a container's PID 1, from the node."""
        process = self._worker(namespace, pod).container(container)
        if process is not None:
            self._cluster.runtime.kill(process, number)

    def pids(self, namespace: str, pod: str, container: str) -> int:
        """Of a container's PID 1, on the machine."""
        process = self._worker(namespace, pod).container(container)
        return 0 if process is None else process.pid

    def delete(self, resource: str, namespace: str, name: str, options: Json) -> None:
        """By somebody else."""
        kind = JOBS if resource == "jobs" else PODS
        delete(self._cluster.store, kind, namespace, name, options)

    def create(self, group: str, version: str, resource: str, namespace: str, item: Json) -> Json:
        """Any object that the server has, by an administrator."""
        kind = kind_of(group, version, resource)
        if kind is None:
            raise LookupError(resource)
        return objects.create(self._cluster.store, kind, namespace, item)

    def forge_jobs(self, namespace: str, count: int, labels: dict[str, str], annotations: dict[str, str], age_s: float) -> None:
        """Jobs without Pods that another controller manages, named forged-00000 and so on, created ``age_s`` ago."""
        store = self._cluster.store
        for number in range(count):
            name = f"forged-{number:05}"
            meta = {"name": name, "labels": labels, "annotations": annotations}
            container = {"name": "sandbox", "image": "busybox:1"}
            template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
            item = {"metadata": meta, "spec": {"managedBy": "example.com/nobody", "template": template}}
            made = objects.create(store, JOBS, namespace, item)
            made["metadata"]["creationTimestamp"] = stamp(_ago(store.now(), age_s))

    def left(self) -> dict[str, list[str]]:
        """See Cluster."""
        return self._cluster.left()

    def _worker(self, namespace: str, pod: str) -> PodWorker:
        worker = self._cluster.kubelet.worker(namespace, pod)
        if worker is None:
            raise LookupError(f"no Pod {namespace}/{pod} on the node")
        return worker

    def _disrupt(self, namespace: str, pod: str, reason: str, message: str) -> None:
        now = stamp(self._cluster.store.now())
        told = {"type": "DisruptionTarget", "status": "True", "lastProbeTime": None, "lastTransitionTime": now}
        told |= {"reason": reason, "message": message}
        self._cluster.store.change(PODS, namespace, pod, lambda p: p["status"].setdefault("conditions", []).append(told))


def _ago(now: Any, age_s: float) -> Any:
    from datetime import timedelta

    return now - timedelta(seconds=age_s)
