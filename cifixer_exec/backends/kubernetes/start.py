"""Waiting for a Job's Pod to run, with the reason as soon as it is known that it will not."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from cifixer_exec.backends.kubernetes import death
from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.names import Names
from cifixer_exec.backends.kubernetes.objects import failure, owner_of, uid_of
from cifixer_exec.backends.kubernetes.refusals import DENIALS
from cifixer_exec.backends.kubernetes.verdicts import Verdict, verdict, verdict_of_events
from cifixer_exec.errors import BackendUnavailableError, CapacityError, ExecutorError, SandboxStartError

#: The Pod is watched in pieces of these lengths, and between them its events are looked at; the last one is repeated.
WATCHES_S = (1, 2, 3, 5)
#: What may mend itself has so long to do it.
MEND_S = 15.0
#: No two watches are nearer to each other.
LEAST_WATCH_S = 0.5
_LAST_EVENTS = 5
#: In the words of a refused Pod: no second try will do. Webhooks and the API server's own checks say it without "forbidden".
_DECIDED = ("forbidden", "denied the request", " is invalid")
#: The same: who was asked could not answer, or something was just being changed.
_UNDECIDED = ("cannot be fulfilled", "Internal error occurred", "timed out", "timeout", "connection refused")


class PassingError(SandboxStartError):
    """Another try may fare better: the Pod was ended by the cluster and not by what is in it."""


@dataclass
class Start:
    """The way of one Job to its running Pod."""

    cluster: Cluster
    names: Names
    sandbox_id: str
    job_uid: str
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _last: Verdict = field(default_factory=Verdict)
    _pod: dict[str, Any] = field(default_factory=dict)
    _mending_since_s: float = 0.0

    def running(self, deadline_s: float) -> dict[str, Any]:
        """The Pod when its container runs. ``deadline_s``: of :attr:`clock`.

        Raises:
            PassingError: see there.
            SandboxStartError, CapacityError: it does not run, and why.
            BackendUnavailableError: the cluster has not answered until then.
        """
        for pieces in count():
            began_s = self.clock()
            watch_s = WATCHES_S[min(pieces, len(WATCHES_S) - 1)]
            try:
                if self._runs_within(max(1, min(watch_s, int(deadline_s - began_s)))):
                    return self._pod
            except BackendUnavailableError as error:  # the cluster may go on with it meanwhile
                if error.code in DENIALS or self.clock() > deadline_s:
                    raise
            if self.clock() > deadline_s:
                raise self._late(self._last, self._pod)
            if self.clock() - began_s < LEAST_WATCH_S:
                self.sleep(LEAST_WATCH_S)  # something on the way ends watches at once
        raise AssertionError  # the counting has no end

    def _runs_within(self, watch_s: int) -> bool:
        """Whether it runs; whatever else there is to say about it is raised, or kept."""
        seen = False
        for pod in self._states(watch_s):
            self._pod, seen = pod, True
            self._judge(verdict(self._pod))
            if self._last.running:
                return True
        if not seen:
            self._judge(self._verdict_of_job())
        elif not self._last.why:
            self._judge(self._told_by_events())
        return False

    def _told_by_events(self) -> Verdict:
        """Nothing, where they cannot be had: they only tell sooner what the status will."""
        with suppress(BackendUnavailableError):
            return verdict_of_events(self._events(uid_of(self._pod)))
        return Verdict()

    def _judge(self, now: Verdict) -> None:
        self._last = now
        if now.why:  # who says nothing, as behind an init container, does not say that it has mended itself
            self._mending_since_s = (self._mending_since_s or self.clock()) if now.soon else 0.0
        if now.final or (now.soon and self.clock() - self._mending_since_s > MEND_S):
            raise self._failed(now, self._pod)

    def _states(self, watch_s: int) -> Any:
        """The Pod of the Job as it changes; another Job's of the same name may still be going."""
        selector = self.names.selector(self.sandbox_id)
        for kind, pod in self.cluster.watch(self.cluster.path("pods"), self._doing, selector=selector, timeout_s=watch_s):
            if kind in ("ADDED", "MODIFIED", "DELETED") and owner_of(pod) == self.job_uid:
                if kind == "DELETED":
                    pod["metadata"].setdefault("deletionTimestamp", "now")
                yield pod

    @property
    def _doing(self) -> str:
        return f"waiting for the Pod of sandbox {self.sandbox_id!r}"

    def _verdict_of_job(self) -> Verdict:
        """Quotas, Pod Security and webhooks refuse the Pod while the Job is accepted: then the Job's events have the words."""
        answer = self.cluster.get(self.cluster.path("jobs", self.names.job(self.sandbox_id)), self._doing)
        if answer is None or uid_of(answer.document) != self.job_uid:
            raise PassingError("its Job was deleted while it started")
        if failed := failure(answer.document):
            raise SandboxStartError(f"its Job failed before it ran: {failed.get('reason')}: {failed.get('message')}")
        said = [str(e.get("message") or "") for e in self._events(self.job_uid) if e.get("reason") == "FailedCreate"]
        if not said:
            return Verdict()
        words = f"the cluster does not let its Pod be: {said[-1]}"
        if "exceeded quota" in words:
            raise CapacityError(words)
        if any(sign in words for sign in _DECIDED) and not any(sign in words for sign in _UNDECIDED):
            raise SandboxStartError(words)
        return Verdict(soon=True, why=words)  # a webhook that did not answer, a quota that was just being changed: the Job tries again

    def _failed(self, why: Verdict, pod: dict[str, Any]) -> ExecutorError:
        kind = PassingError if why.passing else SandboxStartError
        said = death.last_words(self.cluster, str(pod["metadata"]["name"]), why.ended) if why.ended else ""
        more = f": {said}" if said else self._seen(pod)
        return kind(f"its Pod does not start: {why.why}" + (f": {why.remedy}" if why.remedy else more), why.remedy)

    def _late(self, why: Verdict, pod: dict[str, Any]) -> ExecutorError:
        """Nothing of it was started when it is for want of room."""
        kind = CapacityError if why.why.startswith("Unschedulable") else SandboxStartError
        told = f": {why.why}" if why.why else ""
        return kind(f"its Pod does not run in time{told}{self._seen(pod)}" + (f": {why.remedy}" if why.remedy else ""), why.remedy)

    def _seen(self, pod: dict[str, Any]) -> str:
        """What only events tell, such as a volume that cannot be mounted."""
        if not pod:
            return ""
        try:
            events = self._events(uid_of(pod))
        except BackendUnavailableError:
            return ""
        warnings = [e for e in events if e.get("type") == "Warning" and e.get("reason") != "FailedScheduling"]  # the Pod says that itself
        told = [f"{e.get('reason')}: {e.get('message')}" for e in warnings[-_LAST_EVENTS:]]
        return f" (its events: {'; '.join(told)})" if told else ""

    def _events(self, uid: str) -> list[dict[str, Any]]:
        return self.cluster.events(uid, self._doing)
