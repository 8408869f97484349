"""Kubeconfigs as kubectl reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def kubeconfig(path: Path, server: str, *, user: dict[str, Any] | None = None, namespace: str = "ns", **cluster: Any) -> str:
    """A file with one context that leads to ``server``; its path. ``user``, ``cluster``: further members of these entries."""
    found = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "u", "user": {"token": "a-token"} if user is None else user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
    }
    path.write_text(json.dumps(found))
    return str(path)
