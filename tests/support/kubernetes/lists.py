"""LIST with limit and continue: pages of one snapshot. https://kubernetes.io/docs/reference/using-api/api-concepts/#retrieving-large-results-sets-in-chunks"""

from __future__ import annotations

import base64
import binascii
import json
from collections import OrderedDict
from typing import Any

from tests.support.kubernetes.kinds import Kind
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.problems import bad_request, expired
from tests.support.kubernetes.selection import Test
from tests.support.kubernetes.store import Store

Json = dict[str, Any]
_KEPT = 32
_TOO_OLD = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue "
    "parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token "
    "results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and "
    "now may show up in the list."
)


class Lists:
    """Snapshots live for ``continue_s`` of the knobs, or until the history is compacted."""

    def __init__(self, store: Store, knobs: Knobs) -> None:
        self._store = store
        self._knobs = knobs
        self._snapshots: OrderedDict[tuple[int, str, str], tuple[float, list[Json]]] = OrderedDict()

    def page(self, kind: Kind, namespace: str, test: Test, limit: int, token: str, *, selective: bool) -> tuple[list[Json], Json]:
        """Items and the list's metadata; ``limit`` 0 is no limit. Raises ApiError 400, 410."""
        version, after = self._place(token)
        now = self._store.now().timestamp()
        key = (version, kind.resource, namespace)
        if token and version >= 0:
            made_at, items = self._snapshots.get(key, (0.0, []))
            if version < self._store.oldest or now - made_at > self._knobs.continue_s:
                raise self._too_old(after)
        else:
            version = self._store.version
            items = list(self._store.all(kind, namespace))
            if limit:
                self._keep((version, kind.resource, namespace), now, items)
        rest = [item for item in items if _key(item) > after] if after else items
        found = [item for item in rest if test(item)]
        metadata: Json = {"resourceVersion": str(version)}
        if limit and len(found) > limit:
            left = len(found) - limit
            found = found[:limit]
            metadata["continue"] = _token(version, _key(found[-1]))
            if not selective:
                metadata["remainingItemCount"] = left
        return found, metadata

    def _keep(self, key: tuple[int, str, str], now: float, items: list[Json]) -> None:
        self._snapshots[key] = (now, items)
        while len(self._snapshots) > _KEPT:
            self._snapshots.popitem(last=False)

    def _too_old(self, after: str) -> Exception:
        error = expired(_TOO_OLD)
        error.metadata = {"continue": _token(-1, after)}
        return error

    def _place(self, token: str) -> tuple[int, str]:
        if not token:
            return 0, ""
        try:
            read = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
            return int(read["rv"]), str(read["start"])
        except (binascii.Error, ValueError, KeyError, TypeError) as error:
            raise bad_request(f"continue key is not valid: {error}") from None


def _key(item: Json) -> str:
    return f"{item['metadata'].get('namespace', '')}/{item['metadata']['name']}"


def _token(version: int, after: str) -> str:
    return base64.urlsafe_b64encode(json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": after}).encode()).decode().rstrip("=")
