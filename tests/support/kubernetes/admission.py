"""What stands between a Pod or Job and the store: limits, priority and runtime class, service account, Pod Security, quota."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from tests.support.kubernetes.kinds import ACCOUNTS, JOBS, NAMESPACES, PODS, PRIORITIES, QUOTAS, RUNTIMES, Kind
from tests.support.kubernetes.limit_ranges import limit
from tests.support.kubernetes.pod_security import violations
from tests.support.kubernetes.problems import forbidden
from tests.support.kubernetes.quantities import quantity, shown
from tests.support.kubernetes.store import Store

Json = dict[str, Any]
_BUILT_IN_PRIORITIES = {"system-cluster-critical": 2_000_000_000, "system-node-critical": 2_000_001_000}


def admit(store: Store, kind: Kind, item: Json) -> None:
    """May complete ``item``. Raises ApiError 403."""
    if kind is PODS:
        limit(store, item)
        _classes(store, item)
        _account(store, item)
        _security(store, item)
    if kind in (PODS, JOBS):
        _quota(store, kind, item)


def _classes(store: Store, pod: Json) -> None:
    spec, name = pod["spec"], pod["metadata"]["name"]
    priority = spec.get("priorityClassName")
    if priority:
        found = store.find(PRIORITIES, "", priority)
        if found is None and priority not in _BUILT_IN_PRIORITIES:
            raise forbidden("", "pods", name, f"no PriorityClass with name {priority} was found")
        spec["priority"] = found["value"] if found else _BUILT_IN_PRIORITIES[priority]
    runtime = spec.get("runtimeClassName")
    if runtime and store.find(RUNTIMES, "", runtime) is None:
        raise forbidden("", "pods", name, f'pod rejected: RuntimeClass "{runtime}" not found')


def _account(store: Store, pod: Json) -> None:
    namespace, account = pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"]
    found = store.find(ACCOUNTS, namespace, account)
    if found is None:
        words = f'error looking up service account {namespace}/{account}: serviceaccount "{account}" not found'
        raise forbidden("", "pods", pod["metadata"]["name"], words)
    automount = pod["spec"].get("automountServiceAccountToken", found.get("automountServiceAccountToken", True))
    if automount:
        volume = {"name": "kube-api-access", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}
        pod["spec"].setdefault("volumes", []).append(volume)
        mount = {"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}
        for container in (*pod["spec"]["containers"], *(pod["spec"].get("initContainers") or [])):
            container.setdefault("volumeMounts", []).append(mount)


def _security(store: Store, pod: Json) -> None:
    labels = store.get(NAMESPACES, "", pod["metadata"]["namespace"])["metadata"].get("labels") or {}
    level = labels.get("pod-security.kubernetes.io/enforce", "privileged")
    version = labels.get("pod-security.kubernetes.io/enforce-version", "latest")
    if wrong := violations(pod["spec"], level):
        raise forbidden("", "pods", pod["metadata"]["name"], f'violates PodSecurity "{level}:{version}": {", ".join(wrong)}')


def _quota(store: Store, kind: Kind, item: Json) -> None:
    namespace = item["metadata"]["namespace"]
    for quota in store.all(QUOTAS, namespace):
        hard = {name: quantity(value) for name, value in quota["spec"]["hard"].items()}
        wanted = _counted(kind, item)
        missing = _missing(kind, item, hard)
        name = item["metadata"]["name"]
        if missing:
            raise forbidden(kind.group, kind.resource, name, f"failed quota: {quota['metadata']['name']}: must specify {missing}")
        used = _used(store, namespace)
        over = sorted(n for n in hard if n in wanted and used.get(n, Decimal()) + wanted[n] > hard[n])
        if over:
            parts = (("requested", wanted), ("used", used), ("limited", hard))
            words = ", ".join(f"{word}: {_sums(over, values)}" for word, values in parts)
            raise forbidden(kind.group, kind.resource, name, f"exceeded quota: {quota['metadata']['name']}, {words}")


def _sums(names: list[str], values: dict[str, Decimal]) -> str:
    return ",".join(f"{name}={shown(name, values.get(name, Decimal()))}" for name in names)


def _counted(kind: Kind, item: Json) -> dict[str, Decimal]:
    """What one object takes of a quota."""
    if kind is JOBS:
        return {"count/jobs.batch": Decimal(1)}
    found = {"pods": Decimal(1), "count/pods": Decimal(1)}
    for field in ("requests", "limits"):
        for resource in ("cpu", "memory", "ephemeral-storage"):
            total = pod_total(item["spec"], field, resource)
            found[f"{field}.{resource}"] = total
            if field == "requests":
                found[resource] = total
    return found


def pod_total(spec: Json, field: str, resource: str) -> Decimal:
    """What a Pod asks for: the sum of its containers, or its largest init container."""

    def of(container: Json) -> Decimal:
        return quantity(container.get("resources", {}).get(field, {}).get(resource, "0"))

    return max([sum((of(c) for c in spec["containers"]), Decimal()), *(of(c) for c in spec.get("initContainers") or [])])


def _missing(kind: Kind, item: Json, hard: dict[str, Decimal]) -> str:
    """A quota on a resource demands that each container says how much it wants."""
    if kind is not PODS:
        return ""
    found: list[str] = []
    for name in sorted(hard):
        field, _, resource = name.rpartition(".")
        if resource in ("cpu", "memory") and field in ("", "requests", "limits"):
            everyone = (*item["spec"]["containers"], *(item["spec"].get("initContainers") or []))
            without = [c["name"] for c in everyone if resource not in c.get("resources", {}).get(field or "requests", {})]
            if without:
                found.append(f"{name} for: {','.join(without)}")
    return "; ".join(found)


def _used(store: Store, namespace: str) -> dict[str, Decimal]:
    used: dict[str, Decimal] = {}
    for kind in (JOBS, PODS):
        for item in store.all(kind, namespace):
            if item.get("status", {}).get("phase") in ("Succeeded", "Failed"):
                continue
            for name, value in _counted(kind, item).items():
                used[name] = used.get(name, Decimal()) + value
    return used
