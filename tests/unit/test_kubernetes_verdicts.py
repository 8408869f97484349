"""What Pods and Jobs, as the API shows them, say about a start and about a death."""

from __future__ import annotations

from typing import Any

import pytest

from cifixer_exec.backends.kubernetes.death import DELETED, inspected
from cifixer_exec.backends.kubernetes.verdicts import Verdict, verdict, verdict_of_events
from cifixer_exec.model import Inspection

Json = dict[str, Any]
CREATING = {"waiting": {"reason": "ContainerCreating"}}
RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


def pod(*, sandbox: Json | None = None, init: Json | None = None, going: bool = False, **status: Any) -> Json:
    """``sandbox``, ``init``: states of these containers."""
    metadata: Json = {"name": "p", "uid": "u", **({"deletionTimestamp": "2026-01-01T00:00:00Z"} if going else {})}
    statuses: Json = {}
    if sandbox is not None:
        statuses["containerStatuses"] = [{"name": "sandbox", "state": sandbox, "ready": "running" in sandbox, "restartCount": 0}]
    if init is not None:
        statuses["initContainerStatuses"] = [{"name": "runner", "state": init, "ready": False, "restartCount": 0}]
    return {"metadata": metadata, "spec": {}, "status": {"phase": "Pending", **statuses, **status}}


def waiting(reason: str, message: str = "") -> Json:
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def ended(code: int, reason: str = "Error", message: str = "") -> Json:
    return {"terminated": {"exitCode": code, "reason": reason, **({"message": message} if message else {})}}


def condition(kind: str, status: str, reason: str, message: str = "") -> Json:
    return {"type": kind, "status": status, "reason": reason, "message": message}


NO_ROOM = condition("PodScheduled", "False", "Unschedulable", "0/3 nodes are available: 3 Insufficient cpu.")
PREEMPTED = condition(
    "DisruptionTarget", "True", "PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod"
)
EVICTED = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 90Mi."

NOT_KNOWN_YET: dict[str, Json] = {
    "no status": {"metadata": {"uid": "u"}},
    "not scheduled yet": pod(),
    "the container is being created": pod(sandbox=CREATING),
    "the init container runs": pod(init=RUNNING, sandbox=waiting("PodInitializing")),
    "the init container is done": pod(init=ended(0, "Completed"), sandbox=waiting("PodInitializing")),
    "gated": pod(conditions=[condition("PodScheduled", "False", "SchedulingGated", "Scheduling is blocked")]),
    "a disruption that was called off": pod(sandbox=CREATING, conditions=[{**PREEMPTED, "status": "False"}]),
}


@pytest.mark.parametrize("what", NOT_KNOWN_YET)
def test_what_only_takes_its_time_is_no_verdict(what: str) -> None:
    assert verdict(NOT_KNOWN_YET[what]) == Verdict()


RUNS: dict[str, Json] = {
    "alone": pod(sandbox=RUNNING, phase="Running"),
    "behind its init container": pod(init=ended(0, "Completed"), sandbox=RUNNING, phase="Running"),
    "beside another that is still created": {
        **pod(phase="Pending"),
        "status": {"phase": "Pending", "containerStatuses": [{"name": "proxy", "state": CREATING}, {"name": "sandbox", "state": RUNNING}]},
    },
}


@pytest.mark.parametrize("what", RUNS)
def test_it_runs_when_its_own_container_does(what: str) -> None:
    assert verdict(RUNS[what]) == Verdict(running=True)


def test_that_another_container_runs_says_nothing() -> None:
    found = pod(phase="Pending")
    found["status"]["containerStatuses"] = [{"name": "proxy", "state": RUNNING}, {"name": "sandbox", "state": CREATING}]
    assert verdict(found) == Verdict()


