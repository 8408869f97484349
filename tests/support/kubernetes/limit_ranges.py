"""LimitRanges: what a namespace gives to and refuses in containers and Pods. https://kubernetes.io/docs/concepts/policy/limit-range/"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from tests.support.kubernetes.kinds import LIMITS
from tests.support.kubernetes.problems import forbidden
from tests.support.kubernetes.quantities import quantity
from tests.support.kubernetes.store import Store

Json = dict[str, Any]
#: As shown and as compared; None where a Pod does not say.
Value = tuple[str, Decimal] | None


def limit(store: Store, pod: Json) -> None:
    """Completes requests and limits, then compares them. Raises ApiError 403."""
    ranges = [item for found in store.all(LIMITS, pod["metadata"]["namespace"]) for item in found["spec"]["limits"]]
    containers = [*pod["spec"]["containers"], *(pod["spec"].get("initContainers") or [])]
    for item in ranges:
        if item["type"] == "Container":
            for container in containers:
                _complete(container.setdefault("resources", {}), item)
    wrong = [words for item in ranges for words in _wrong(item, pod["spec"]["containers"], containers)]
    if wrong:
        text = wrong[0] if len(wrong) == 1 else f"[{', '.join(dict.fromkeys(wrong))}]"
        raise forbidden("", "pods", pod["metadata"]["name"], text)


def _complete(resources: Json, item: Json) -> None:
    """What is not set is what the maximum is, unless there is a default."""
    limits = {**item.get("max", {}), **item.get("default", {})}
    requests = {**item.get("min", {}), **limits, **item.get("defaultRequest", {})}
    for field, values in (("limits", limits), ("requests", requests)):
        for name, value in values.items():
            resources.setdefault(field, {}).setdefault(name, str(value))


def _wrong(item: Json, main: list[Json], everyone: list[Json]) -> list[str]:
    found: list[str] = []
    for bound in ("min", "max"):
        for resource, enforced in item.get(bound, {}).items():
            if item["type"] == "Container":
                for container in everyone:
                    values = (_of(container, "requests", resource), _of(container, "limits", resource))
                    found += _compare(bound, resource, "Container", str(enforced), *values)
            elif item["type"] == "Pod":
                values = (_sum(main, "requests", resource), _sum(main, "limits", resource))
                found += _compare(bound, resource, "Pod", str(enforced), *values)
    return found


def _of(container: Json, field: str, resource: str) -> Value:
    value = container.get("resources", {}).get(field, {}).get(resource)
    return None if value is None else (str(value), quantity(value))


def _sum(containers: list[Json], field: str, resource: str) -> Value:
    values = [value for container in containers if (value := _of(container, field, resource)) is not None]
    if not values:
        return None
    return values[0] if len(values) == 1 else (str(sum(v for _, v in values)), sum((v for _, v in values), Decimal()))


def _compare(bound: str, resource: str, kind: str, enforced: str, request: Value, limit_: Value) -> list[str]:
    words = f"{bound}imum {resource} usage per {kind} is {enforced}"
    end = quantity(enforced)
    if bound == "min":
        if request is None:
            return [f"{words}.  No request is specified"]
        if request[1] < end:
            return [f"{words}, but request is {request[0]}"]
        return [f"{words}, but limit is {limit_[0]}"] if limit_ is not None and limit_[1] < end else []
    if limit_ is None:
        return [f"{words}.  No limit is specified"]
    if limit_[1] > end:
        return [f"{words}, but limit is {limit_[0]}"]
    return [f"{words}, but request is {request[0]}"] if request is not None and request[1] > end else []
