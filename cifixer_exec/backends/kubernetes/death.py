"""Whether a sandbox lives, and why not: as its Pod, its Job and their events tell."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.objects import conditions_of, failure, is_going, status_of, true_conditions
from cifixer_exec.backends.kubernetes.verdicts import disruption, is_running, terminated
from cifixer_exec.errors import ExecutorError
from cifixer_exec.model import Inspection

DELETED = "its Job was deleted"
_EXPIRED_TEXT = "its lifetime ended"
#: Exit codes of the runner: its lifetime ended, it was told to stop; and of what was killed.
_EXPIRED, _STOPPED, _KILLED = 3, 4, 137
#: What is said of DisruptionTarget conditions; others are given as they are.
_DISRUPTIONS = {
    "PreemptionByScheduler": "its Pod was preempted by one of a higher priority",
    "DeletionByTaintManager": "its node was lost or tainted, and its Pod removed from there",
    "DeletionByPodGC": "its node is gone",
    "EvictionByEvictionAPI": "its Pod was evicted by way of the API, as when a node is drained",
    "TerminationByKubelet": "its Pod was ended by its node",
}
#: The same from events, when the Pod is gone altogether.
_EVENTS = {
    "Preempted": _DISRUPTIONS["PreemptionByScheduler"],
    "TaintManagerEviction": _DISRUPTIONS["DeletionByTaintManager"],
    "NodeNotReady": "its node is lost",
    "Evicted": "its Pod was evicted",
}


def inspected(job: Mapping[str, Any] | None, pod: Mapping[str, Any] | None) -> Inspection | None:
    """What the two objects tell; None where only events could."""
    if pod is not None and is_running(pod) and not is_going(pod):
        return Inspection(alive=True)
    cause = _of_pod(pod) or _of_job(job)
    return Inspection(alive=False, cause=cause) if cause else None


def _of_pod(pod: Mapping[str, Any] | None) -> str:
    if pod is None:
        return ""
    status = status_of(pod)
    if status.get("reason") == "DeadlineExceeded":
        return _EXPIRED_TEXT
    if status.get("reason") == "Evicted":
        return f"its Pod was evicted: {status.get('message') or 'the node had too little of something'}"
    if target := disruption(pod):
        said = _DISRUPTIONS.get(str(target.get("reason")), f"its Pod was disrupted: {target.get('reason')}")
        return f"{said}: {target['message']}" if target.get("message") else said
    if status.get("reason") == "NodeLost" or is_node_lost(pod):
        return "its node is lost"
    return _of_container(terminated(pod))


def _of_container(ended: Mapping[str, Any]) -> str:
    if not ended:
        return ""
    if ended.get("reason") == "OOMKilled":
        return "out of memory: the kernel killed its container"
    if ended.get("reason") == "ContainerStatusUnknown":
        return "its node does not know its container any more, as after a restart of the node"
    code = ended.get("exitCode")
    if code == _EXPIRED:
        return _EXPIRED_TEXT
    if code in (_STOPPED, _KILLED):
        return ""  # who did it, the Job may know
    said = str(ended.get("message") or ended.get("reason") or "")
    return f"its container ended with exit code {code}" + (f": {said}" if said else "")


def is_node_lost(pod: Mapping[str, Any]) -> bool:
    """The node does not report any more: its controller has marked the Pod, and left what the node last said of the containers.

    https://kubernetes.io/docs/concepts/architecture/nodes/#node-controller. It may come back; when it does not, the Pod is deleted.
    """
    ready = conditions_of(pod).get("Ready", {})
    return ready.get("status") == "False" and "ContainersReady" in true_conditions(pod)


def _of_job(job: Mapping[str, Any] | None) -> str:
    if job is None or is_going(job):
        return DELETED
    return _EXPIRED_TEXT if failure(job).get("reason") == "DeadlineExceeded" else ""


def last_words(cluster: Cluster, pod: str, container: str) -> str:
    """The end of what a container wrote, which is why it ended; empty when that cannot be had."""
    with suppress(ExecutorError):
        return cluster.text(
            cluster.path("pods", pod, "log"), "reading a log", container=container, tailLines="5", limitBytes="2000"
        ).strip()
    return ""


def from_events(cluster: Cluster, pod_uid: str, pod: Mapping[str, Any] | None) -> str:
    """The cause, when the objects did not tell it."""
    with suppress(ExecutorError):
        events = cluster.events(pod_uid, "looking for the cause of death") if pod_uid else []
        reasons = {str(e.get("reason")): str(e.get("message") or "") for e in events}
        for reason, said in _EVENTS.items():
            if reason in reasons:
                return f"{said}: {reasons[reason]}" if reasons[reason] else said
    return "its Pod was deleted" if pod is None or is_going(pod) else "its container was killed from outside"
