"""What the server says about itself: its version, and its resources for kubectl."""

from __future__ import annotations

from typing import Any

from tests.support.kubernetes.kinds import KINDS, Kind

Json = dict[str, Any]
VERSION = "v1.36.2"


def document(path: str) -> Json | None:
    """None where there is none."""
    path = path.rstrip("/")
    groups = sorted({(k.group, k.version) for k in KINDS if k.group})
    if path == "/version":
        return {"major": "1", "minor": "36", "gitVersion": f"{VERSION}-stand-in", "platform": "linux/amd64"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(g, v) for g, v in groups]}
    if path == "/api/v1":
        return _resources("v1", [k for k in KINDS if not k.group])
    for group, version in groups:
        if path == f"/apis/{group}/{version}":
            return _resources(f"{group}/{version}", [k for k in KINDS if k.group == group])
    return None


def _group(name: str, version: str) -> Json:
    preferred = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [preferred], "preferredVersion": preferred}


def _resources(version: str, kinds: list[Kind]) -> Json:
    found = [_resource(k) for k in kinds]
    if version == "v1":
        found += [{"name": f"pods/{s}", "singularName": "", "namespaced": True, "kind": "Pod", "verbs": ["get"]} for s in ("log", "exec")]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": found}


def _resource(kind: Kind) -> Json:
    verbs = ["create", "delete", "get", "list", "watch", *(["patch"] if kind.patchable else [])]
    about = {"name": kind.resource, "singularName": kind.kind.lower(), "namespaced": kind.namespaced, "kind": kind.kind, "verbs": verbs}
    return about | ({"shortNames": [kind.short]} if kind.short else {})
