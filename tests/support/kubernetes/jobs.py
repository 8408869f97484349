"""The Job controller. https://github.com/kubernetes/kubernetes/blob/master/pkg/controller/job/job_controller.go"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tests.support.kubernetes import objects
from tests.support.kubernetes.deletion import delete, let_go
from tests.support.kubernetes.kinds import JOBS, PODS
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.problems import ApiError
from tests.support.kubernetes.recorder import Recorder
from tests.support.kubernetes.store import Change, Store, moment_of, stamp

Json = dict[str, Any]
TRACKING = "batch.kubernetes.io/job-tracking"
_SOURCE = "job-controller"
_CONTROLLER = "kubernetes.io/job-controller"
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0
_POD_BACKOFF_S = 10.0
_DEADLINE = ("DeadlineExceeded", "Job was active longer than specified deadline")
_BACKOFF = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
_REACHED = ("CompletionsReached", "Reached expected number of succeeded pods")


def condition(item: Json, kind: str) -> Json | None:
    """A condition that is True."""
    found = item.get("status", {}).get("conditions") or []
    return next((c for c in found if c["type"] == kind and c["status"] == "True"), None)


def is_finished(job: Json) -> bool:
    """Complete or Failed."""
    return condition(job, "Complete") is not None or condition(job, "Failed") is not None


def owner_uid(item: Json) -> str:
    """Of the object that controls this one; "" for none."""
    owners = item["metadata"].get("ownerReferences") or []
    return next((o["uid"] for o in owners if o.get("controller")), "")


def _over(pod: Json) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def _failed(pod: Json, job: Json) -> bool:
    """A Pod that is deleted never gets there by itself: one that is pending has failed, and with the default policy any."""
    phase, deleted = pod["status"].get("phase"), pod["metadata"].get("deletionTimestamp") is not None
    if job["spec"]["podReplacementPolicy"] == "Failed":
        return phase == "Failed" or (deleted and phase == "Pending")
    return phase == "Failed" or (deleted and phase != "Succeeded")


class JobController:
    """Each change of a Job, or of a Pod of it (batched, as the real one does), leads to a look at the Job."""

    def __init__(self, store: Store, recorder: Recorder, knobs: Knobs) -> None:
        self._store = store
        self._recorder = recorder
        self._knobs = knobs
        self._timers: dict[tuple[str, str, str], asyncio.TimerHandle] = {}
        self._retries: dict[str, float] = {}
        store.listen(self._hear)

    def _hear(self, change: Change) -> None:
        metadata = change.item["metadata"]
        if change.kind is JOBS:
            if change.item["spec"].get("managedBy", _CONTROLLER) != _CONTROLLER:
                return
            if change.new is None:
                for pod in list(self._store.all(PODS, metadata["namespace"])):
                    if owner_uid(pod) == metadata["uid"]:
                        self._later(pod, 0, self._orphan, "orphan")
            else:
                self._later(change.new, 0, self._sync)
        elif change.kind is PODS and change.new is None:
            if (job := self._job_of(change.item)) is not None:
                self._later(job, 0, self._sync)
        elif change.kind is PODS and change.new is not None and TRACKING in (metadata.get("finalizers") or []):
            job = self._job_of(change.new)
            if job is None:
                self._later(change.new, 0, self._orphan, "orphan")
            else:
                self._later(job, 0 if change.old is None else self._knobs.job_batch_s, self._sync, "pods")

    def _job_of(self, pod: Json) -> Json | None:
        uid = owner_uid(pod)
        return self._store.by_uid(JOBS, uid) if uid else None

    def _later(self, item: Json, delay_s: float, action: Callable[[str, str], None], why: str = "now") -> None:
        """One timer for each object and reason; an earlier one that waits is enough."""
        key = (item["metadata"]["namespace"], item["metadata"]["name"], why)
        if why == "deadline" and key in self._timers:
            self._timers.pop(key).cancel()
        if key not in self._timers:
            self._timers[key] = asyncio.get_running_loop().call_later(delay_s, self._run, key, action)

    def _run(self, key: tuple[str, str, str], action: Callable[[str, str], None]) -> None:
        del self._timers[key]
        if not self._knobs.job_controller:
            self._timers[key] = asyncio.get_running_loop().call_later(0.2, self._run, key, action)
            return
        action(key[0], key[1])

    def _orphan(self, namespace: str, name: str) -> None:
        """A Pod whose Job is gone is let go; it is not this controller that deletes it."""
        pod = self._store.find(PODS, namespace, name)
        if pod is not None and self._job_of(pod) is None:
            let_go(self._store, PODS, namespace, name, TRACKING)

    def _sync(self, namespace: str, name: str) -> None:
        job = self._store.find(JOBS, namespace, name)
        if job is None or job["spec"].get("managedBy", _CONTROLLER) != _CONTROLLER:
            return
        pods = [p for p in self._store.all(PODS, namespace) if owner_uid(p) == job["metadata"]["uid"]]
        status = copy.deepcopy(job.get("status") or {})
        if not is_finished(job):
            self._advance(job, status, pods)
        self._write(job, status)
        over = condition({"status": status}, "FailureTarget") is not None or job["metadata"].get("deletionTimestamp")
        for pod in pods:
            if over or _over(pod) or _failed(pod, job):
                let_go(self._store, PODS, namespace, pod["metadata"]["name"], TRACKING)

    def _advance(self, job: Json, status: Json, pods: list[Json]) -> None:
        spec, now = job["spec"], self._store.now()
        status.setdefault("startTime", stamp(now))
        tracked = [p for p in pods if TRACKING in (p["metadata"].get("finalizers") or [])]
        failed = [p for p in tracked if _failed(p, job)]
        _add(status, "succeeded", sum(p["status"].get("phase") == "Succeeded" for p in tracked))
        _add(status, "failed", len(failed))
        active = [p for p in pods if not _over(p) and not p["metadata"].get("deletionTimestamp")]
        ending = [p for p in pods if not _over(p) and p["metadata"].get("deletionTimestamp")]
        verdict = self._verdict(job, status)
        if verdict is None and not spec["suspend"] and not job["metadata"].get("deletionTimestamp"):
            waiting = len(ending) if spec["podReplacementPolicy"] == "Failed" else 0
            left = spec.get("completions", 1) - status.get("succeeded", 0)
            active += self._fill(job, status, min(spec["parallelism"], left) - len(active) - waiting)
        elif verdict is not None:
            if verdict[0] == "FailureTarget" and condition({"status": status}, "FailureTarget") is None:
                _add(status, "failed", sum(not _over(p) and p not in failed for p in tracked))
            self._end(job, active)
            ending, active = ending + active, []
            self._conclude(job, status, verdict, over=not any(not _over(p) for p in self._fresh(ending)))
        self._count(status, active, ending)

    def _fresh(self, pods: list[Json]) -> list[Json]:
        found = (self._store.find(PODS, p["metadata"]["namespace"], p["metadata"]["name"]) for p in pods)
        return [p for p in found if p is not None]

    def _verdict(self, job: Json, status: Json) -> tuple[str, str, str] | None:
        spec = job["spec"]
        for kind in ("FailureTarget", "SuccessCriteriaMet"):
            if told := condition({"status": status}, kind):
                return (kind, told["reason"], told["message"])
        if status.get("failed", 0) > spec["backoffLimit"]:
            return ("FailureTarget", *_BACKOFF)
        if "activeDeadlineSeconds" in spec and not spec["suspend"]:
            end = moment_of(status["startTime"]) + timedelta(seconds=spec["activeDeadlineSeconds"])
            left_s = (end - self._store.now()).total_seconds()
            if left_s <= 0:
                return ("FailureTarget", *_DEADLINE)
            self._later(job, left_s, self._sync, "deadline")
        if status.get("succeeded", 0) >= spec.get("completions", 1):
            return ("SuccessCriteriaMet", *_REACHED)
        return None

    def _fill(self, job: Json, status: Json, missing: int) -> list[Json]:
        """New Pods; after a failed one not at once."""
        failed = status.get("failed", 0)
        if failed and missing > 0:
            wait_s = _POD_BACKOFF_S * 2 ** (failed - 1)
            if f"{job['metadata']['uid']}/{failed}" not in self._retries:
                self._retries[f"{job['metadata']['uid']}/{failed}"] = wait_s
                self._later(job, wait_s, self._sync, "backoff")
                return []
            if (job["metadata"]["namespace"], job["metadata"]["name"], "backoff") in self._timers:
                return []
        made = [self._make(job) for _ in range(max(0, missing))]
        return [pod for pod in made if pod is not None]

    def _make(self, job: Json) -> Json | None:
        metadata, template = job["metadata"], job["spec"]["template"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
        pod: Json = {"metadata": copy.deepcopy(template["metadata"]), "spec": copy.deepcopy(template["spec"])}
        pod["metadata"] |= {"generateName": f"{metadata['name']}-", "finalizers": [TRACKING]}
        pod["metadata"]["ownerReferences"] = [{**owner, "controller": True, "blockOwnerDeletion": True}]
        try:
            made = objects.create(self._store, PODS, metadata["namespace"], pod)
        except ApiError as error:
            self._recorder.tell(job, "FailedCreate", f"Error creating: {error.message}", source=_SOURCE, warning=True)
            wait_s = self._retries[metadata["uid"]] = min(_LAST_RETRY_S, self._retries.get(metadata["uid"], _FIRST_RETRY_S / 2) * 2)
            self._later(job, wait_s, self._sync, "retry")
            return None
        self._recorder.tell(job, "SuccessfulCreate", f"Created pod: {made['metadata']['name']}", source=_SOURCE)
        return made

    def _end(self, job: Json, active: list[Json]) -> None:
        for pod in active:
            delete(self._store, PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], {})
            self._recorder.tell(job, "SuccessfulDelete", f"Deleted pod: {pod['metadata']['name']}", source=_SOURCE)

    def _conclude(self, job: Json, status: Json, verdict: tuple[str, str, str], *, over: bool) -> None:
        """First what it will be, and when no Pod is left what it is."""
        kind, reason, message = verdict
        self._condition(status, kind, reason, message)
        if not over:
            return
        final = "Failed" if kind == "FailureTarget" else "Complete"
        self._condition(status, final, reason, message)
        if final == "Complete":
            status["completionTime"] = stamp(self._store.now())
            self._recorder.tell(job, "Completed", "Job completed", source=_SOURCE)
        else:
            self._recorder.tell(job, reason, message, source=_SOURCE, warning=True)

    def _condition(self, status: Json, kind: str, reason: str, message: str) -> None:
        if condition({"status": status}, kind) is None:
            now = stamp(self._store.now())
            told = {"type": kind, "status": "True", "lastProbeTime": now, "lastTransitionTime": now, "reason": reason, "message": message}
            status.setdefault("conditions", []).append(told)

    def _count(self, status: Json, active: list[Json], ending: list[Json]) -> None:
        ready = sum(any(c["type"] == "Ready" and c["status"] == "True" for c in p["status"].get("conditions", [])) for p in active)
        status |= {"terminating": len([p for p in self._fresh(ending) if not _over(p)]), "ready": ready, "uncountedTerminatedPods": {}}
        status.pop("active", None)
        if active:
            status["active"] = len(active)

    def _write(self, job: Json, status: Json) -> None:
        if status != job.get("status"):
            self._store.change(JOBS, job["metadata"]["namespace"], job["metadata"]["name"], lambda new: new.update(status=status))


def _add(status: Json, field: str, count: int) -> None:
    """A count of 0 is not shown."""
    if count:
        status[field] = status.get(field, 0) + count