#: (the Pod, what is said, whether the remedy names a way)
FINAL: dict[str, tuple[Json, str, bool]] = {
    "image name": (
        pod(sandbox=waiting("InvalidImageName", 'Failed to apply default image tag "UP"')),
        "InvalidImageName: Failed to apply",
        True,
    ),
    "never pulled": (
        pod(sandbox=waiting("ErrImageNeverPull", "not present with pull policy of Never")),
        "ErrImageNeverPull: not present",
        True,
    ),
    "configuration": (pod(sandbox=waiting("CreateContainerConfigError", 'secret "s" not found')), 'secret "s" not found', True),
    "creation": (pod(sandbox=waiting("CreateContainerError", "context deadline exceeded")), "CreateContainerError", True),
    "run": (pod(sandbox=waiting("RunContainerError", "no such file")), "RunContainerError: no such file", True),
    "signature": (pod(sandbox=waiting("SignatureValidationFailed")), "SignatureValidationFailed", True),
    "no such image": (pod(sandbox=waiting("ErrImagePull", "manifest unknown")), "ErrImagePull: manifest unknown", True),
    "no right to the image": (pod(sandbox=waiting("ImagePullBackOff", 'Back-off: "401 Unauthorized"')), "401 Unauthorized", True),
    "of the init container": (pod(init=waiting("InvalidImageName", "x"), sandbox=waiting("PodInitializing")), "InvalidImageName: x", True),
    "the init container failed": (pod(init=ended(1, message="no space left")), "container 'runner' ended: Error: no space left", False),
    "not started": (pod(sandbox=ended(128, "StartError", 'exec: "/bin/sh": no such file'), phase="Failed"), "StartError: exec", False),
    "ended at once": (pod(sandbox=ended(127), phase="Failed"), "container 'sandbox' ended: Error: exit code 127", False),
    "ended well": (pod(sandbox=ended(0, "Completed"), phase="Succeeded"), "Completed: exit code 0", False),
    "out of memory": (pod(sandbox=ended(137, "OOMKilled"), phase="Failed"), "OOMKilled", False),
    "out of memory with code 0": (pod(sandbox=ended(0, "OOMKilled"), phase="Failed"), "OOMKilled", False),
    "deadline": (pod(phase="Failed", reason="DeadlineExceeded", message="was active too long"), "DeadlineExceeded: was active", False),
    "failed without a word": (pod(phase="Failed"), "Failed", False),
}


@pytest.mark.parametrize("what", FINAL)
def test_what_never_runs_is_said_at_once_and_not_tried_again(what: str) -> None:
    found, said, has_remedy = FINAL[what]
    told = verdict(found)
    assert (told.final, told.passing, told.soon, told.running) == (True, False, False, False)
    assert said in told.why
    assert bool(told.remedy) is has_remedy


PASSING: dict[str, tuple[Json, str]] = {
    "preempted": (pod(sandbox=CREATING, conditions=[PREEMPTED]), "PreemptionByScheduler: default-scheduler"),
    "evicted by the node": (pod(phase="Failed", reason="Evicted", message=EVICTED), f"Evicted: {EVICTED}"),
    "evicted while it ran": (
        pod(sandbox=RUNNING, going=True, conditions=[{**PREEMPTED, "reason": "EvictionByEvictionAPI"}]),
        "EvictionByEviction",
    ),
    "refused by the node": (pod(phase="Failed", reason="OutOfpods", message="Node didn't have enough resource: pods"), "OutOfpods: Node"),
    "no device": (pod(phase="Failed", reason="UnexpectedAdmissionError", message="Allocate failed"), "Allocate failed"),
    "node shut down": (pod(phase="Failed", reason="Terminated", message="imminent node shutdown"), "imminent node shutdown"),
    "deleted": (pod(sandbox=CREATING, going=True), "its Pod is being deleted"),
}


@pytest.mark.parametrize("what", PASSING)
def test_what_the_cluster_itself_ended_is_worth_another_try(what: str) -> None:
    found, said = PASSING[what]
    told = verdict(found)
    assert (told.final, told.passing, told.running) == (True, True, False)
    assert said in told.why


def event(reason: str, message: str) -> Json:
    return {"reason": reason, "type": "Warning", "message": message}


PULLED = event("Failed", 'Failed to pull image "x": rpc error: not found')
TOLD: dict[str, tuple[list[Json], str, bool]] = {
    "nothing": ([], "", False),
    "what is normal": ([event("Pulling", "Pulling image"), event("Created", "Created container runner")], "", False),
    "a name that is none": (
        [event("InspectFailed", "Failed to apply default image tag: couldn't parse image name")],
        "InvalidImageName: F",
        True,
    ),
    "an image that cannot be looked at": ([event("InspectFailed", "Failed to inspect image: timeout")], "ImageInspectError: Failed", False),
    "an image that is nowhere": ([PULLED, event("Failed", "Error: ErrImagePull")], "ErrImagePull: Failed to pull image", True),
    "what is tried again": ([PULLED, event("Pulling", "Pulling image")], "", False),
    "a registry that does not answer": ([event("Failed", 'Failed to pull image "x": i/o timeout')], "ErrImagePull: Failed to pull", False),
    "an image that may not be pulled": (
        [event("ErrImageNeverPull", "not present with pull policy of Never")],
        "ErrImageNeverPull: not",
        True,
    ),
    "another failure": ([event("Failed", "Error: cannot be made"), event("FailedMount", "no volume")], "", False),
}


@pytest.mark.parametrize("what", TOLD)
def test_events_tell_of_images(what: str) -> None:
    events, said, final = TOLD[what]
    told = verdict_of_events(events)
    assert told.why.startswith(said)
    assert bool(told.why) is bool(said)
    assert told.final is final


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError"])
def test_a_pull_that_the_registry_did_not_refuse_has_a_moment(reason: str) -> None:
    told = verdict(pod(sandbox=waiting(reason, "dial tcp: i/o timeout")))
    assert (told.soon, told.final, told.why) == (True, False, f"{reason}: dial tcp: i/o timeout")
    assert told.remedy


def test_no_room_is_told_in_the_schedulers_words_and_may_still_come() -> None:
    told = verdict(pod(conditions=[NO_ROOM]))
    assert (told.final, told.soon, told.running) == (False, False, False)
    assert told.why == "Unschedulable: 0/3 nodes are available: 3 Insufficient cpu."
    assert "CIFIXER_KUBERNETES_CPU_REQUEST" in told.remedy


def job(*conditions: Json, going: bool = False) -> Json:
    return {"metadata": {"uid": "j", **({"deletionTimestamp": "now"} if going else {})}, "status": {"conditions": list(conditions)}}


LATE = condition("Failed", "True", "DeadlineExceeded", "Job was active longer than specified deadline")
ALIVE = job()
KILLED = pod(sandbox=ended(137), phase="Failed")


def test_it_lives_while_its_container_runs_and_nobody_ends_it() -> None:
    assert inspected(ALIVE, pod(sandbox=RUNNING, phase="Running")) == Inspection(alive=True)
    assert inspected(ALIVE, pod(sandbox=RUNNING, phase="Running", conditions=[condition("Ready", "True", "")])) == Inspection(alive=True)


def test_an_orphan_lives_without_its_job() -> None:
    assert inspected(None, pod(sandbox=RUNNING, phase="Running")) == Inspection(alive=True)


#: As the node controller leaves it: only what it may say itself has changed.
NODE_LOST = [condition("Ready", "False", ""), condition("ContainersReady", "True", "")]


def test_a_node_that_is_silent_for_a_while_is_no_death() -> None:
    """It may come back; if not, the cluster deletes the Pod."""
    assert inspected(ALIVE, pod(sandbox=RUNNING, phase="Running", conditions=NODE_LOST)) == Inspection(alive=True)


