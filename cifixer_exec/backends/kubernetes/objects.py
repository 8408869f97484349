"""What Jobs and Pods have in common, as the API server shows them. Nothing here asks a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def status_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Empty while nobody has said anything."""
    return dict(found.get("status") or {})


def conditions_of(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By their types, whatever they say (https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-conditions)."""
    return {str(c.get("type")): c for c in status_of(found).get("conditions") or []}


def true_conditions(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those that hold."""
    return {kind: c for kind, c in conditions_of(found).items() if c.get("status") == "True"}


def failure(job: Mapping[str, Any]) -> dict[str, Any]:
    """The condition of a Job that has failed, or whose Pods are just being ended because it will; empty for others."""
    holding = true_conditions(job)
    return holding.get("Failed") or holding.get("FailureTarget") or {}


def is_going(found: Mapping[str, Any]) -> bool:
    """Whether somebody has deleted it; it may be there for a while yet."""
    return bool(found["metadata"].get("deletionTimestamp"))


def uid_of(found: Mapping[str, Any]) -> str:
    return str(found["metadata"]["uid"])


def owner_of(pod: Mapping[str, Any]) -> str:
    """The uid of its Job; empty for an orphan."""
    return next((str(o.get("uid")) for o in pod["metadata"].get("ownerReferences") or [] if o.get("kind") == "Job"), "")
