"""The garbage collector and the controller that removes finished Jobs."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from tests.support.kubernetes.deletion import FOREGROUND, ORPHAN, delete, let_go
from tests.support.kubernetes.jobs import is_finished
from tests.support.kubernetes.kinds import JOBS, PODS
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.problems import ApiError
from tests.support.kubernetes.store import Change, Store, moment_of

Json = dict[str, Any]
_RETRY_S = 0.2


class Collector:
    """Pods follow their Job. Pods without any owner stay."""

    def __init__(self, store: Store, knobs: Knobs) -> None:
        self._store = store
        self._knobs = knobs
        self._asked: set[tuple[str, str]] = set()
        self._finished: dict[str, asyncio.TimerHandle] = {}
        store.listen(self._hear)

    def _hear(self, change: Change) -> None:
        metadata = change.item["metadata"]
        if change.kind is JOBS:
            if change.new is None or metadata.get("deletionTimestamp"):
                self._ask(metadata["namespace"], metadata["uid"])
            if change.new is not None and is_finished(change.new):
                self._expire(change.new)
        elif change.kind is PODS:
            for owner in metadata.get("ownerReferences") or []:
                job = self._store.by_uid(JOBS, owner["uid"])
                if job is None or job["metadata"].get("deletionTimestamp"):
                    self._ask(metadata["namespace"], owner["uid"])

    def _ask(self, namespace: str, uid: str, delay_s: float = 0) -> None:
        if (namespace, uid) not in self._asked:
            self._asked.add((namespace, uid))
            asyncio.get_running_loop().call_later(delay_s, self._collect, namespace, uid)

    def _collect(self, namespace: str, uid: str) -> None:
        self._asked.discard((namespace, uid))
        if not self._knobs.collector:
            self._ask(namespace, uid, _RETRY_S)
            return
        job = self._store.by_uid(JOBS, uid)
        finalizers = job["metadata"].get("finalizers") or [] if job else []
        mine = [p for p in self._store.all(PODS, namespace) if any(o["uid"] == uid for o in p["metadata"].get("ownerReferences") or [])]
        if ORPHAN in finalizers:
            for pod in mine:
                self._store.change(PODS, namespace, pod["metadata"]["name"], lambda p: _disown(p, uid))
        elif job is None or FOREGROUND in finalizers:
            for pod in mine:
                if not pod["metadata"].get("deletionTimestamp"):
                    options = {"propagationPolicy": "Background", "preconditions": {"uid": pod["metadata"]["uid"]}}
                    delete(self._store, PODS, namespace, pod["metadata"]["name"], options)
        if job is not None and (ORPHAN in finalizers or not mine):
            for finalizer in (ORPHAN, FOREGROUND):
                let_go(self._store, JOBS, namespace, job["metadata"]["name"], finalizer)

    def _expire(self, job: Json) -> None:
        metadata, ttl_s = job["metadata"], job["spec"].get("ttlSecondsAfterFinished")
        if metadata["uid"] in self._finished:
            self._finished.pop(metadata["uid"]).cancel()
        if ttl_s is None or metadata.get("deletionTimestamp"):
            return
        ended = next(c["lastTransitionTime"] for c in job["status"]["conditions"] if c["type"] in ("Complete", "Failed"))
        left_s = (moment_of(ended) + timedelta(seconds=ttl_s) - self._store.now()).total_seconds()
        handle = asyncio.get_running_loop().call_later(max(0.0, left_s), self._remove, job)
        self._finished[metadata["uid"]] = handle

    def _remove(self, job: Json) -> None:
        metadata = job["metadata"]
        self._finished.pop(metadata["uid"], None)
        if not self._knobs.ttl_controller:
            self._finished[metadata["uid"]] = asyncio.get_running_loop().call_later(_RETRY_S, self._remove, job)
            return
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": metadata["uid"]}}
        try:
            delete(self._store, JOBS, metadata["namespace"], metadata["name"], options)
        except ApiError:
            return


def _disown(pod: Json, uid: str) -> None:
    left = [o for o in pod["metadata"]["ownerReferences"] if o["uid"] != uid]
    pod["metadata"]["ownerReferences"] = left
    if not left:
        del pod["metadata"]["ownerReferences"]
