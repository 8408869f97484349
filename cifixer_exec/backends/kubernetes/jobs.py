"""Making, finding and removing the Jobs of sandboxes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cifixer_exec.backends.kubernetes.cluster import Answer, Cluster
from cifixer_exec.backends.kubernetes.death import is_node_lost
from cifixer_exec.backends.kubernetes.job import KubernetesOptions
from cifixer_exec.backends.kubernetes.names import Names
from cifixer_exec.backends.kubernetes.objects import is_going, owner_of, status_of, true_conditions, uid_of
from cifixer_exec.backends.kubernetes.refusals import RefusedError, translate
from cifixer_exec.backends.kubernetes.start import PassingError, Start
from cifixer_exec.errors import BackendError, CapacityError, ExecutorError, SandboxStartError

#: Starts of one sandbox, when the cluster itself ended the Pod (evicted, preempted, node lost) before it ran; and the pause before another.
STARTS, START_PAUSE_S = 3, 1.0
#: How often one that is being deleted is looked at again.
LOOK_S = 0.05
MOST_LOOK_S = 0.2
#: So long after its grace a Pod may still be there; then its node does not answer, and the cluster ends it when it does.
DELETE_SLACK_S = 15.0
#: Nothing is made, and what the operator's template has that no API knows is an error, which else is dropped in silence.
_DRY_RUN = {"dryRun": "All", "fieldValidation": "Strict"}
#: Conditions of a Job whose Pod has ended, or is about to be.
_ENDS = ("Complete", "Failed", "FailureTarget", "SuccessCriteriaMet")


@dataclass(frozen=True)
class Jobs:
    """Of one namespace of ours in one of the cluster's."""

    cluster: Cluster
    names: Names
    options: KubernetesOptions

    def ask(self, sandbox_id: str) -> Answer | None:
        """The Job of this name, if it is ours."""
        answer = self.cluster.get(self._path(sandbox_id), f"looking for sandbox {sandbox_id!r}")
        return answer if answer is not None and self.names.has(answer.document, sandbox_id) else None

    def find(self, sandbox_id: str) -> dict[str, Any] | None:
        """As :meth:`ask`, without the time."""
        answer = self.ask(sandbox_id)
        return answer.document if answer is not None else None

    def pod(self, name: str, uid: str) -> dict[str, Any] | None:
        """The very one, and not another of its name."""
        answer = self.cluster.get(self.cluster.path("pods", name), f"looking for Pod {name!r}")
        return answer.document if answer is not None and uid_of(answer.document) == uid else None

    def pods(self, sandbox_id: str, job_uid: str = "") -> list[dict[str, Any]]:
        """Those of a sandbox, or of one Job of it."""
        doing = f"looking for the Pod of sandbox {sandbox_id!r}"
        pages = self.cluster.pages(self.cluster.path("pods"), doing, selector=self.names.selector(sandbox_id))
        found = [pod for page in pages for pod in page if self.names.has(pod, sandbox_id)]
        return [pod for pod in found if not job_uid or owner_of(pod) == job_uid]

    def post(self, manifest: Mapping[str, Any], *, dry_run: bool = False) -> dict[str, Any] | None:
        """The Job as it was made; None where there is one of its name.

        Raises:
            InvalidRequestError, CapacityError, BackendError: as the API server says.
        """
        doing = f"making the Job {manifest['metadata']['name']!r}"
        try:
            return self.cluster.ask("POST", self.cluster.path("jobs"), doing, query=_DRY_RUN if dry_run else None, body=manifest).document
        except RefusedError as error:
            if error.code == 409:  # it is there, or its namespace or quota has just been changed by somebody else
                return None
            raise translate(error, doing) from None

    def patch(self, sandbox_id: str, changes: Mapping[str, Any]) -> Answer | None:
        """None where there is no such Job. ``changes``: a merge patch."""
        return self.cluster.patch(self._path(sandbox_id), f"changing sandbox {sandbox_id!r}", changes)

    def make(self, sandbox_id: str, manifest: Callable[[], Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
        """Make it and wait until it runs, or adopt the one there is; the uid of the Job, and the Pod.

        Raises: as :meth:`cifixer_exec.backends.base.Backend.create`.
        """
        deadline_s = time.monotonic() + self.options.start_timeout_s
        for attempt in range(1, STARTS + 1):
            job, adopted = self._made_or_adopted(sandbox_id, manifest)
            job_uid = uid_of(job)
            try:
                return job_uid, Start(self.cluster, self.names, sandbox_id, job_uid).running(deadline_s)
            except SandboxStartError as error:
                unwanted = self._is_deleted(sandbox_id, job_uid)
                self._undo(sandbox_id, job_uid)
                passing = isinstance(error, PassingError)
                # One that was there may just have died, which its Job learns a moment later: it gives way like those that are over.
                if unwanted or not (passing or adopted) or attempt == STARTS or time.monotonic() > deadline_s:
                    raise _about(sandbox_id, error, f" (after {attempt} starts)" if attempt > 1 else "") from None
                time.sleep(START_PAUSE_S * attempt * (0.5 + random.random()) if passing else 0.0)  # noqa: S311  # only spreads them
            except BaseException as error:
                if not adopted or isinstance(error, CapacityError):  # else somebody may live in it
                    self._undo(sandbox_id, job_uid)
                if isinstance(error, ExecutorError):
                    raise _about(sandbox_id, error) from None
                raise
        raise AssertionError  # the last one returns or raises

    def _path(self, sandbox_id: str) -> str:
        return self.cluster.path("jobs", self.names.job(sandbox_id))

    def _is_deleted(self, sandbox_id: str, job_uid: str) -> bool:
        """Whether somebody has deleted the Job: to make another would bring back what a teardown has just ended."""
        job = self.find(sandbox_id)
        return job is None or uid_of(job) != job_uid or is_going(job)

    def _made_or_adopted(self, sandbox_id: str, manifest: Callable[[], Mapping[str, Any]]) -> tuple[dict[str, Any], bool]:
        """The Job, and whether it was there. A dead one, or one that is going, gives way."""
        give_up_s = time.monotonic() + self.options.grace_s + DELETE_SLACK_S
        while True:
            made = self.post(manifest())
            if made is not None:
                return made, False
            found = self.cluster.get(self._path(sandbox_id), f"looking for sandbox {sandbox_id!r}")
            if found is not None:
                self._check_ours(found.document, sandbox_id)
                if not is_over(found.document):
                    return found.document, True
                self.remove(sandbox_id, job_uid=uid_of(found.document))
            if time.monotonic() > give_up_s:
                raise SandboxStartError(f"the Job of sandbox {sandbox_id!r} cannot be made just now, a former one may be going: try again")
            time.sleep(LOOK_S)

    def _check_ours(self, found: Mapping[str, Any], sandbox_id: str) -> None:
        if not self.names.has(found, sandbox_id):
            mend = "delete or rename it, or take another sandbox id"
            raise SandboxStartError(f"the Job {self.names.job(sandbox_id)!r} is there and not one of ours: {mend}", mend)

    def remove(self, sandbox_id: str, *, job_uid: str = "", pod_uid: str = "") -> None:
        """Delete the Job of that uid with its Pods, or a Pod whose Job is gone; without a uid, what there is now. Wait until it has ended.

        What is gone already is *not* an error, and what another has made under the same name since is left alone.

        Raises:
            BackendError: it may still be there.
        """
        doomed = [p for p in self.pods(sandbox_id) if not (job_uid or pod_uid) or job_uid == owner_of(p) or pod_uid == uid_of(p)]
        job = self.find(sandbox_id)  # behind the Pods: those that were there before it have no Job any more if there is none now
        if job is not None and uid_of(job) == (job_uid or uid_of(job)) and not pod_uid:
            job_uid = uid_of(job)
            self._delete(self._path(sandbox_id), job)
            doomed = [p for p in doomed if owner_of(p) == job_uid]
        self._remove_pods(sandbox_id, job_uid, doomed)

    def _remove_pods(self, sandbox_id: str, job_uid: str, doomed: list[dict[str, Any]]) -> None:
        """By ourselves too: the garbage collector comes a moment later, and never to Pods whose Job was deleted without them."""
        pause_s, give_up_s = LOOK_S, time.monotonic() + self.options.grace_s + DELETE_SLACK_S
        asked: set[str] = set()
        pods = doomed
        while pods:
            for pod in pods:
                if uid_of(pod) not in asked and not is_going(pod):
                    asked.add(uid_of(pod))
                    self._delete(self.cluster.path("pods", pod["metadata"]["name"]), pod, gracePeriodSeconds=self.options.grace_s)
            if time.monotonic() > give_up_s:
                raise BackendError(f"the Pod of sandbox {sandbox_id!r} is still being deleted; its node may not answer: destroy it again")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MOST_LOOK_S)
            uids = asked | {uid_of(pod) for pod in doomed}
            found = [p for p in self.pods(sandbox_id) if uid_of(p) in uids or (job_uid and owner_of(p) == job_uid)]
            pods = [p for p in found if not _is_settled(p)]

    def _delete(self, path: str, found: Mapping[str, Any], **options: Any) -> None:
        """By its uid, so that a namesake is never hit; with what belongs to it, because a Job's Pods stay by default."""
        pinned = {"propagationPolicy": "Background", "preconditions": {"uid": uid_of(found)}}
        self.cluster.delete(path, f"deleting {path.rpartition('/')[2]!r}", {**pinned, **options})

    def _undo(self, sandbox_id: str, job_uid: str) -> None:
        """Delete what could not be started; what fails here, the reaper does."""
        with suppress(ExecutorError):
            self.remove(sandbox_id, job_uid=job_uid)


def is_over(job: Mapping[str, Any]) -> bool:
    """Whether nothing runs in it any more, or is about to be ended."""
    return is_going(job) or any(kind in true_conditions(job) for kind in _ENDS)


def _is_settled(pod: Mapping[str, Any]) -> bool:
    """Going, and nothing runs in it any more, or its node is out of reach: what is left to do is the cluster's."""
    statuses = status_of(pod).get("containerStatuses") or []
    over = bool(statuses) and all("terminated" in (c.get("state") or {}) for c in statuses)
    nowhere = not (pod.get("spec") or {}).get("nodeName") or is_node_lost(pod)
    return is_going(pod) and (over or nowhere)


def _about(sandbox_id: str, error: ExecutorError, more: str = "") -> ExecutorError:
    kind = SandboxStartError if isinstance(error, PassingError) else type(error)
    return kind(f"sandbox {sandbox_id!r} did not start: {error}{more}", error.code)
