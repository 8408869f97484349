"""Create and patch: defaults, validation and admission in the order of the API server. Controllers come this way too."""

from __future__ import annotations

import copy
import secrets
import uuid
from collections.abc import Callable
from typing import Any

from tests.support.kubernetes import defaults, schema, validation
from tests.support.kubernetes.admission import admit
from tests.support.kubernetes.kinds import JOBS, NAMESPACES, PODS, Kind
from tests.support.kubernetes.problems import Cause, bad_request, conflict, invalid
from tests.support.kubernetes.store import Store

Json = dict[str, Any]
#: https://github.com/kubernetes/kubernetes/blob/master/staging/src/k8s.io/apimachinery/pkg/util/rand/rand.go
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_MAX_BASE = 58
_DEFAULTS: dict[str, Callable[[Json], None]] = {"jobs": defaults.job, "pods": defaults.pod}
_CHECKS: dict[str, Callable[[Json], list[Cause]]] = {"jobs": validation.job, "pods": validation.pod}
_UPDATE_CHECKS: dict[str, Callable[[Json, Json], list[Cause]]] = {"jobs": validation.job_update, "pods": validation.pod_update}


def create(store: Store, kind: Kind, namespace: str, item: Json, *, dry_run: bool = False) -> Json:
    """Raises ApiError."""
    made = _named(kind, namespace, item)
    name = made["metadata"]["name"]
    if namespace:
        store.get(NAMESPACES, "", namespace)
    if kind in (JOBS, PODS):
        made.setdefault("spec", {})
        _DEFAULTS[kind.resource](made)
        made["metadata"] |= {"uid": str(uuid.uuid4()), "generation": 1}
        made["status"] = {"phase": "Pending", "qosClass": quality(made["spec"])} if kind is PODS else {}
        if kind is JOBS:
            defaults.job_selector(made)
        admit(store, kind, made)
        if wrong := _CHECKS[kind.resource](made):
            raise invalid(kind.group, kind.kind, name, wrong)
    if dry_run:
        return made
    return store.create(kind, made)


def _named(kind: Kind, namespace: str, item: Json) -> Json:
    made = copy.deepcopy(item)
    if made.get("apiVersion", kind.api_version) != kind.api_version or made.get("kind", kind.kind) != kind.kind:
        raise bad_request(
            f"the API version in the data ({made.get('apiVersion')}) does not match the expected API version ({kind.api_version})"
        )
    metadata = made.setdefault("metadata", {})
    if metadata.get("namespace", namespace) != namespace:
        raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
    if namespace:
        metadata["namespace"] = namespace
    if not metadata.get("name") and metadata.get("generateName"):
        metadata["name"] = metadata["generateName"][:_MAX_BASE] + "".join(secrets.choice(_LETTERS) for _ in range(5))
    for field in ("uid", "resourceVersion", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"):
        if metadata.pop(field, None) and field == "resourceVersion":
            raise bad_request("resourceVersion should not be set on objects to be created")
    if not metadata.get("name"):
        raise invalid(kind.group, kind.kind, "", validation.metadata(metadata))
    return made


def quality(spec: Json) -> str:
    """The Pod's QoS class."""
    everyone = [*spec["containers"], *(spec.get("initContainers") or [])]
    resources = [c.get("resources", {}) for c in everyone]
    if not any(r.get("limits") or r.get("requests") for r in resources):
        return "BestEffort"
    full = all(
        r.get("limits", {}).get(n) is not None and r.get("requests", {}).get(n) == r["limits"][n]
        for r in resources
        for n in ("cpu", "memory")
    )
    return "Guaranteed" if full else "Burstable"


def patch(store: Store, kind: Kind, namespace: str, name: str, body: Json, *, dry_run: bool = False) -> Json:
    """A JSON merge patch (a strategic one is the same for maps and scalars). The status is not touched. Raises ApiError."""
    old = store.get(kind, namespace, name)
    new = merged(old, {k: v for k, v in body.items() if k != "status"})
    for field in ("name", "namespace", "uid", "creationTimestamp"):
        if new["metadata"].get(field) != old["metadata"].get(field):
            words = "Invalid value: field is immutable"
            raise invalid(kind.group, kind.kind, name, [Cause("FieldValueInvalid", words, f"metadata.{field}")])
    new, _ = schema.cleaned(kind.resource, new)
    if new["metadata"].get("resourceVersion") != old["metadata"]["resourceVersion"]:
        why = "the object has been modified; please apply your changes to the latest version and try again"
        raise conflict(kind.group, kind.resource, name, why)
    if new.get("spec") != old.get("spec"):
        new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
    check = _UPDATE_CHECKS.get(kind.resource)
    if check is not None and (wrong := check(new, old)):
        raise invalid(kind.group, kind.kind, name, wrong)
    return new if dry_run else store.update(kind, new)


def merged(target: Any, change: Any) -> Any:
    """RFC 7396."""
    if not isinstance(change, dict):
        return change
    found = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found