DEATHS: dict[str, tuple[Json | None, Json | None, str]] = {
    "out of memory": (ALIVE, pod(sandbox=ended(137, "OOMKilled"), phase="Failed"), "out of memory"),
    "out of memory with code 0": (ALIVE, pod(sandbox=ended(0, "OOMKilled"), phase="Succeeded"), "out of memory"),
    "evicted by its node": (ALIVE, pod(phase="Failed", reason="Evicted", message=EVICTED), f"its Pod was evicted: {EVICTED}"),
    "evicted, and no more is said": (ALIVE, pod(phase="Failed", reason="Evicted"), "its Pod was evicted: the node had too little"),
    "preempted": (
        ALIVE,
        pod(sandbox=ended(137), phase="Failed", conditions=[PREEMPTED]),
        "preempted by one of a higher priority: default-sch",
    ),
    "drained": (
        ALIVE,
        pod(
            sandbox=RUNNING,
            going=True,
            conditions=[condition("DisruptionTarget", "True", "EvictionByEvictionAPI", "Eviction API: evicting")],
        ),
        "evicted by way of the API, as when a node is drained: Eviction API: evicting",
    ),
    "tainted": (
        ALIVE,
        pod(going=True, conditions=[condition("DisruptionTarget", "True", "DeletionByTaintManager")]),
        "its node was lost or taint",
    ),
    "node gone": (ALIVE, pod(phase="Failed", conditions=[condition("DisruptionTarget", "True", "DeletionByPodGC")]), "its node is gone"),
    "node shut down": (
        ALIVE,
        pod(phase="Failed", conditions=[condition("DisruptionTarget", "True", "TerminationByKubelet")]),
        "by its node",
    ),
    "a disruption of tomorrow": (
        ALIVE,
        pod(going=True, conditions=[condition("DisruptionTarget", "True", "ByMoon", "full")]),
        "ByMoon: full",
    ),
    "node lost": (ALIVE, pod(sandbox=RUNNING, phase="Running", going=True, conditions=NODE_LOST), "its node is lost"),
    "node lost, by the Pod": (ALIVE, pod(sandbox=RUNNING, going=True, reason="NodeLost"), "its node is lost"),
    "node restarted": (
        ALIVE,
        pod(sandbox=ended(137, "ContainerStatusUnknown"), phase="Failed"),
        "its node does not know its container any more",
    ),
    "lifetime, by the runner": (ALIVE, pod(sandbox=ended(3), phase="Failed"), "its lifetime ended"),
    "lifetime, by the node": (ALIVE, pod(phase="Failed", reason="DeadlineExceeded"), "its lifetime ended"),
    "lifetime, by the Job": (job(LATE), KILLED, "its lifetime ended"),
    "lifetime, and the Pod is gone": (job({**LATE, "type": "FailureTarget"}), None, "its lifetime ended"),
    "crashed": (ALIVE, pod(sandbox=ended(2, message="panic: x"), phase="Failed"), "its container ended with exit code 2: panic: x"),
    "the Job was deleted": (None, None, DELETED),
    "the Job is being deleted": (job(going=True), pod(sandbox=RUNNING, going=True), DELETED),
    "the Job was deleted and the runner told to stop": (None, pod(sandbox=ended(4), going=True), DELETED),
}


@pytest.mark.parametrize("how", DEATHS)
def test_each_cause_of_death_is_told_apart(how: str) -> None:
    found_job, found_pod, cause = DEATHS[how]
    found = inspected(found_job, found_pod)
    assert found is not None
    assert not found.alive
    assert cause in found.cause


#: Only events, or the order of things, tell these.
UNTOLD: dict[str, tuple[Json, Json | None]] = {
    "killed": (ALIVE, KILLED),
    "the Pod is gone": (ALIVE, None),
    "the Pod is being deleted": (ALIVE, pod(sandbox=RUNNING, going=True)),
    "the Pod was told to stop": (ALIVE, pod(sandbox=ended(4), going=True)),
    "the Job failed with it": (job(condition("Failed", "True", "BackoffLimitExceeded")), KILLED),
}


@pytest.mark.parametrize("how", UNTOLD)
def test_what_the_objects_do_not_tell_is_left_to_the_events(how: str) -> None:
    assert inspected(*UNTOLD[how]) is None
