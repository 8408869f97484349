"""The resources that this server has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One resource. ``graceful``: a DELETE waits for the kubelet. ``patchable`` means a PATCH is answered at all."""

    group: str
    version: str
    resource: str
    kind: str
    namespaced: bool = True
    graceful: bool = False
    patchable: bool = False
    short: str = ""

    @property
    def api_version(self) -> str:
        """``batch/v1``."""
        return f"{self.group}/{self.version}" if self.group else self.version


JOBS = Kind(group="batch", version="v1", resource="jobs", kind="Job", patchable=True)
PODS = Kind(group="", version="v1", resource="pods", kind="Pod", graceful=True, patchable=True, short="po")
EVENTS = Kind(group="", version="v1", resource="events", kind="Event", short="ev")
NAMESPACES = Kind(group="", version="v1", resource="namespaces", kind="Namespace", namespaced=False, short="ns")
ACCOUNTS = Kind(group="", version="v1", resource="serviceaccounts", kind="ServiceAccount", short="sa")
CLAIMS = Kind(group="", version="v1", resource="persistentvolumeclaims", kind="PersistentVolumeClaim", short="pvc")
QUOTAS = Kind(group="", version="v1", resource="resourcequotas", kind="ResourceQuota", short="quota")
LIMITS = Kind(group="", version="v1", resource="limitranges", kind="LimitRange", short="limits")
NODES = Kind(group="", version="v1", resource="nodes", kind="Node", namespaced=False, short="no")
PRIORITIES = Kind(group="scheduling.k8s.io", version="v1", resource="priorityclasses", kind="PriorityClass", namespaced=False)
RUNTIMES = Kind(group="node.k8s.io", version="v1", resource="runtimeclasses", kind="RuntimeClass", namespaced=False)

KINDS = (JOBS, PODS, EVENTS, NAMESPACES, ACCOUNTS, CLAIMS, QUOTAS, LIMITS, NODES, PRIORITIES, RUNTIMES)


def kind_of(group: str, version: str, resource: str) -> Kind | None:
    """None where there is no such resource."""
    return next((k for k in KINDS if (k.group, k.version, k.resource) == (group, version, resource)), None)
