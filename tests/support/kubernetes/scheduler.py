"""The scheduler of a cluster with one node."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

from tests.support.kubernetes.admission import pod_total
from tests.support.kubernetes.kinds import CLAIMS, PODS
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.recorder import Recorder
from tests.support.kubernetes.store import Change, Store, stamp

Json = dict[str, Any]
NODE = "stand-in"
_SOURCE = "default-scheduler"
_RETRY_S = 0.2


class Scheduler:
    """A Pod that does not fit is tried again each time something may have become free."""

    def __init__(self, store: Store, recorder: Recorder, knobs: Knobs) -> None:
        self._store = store
        self._recorder = recorder
        self._knobs = knobs
        self._waiting: dict[tuple[str, str], asyncio.TimerHandle] = {}
        store.listen(self._hear)

    def _hear(self, change: Change) -> None:
        if change.kind is PODS and change.old is None and change.new is not None and not change.new["spec"].get("nodeName"):
            self._later(change.new, 0)

    def _later(self, pod: Json, delay_s: float) -> None:
        key = (pod["metadata"]["namespace"], pod["metadata"]["name"])
        self._waiting[key] = asyncio.get_running_loop().call_later(delay_s, self._try, *key)

    def _try(self, namespace: str, name: str) -> None:
        del self._waiting[namespace, name]
        pod = self._store.find(PODS, namespace, name)
        if pod is None or pod["metadata"].get("deletionTimestamp"):
            return
        refusal = self._refusal(pod)
        if refusal:
            self._refuse(pod, refusal)
            self._later(pod, _RETRY_S)
            return
        self._store.change(PODS, namespace, name, self._bind)
        self._recorder.tell(pod, "Scheduled", f"Successfully assigned {namespace}/{name} to {NODE}", source=_SOURCE)

    def _bind(self, pod: Json) -> None:
        pod["spec"]["nodeName"] = NODE
        now = stamp(self._store.now())
        bound = {"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": now}
        pod["status"]["conditions"] = [bound]

    def _refuse(self, pod: Json, words: str) -> None:
        now = stamp(self._store.now())
        told = {"type": "PodScheduled", "status": "False", "lastProbeTime": None, "lastTransitionTime": now}
        told |= {"reason": "Unschedulable", "message": words}
        had = pod["status"].get("conditions") or []
        if not had or had[0].get("message") != words:
            metadata = pod["metadata"]
            self._store.change(PODS, metadata["namespace"], metadata["name"], lambda p: p["status"].update(conditions=[told]))
            self._recorder.tell(pod, "FailedScheduling", words, source=_SOURCE, warning=True)

    def _refusal(self, pod: Json) -> str:
        """The scheduler's words, or "" when the Pod fits."""
        spec = pod["spec"]
        for volume in spec.get("volumes") or []:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and self._store.find(CLAIMS, pod["metadata"]["namespace"], claim) is None:
                return _words(f'persistentvolumeclaim "{claim}" not found', helpful=False)
        if any(self._knobs.node_labels.get(k) != v for k, v in (spec.get("nodeSelector") or {}).items()):
            return _words("1 node(s) didn't match Pod's node affinity/selector", helpful=False)
        lacking = self._lacking(spec)
        return _words(", ".join(lacking), helpful=True) if lacking else ""

    def _lacking(self, spec: Json) -> list[str]:
        """Sorted, as the scheduler sorts its reasons."""
        others = [p for p in self._store.all(PODS) if p["spec"].get("nodeName") and p["status"]["phase"] not in ("Succeeded", "Failed")]
        lacking = ["1 Too many pods"] if len(others) >= self._knobs.max_pods else []
        for resource, free in (("cpu", Decimal(str(self._knobs.cpu))), ("memory", Decimal(self._knobs.memory_bytes))):
            used = sum((pod_total(p["spec"], "requests", resource) for p in others), Decimal())
            if pod_total(spec, "requests", resource) > free - used:
                lacking.append(f"1 Insufficient {resource}")
        return sorted(lacking)


def _words(reasons: str, *, helpful: bool) -> str:
    why = "No preemption victims found for incoming pod" if helpful else "Preemption is not helpful for scheduling"
    return f"0/1 nodes are available: {reasons}. no new claims to deallocate, preemption: 0/1 nodes are available: 1 {why}."
