"""What a Pod's status says about its start: it runs, it never will, or it is not known yet. Nothing here asks a cluster.

Phases tell too little (https://github.com/kubernetes/kubernetes/issues/96186); the reasons of waiting and ended containers, and the
conditions, tell it. Reasons: kubernetes/pkg/kubelet/images/types.go, pkg/kubelet/container/sync_result.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cifixer_exec.backends.kubernetes.job import CONTAINER
from cifixer_exec.backends.kubernetes.objects import conditions_of, is_going, status_of, true_conditions

#: No waiting helps.
_FATAL = {
    "InvalidImageName": "correct the name of the image",
    "ErrImageNeverPull": "load the image onto the node, or let the template's imagePullPolicy be IfNotPresent",
    "CreateContainerConfigError": "see the Pod's events; often a Secret, a ConfigMap or a user id that the image needs is missing",
    "CreateContainerError": "see the Pod's events",
    "RunContainerError": "see the Pod's events; often the image has not the program that is started",
    "SignatureValidationFailed": "sign the image as the cluster's policy wants it",
}
#: They may mend themselves within a moment, and mostly do not.
_MAY_PASS = {
    "ErrImagePull": "check the image's name and tag, and the pull secret (imagePullSecrets in CIFIXER_KUBERNETES_POD_TEMPLATE)",
    "ImagePullBackOff": "check the image's name and tag, and the pull secret (imagePullSecrets in CIFIXER_KUBERNETES_POD_TEMPLATE)",
    "ImageInspectError": "check the node's container runtime",
    "RegistryUnavailable": "check that the node reaches the registry",
}
#: The node has refused or ended the Pod for reasons of its own; another node, or the same one later, may take the next
#: (kubernetes/pkg/kubelet/lifecycle/predicate.go, pkg/kubelet/nodeshutdown). ``OutOfcpu`` and the like are there for each resource.
_REFUSED_BY_NODE = ("OutOf", "UnexpectedAdmissionError", "NodeAffinity", "NodeShutdown", "Terminated")
#: A registry has said so: no second try will give it.
_REFUSED = ("not found", "unauthorized", "denied", "authorization failed", "manifest unknown", "does not exist", "invalid reference format")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``running``; or why not: ``why`` with its ``remedy``. ``final``: it never will; ``passing``: another try may fare better;
    ``soon``: it will not, unless it mends itself within a moment."""

    running: bool = False
    final: bool = False
    passing: bool = False
    soon: bool = False
    #: The container that has ended; it may have said why.
    ended: str = ""
    why: str = ""
    remedy: str = ""


def verdict(pod: Mapping[str, Any]) -> Verdict:
    """Of a Pod as the API server shows it."""
    status = status_of(pod)
    if ended := _ended(pod, status):
        return ended
    for container in _containers(status):
        waiting = container["state"].get("waiting") or {}
        if told := _waiting(str(waiting.get("reason") or ""), str(waiting.get("message") or "")):
            return told
    if is_running(pod):
        return Verdict(running=True)
    return _unscheduled(pod) or Verdict()


def verdict_of_events(events: Iterable[Mapping[str, Any]]) -> Verdict:
    """Of a Pod's events, the oldest first: behind an init container they tell of an image up to 15 s before the status does, which a
    kubelet writes down when it looks at the Pod again (reasons: kubernetes/pkg/kubelet/events/event.go)."""
    found = Verdict()
    for event in events:
        reason, said = str(event.get("reason") or ""), str(event.get("message") or "")
        if reason == "Failed" and said.startswith("Failed to pull image"):
            reason = "ErrImagePull"
        elif reason == "InspectFailed":
            reason = "InvalidImageName" if "couldn't parse image name" in said else "ImageInspectError"
        elif reason in ("Pulling", "Pulled"):
            found = Verdict()  # what went wrong before is tried again
            continue
        elif reason != "ErrImageNeverPull":
            continue
        found = _waiting(reason, said) or found
    return found


def is_running(pod: Mapping[str, Any]) -> bool:
    """Whether the sandbox's own container runs."""
    return "running" in _state(pod)


def terminated(pod: Mapping[str, Any]) -> dict[str, Any]:
    """How the sandbox's container ended; empty while it has not."""
    return dict(_state(pod).get("terminated") or {})


def _state(pod: Mapping[str, Any]) -> dict[str, Any]:
    """Of the sandbox's own container."""
    containers = status_of(pod).get("containerStatuses") or []
    return next((c.get("state") or {} for c in containers if c["name"] == CONTAINER), {})


def disruption(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The condition that says who ended the Pod, if it was none of its containers.

    https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions
    """
    return true_conditions(pod).get("DisruptionTarget", {})


def _waiting(reason: str, said: str) -> Verdict | None:
    """Of a container that is not there yet; None where it is only a matter of time."""
    if reason in _FATAL:
        return Verdict(final=True, why=_told(reason, said), remedy=_FATAL[reason])
    if reason in _MAY_PASS:
        refused = any(sign in said.lower() for sign in _REFUSED)
        return Verdict(final=refused, soon=not refused, why=_told(reason, said), remedy=_MAY_PASS[reason])
    return None


def _ended(pod: Mapping[str, Any], status: Mapping[str, Any]) -> Verdict | None:
    if target := disruption(pod):
        return Verdict(final=True, passing=True, why=_told(str(target.get("reason")), str(target.get("message") or "")))
    if status.get("reason") == "Evicted":
        return Verdict(final=True, passing=True, why=_told("Evicted", str(status.get("message") or "")))
    for container in _containers(status):
        state = container["state"].get("terminated")
        if state and (state.get("exitCode") != 0 or container["name"] == CONTAINER):
            words = str(state.get("message") or f"exit code {state.get('exitCode')}")
            told = _told(str(state.get("reason") or "Error"), words)
            return Verdict(final=True, ended=container["name"], why=f"container {container['name']!r} ended: {told}")
    if status.get("phase") in ("Failed", "Succeeded"):
        reason = str(status.get("reason") or status["phase"])
        return Verdict(final=True, passing=reason.startswith(_REFUSED_BY_NODE), why=_told(reason, str(status.get("message") or "")))
    if is_going(pod):
        return Verdict(final=True, passing=True, why="its Pod is being deleted")
    return None


def _unscheduled(pod: Mapping[str, Any]) -> Verdict | None:
    """Why it has no node; an autoscaler may be about to bring one."""
    scheduled = conditions_of(pod).get("PodScheduled", {})
    if (scheduled.get("status"), scheduled.get("reason")) != ("False", "Unschedulable"):
        return None
    return Verdict(
        why=_told("Unschedulable", str(scheduled.get("message") or "")),
        remedy="add room to the cluster, or lower CIFIXER_KUBERNETES_CPU_REQUEST and CIFIXER_KUBERNETES_MEMORY_REQUEST",
    )


def _containers(status: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        yield {"name": container.get("name"), "state": container.get("state") or {}}


def _told(reason: str, message: str) -> str:
    return f"{reason}: {message.strip()}" if message else reason
