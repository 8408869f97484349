"""Waiting for a cluster, and reading what it says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]


def until(done: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """What ``done`` returns once it is something."""
    give_up = time.monotonic() + timeout_s
    while not (found := done()):
        assert time.monotonic() < give_up, "it did not come"
        time.sleep(0.02)
    return found


def pods_of(core: Any, ns: str) -> list[Any]:
    """Every Pod of a namespace."""
    return list(core.list_namespaced_pod(ns).items)


def one_pod(core: Any, ns: str, phase: str) -> Any:
    """The only Pod, when it is in that phase."""
    return until(lambda: next((p for p in pods_of(core, ns) if p.status.phase == phase), None))


def reasons(core: Any, ns: str) -> dict[str, str]:
    """The messages of a namespace's events by their reasons."""
    return {e.reason: e.message for e in core.list_namespaced_event(ns).items}


def conditions(item: Any) -> dict[str, str]:
    """Those that are True, with their reasons."""
    return {c.type: c.reason for c in item.status.conditions or [] if c.status == "True"}


def logged(core: Any, ns: str, name: str) -> str:
    """What a Pod's container has written."""
    return str(core.read_namespaced_pod_log(name, ns))


def status_of(error: Any) -> Json:
    """The Status object in an ApiException."""
    found: Json = json.loads(error.value.body or "{}")
    return found


def changed(item: Json, value: Any, *path: Any) -> Json:
    """A copy with ``value`` at ``path``; None removes what is there."""
    copy: Json = json.loads(json.dumps(item))
    inner: Any = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy
