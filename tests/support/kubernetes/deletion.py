"""DELETE: grace, finalizers, propagation. https://kubernetes.io/docs/concepts/architecture/garbage-collection/"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from tests.support.kubernetes.kinds import JOBS, PODS, Kind
from tests.support.kubernetes.problems import Cause, bad_request, conflict, invalid
from tests.support.kubernetes.store import Store, stamp

Json = dict[str, Any]
ORPHAN, FOREGROUND = "orphan", "foregroundDeletion"
_POLICIES = ("Background", "Foreground", "Orphan")


def delete(store: Store, kind: Kind, namespace: str, name: str, options: Json) -> tuple[Json, bool]:
    """The object's last state, and whether it is gone; else it has a deletion timestamp now.

    Raises:
        ApiError: 404, 409 for a precondition, 422 for bad options.
    """
    item = store.get(kind, namespace, name)
    _check(kind, item, options)
    finalizers = _finalizers(kind, item, options)
    grace = _grace_s(kind, item, options)
    terminating = item["metadata"].get("deletionTimestamp")
    if terminating and grace and grace >= item["metadata"].get("deletionGracePeriodSeconds", 0):
        return item, False

    def mark(new: Json) -> None:
        metadata = new["metadata"]
        if grace or finalizers:
            metadata["deletionTimestamp"] = stamp(store.now() + timedelta(seconds=grace))
            metadata["deletionGracePeriodSeconds"] = grace
        if finalizers:
            metadata["finalizers"] = finalizers

    if grace == 0 and not finalizers:
        last = store.remove(kind, namespace, name)
        assert last is not None
        return last, True
    marked = store.change(kind, namespace, name, mark)
    assert marked is not None
    return marked, False


def let_go(store: Store, kind: Kind, namespace: str, name: str, finalizer: str) -> None:
    """One finalizer is done; the last one lets a deleted object go."""
    item = store.find(kind, namespace, name)
    if item is None or finalizer not in (item["metadata"].get("finalizers") or []):
        return

    def drop(new: Json) -> None:
        new["metadata"]["finalizers"].remove(finalizer)
        if not new["metadata"]["finalizers"]:
            del new["metadata"]["finalizers"]

    item = store.change(kind, namespace, name, drop)
    assert item is not None
    metadata = item["metadata"]
    if metadata.get("deletionTimestamp") and not metadata.get("finalizers") and metadata.get("deletionGracePeriodSeconds") == 0:
        store.remove(kind, namespace, name)


def _check(kind: Kind, item: Json, options: Json) -> None:
    policy = options.get("propagationPolicy")
    if policy is not None and options.get("orphanDependents") is not None:
        cause = Cause(
            "FieldValueInvalid", 'Invalid value: "orphanDependents and deletionPropagation cannot be both set"', "propagationPolicy"
        )
        raise invalid("meta.k8s.io", "DeleteOptions", "", [cause])
    if policy is not None and policy not in _POLICIES:
        words = f'Unsupported value: "{policy}": supported values: "Foreground", "Background", "Orphan", "nil"'
        raise invalid("meta.k8s.io", "DeleteOptions", "", [Cause("FieldValueNotSupported", words, "propagationPolicy")])
    if options.get("gracePeriodSeconds", 0) < 0:
        raise bad_request("gracePeriodSeconds must not be negative")
    wanted = options.get("preconditions") or {}
    for field, words in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
        found = item["metadata"][field]
        if wanted.get(field) is not None and wanted[field] != found:
            why = f"Precondition failed: {words} in precondition: {wanted[field]}, {words} in object meta: {found}"
            raise conflict(kind.group, kind.resource, item["metadata"]["name"], why)


def _finalizers(kind: Kind, item: Json, options: Json) -> list[str]:
    """For batch/v1 Jobs the default is to orphan."""
    kept = [f for f in item["metadata"].get("finalizers") or [] if f not in (ORPHAN, FOREGROUND)]
    policy = options.get("propagationPolicy")
    if policy is None and options.get("orphanDependents") is not None:
        policy = "Orphan" if options["orphanDependents"] else "Background"
    if policy is None:
        had = [f for f in item["metadata"].get("finalizers") or [] if f in (ORPHAN, FOREGROUND)]
        return [*kept, *(had or ([ORPHAN] if kind is JOBS else []))]
    return [*kept, *{"Orphan": [ORPHAN], "Foreground": [FOREGROUND]}.get(policy, [])]


def _grace_s(kind: Kind, item: Json, options: Json) -> int:
    """Only Pods that a kubelet has are ended with grace."""
    if kind is not PODS or not item["spec"].get("nodeName") or item.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return 0
    default = item["metadata"].get("deletionGracePeriodSeconds", item["spec"]["terminationGracePeriodSeconds"])
    return int(options.get("gracePeriodSeconds", default))
