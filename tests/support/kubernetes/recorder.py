"""Events as the controllers and the kubelet write them."""

from __future__ import annotations

import secrets
from typing import Any

from tests.support.kubernetes.kinds import EVENTS, NAMESPACES
from tests.support.kubernetes.store import Store, stamp

Json = dict[str, Any]


class Recorder:
    """The same words about the same object are counted in one event."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._names: dict[tuple[str, str, str], str] = {}

    def tell(self, about: Json, reason: str, message: str, *, source: str, warning: bool = False, field: str = "") -> None:
        """An event about ``about`` in its namespace; ``field`` as in ``spec.containers{sandbox}``."""
        metadata = about["metadata"]
        namespace = metadata["namespace"]
        if self._store.find(NAMESPACES, "", namespace) is None:
            return
        now = stamp(self._store.now())
        key = (metadata["uid"], reason, message)
        known = self._names.get(key, "")
        if self._store.change(EVENTS, namespace, known, lambda e: e.update(count=e["count"] + 1, lastTimestamp=now)):
            return
        involved = {"kind": about["kind"], "namespace": namespace, "name": metadata["name"], "uid": metadata["uid"]}
        involved |= {"apiVersion": about["apiVersion"], "resourceVersion": metadata["resourceVersion"]}
        if field:
            involved["fieldPath"] = field
        event = {
            "metadata": {"name": f"{metadata['name']}.{secrets.token_hex(8)}", "namespace": namespace},
            "involvedObject": involved,
            "reason": reason,
            "message": message,
            "source": {"component": source},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "type": "Warning" if warning else "Normal",
            "eventTime": None,
            "reportingComponent": source,
            "reportingInstance": "",
        }
        self._names[key] = self._store.create(EVENTS, event)["metadata"]["name"]
