"""What etcd and its cache are to an API server: objects, one growing resource version, and a bounded history for watches."""

from __future__ import annotations

import copy
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.support.kubernetes.kinds import Kind
from tests.support.kubernetes.problems import already_exists, not_found

Json = dict[str, Any]
Key = tuple[str, str]
_HISTORY = 10_000


@dataclass(frozen=True, kw_only=True)
class Change:
    """``old`` None: created. ``new`` None: gone, and ``old`` is the last state with the resource version of the deletion."""

    version: int
    kind: Kind
    old: Json | None
    new: Json | None

    @property
    def item(self) -> Json:
        """The object, or its last state."""
        found = self.new if self.new is not None else self.old
        assert found is not None
        return found


Listener = Callable[[Change], None]


class Store:
    """Objects are never changed in place: who has one may keep it. ``now`` gives the time of day."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.now = now
        self.version = 1000
        self.oldest = 1000
        self._objects: dict[str, dict[Key, Json]] = {}
        self._uids: dict[str, Key] = {}
        self._history: deque[Change] = deque(maxlen=_HISTORY)
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> Callable[[], None]:
        """``listener`` is told each change, at once. Returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def find(self, kind: Kind, namespace: str, name: str) -> Json | None:
        """None when there is none."""
        return self._objects.get(kind.resource, {}).get((namespace, name))

    def get(self, kind: Kind, namespace: str, name: str) -> Json:
        """Raises ApiError 404."""
        found = self.find(kind, namespace, name)
        if found is None:
            raise not_found(kind.group, kind.resource, name)
        return found

    def by_uid(self, kind: Kind, uid: str) -> Json | None:
        """None when there is none."""
        key = self._uids.get(uid)
        return None if key is None else self._objects.get(kind.resource, {}).get(key)

    def all(self, kind: Kind, namespace: str = "") -> Iterator[Json]:
        """In the order of their keys, as etcd has them; of one namespace or of all."""
        objects = self._objects.get(kind.resource, {})
        for key in sorted(objects):
            if not namespace or key[0] == namespace:
                yield objects[key]

    def create(self, kind: Kind, item: Json) -> Json:
        """With a uid, a time and a version of its own. Raises ApiError 409."""
        made = copy.deepcopy(item)
        metadata = made["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        objects = self._objects.setdefault(kind.resource, {})
        if key in objects:
            raise already_exists(kind.group, kind.resource, metadata["name"])
        metadata["uid"] = metadata.get("uid") or str(uuid.uuid4())
        metadata["creationTimestamp"] = stamp(self.now())
        made |= {"apiVersion": kind.api_version, "kind": kind.kind}
        self._put(kind, objects, key, None, made)
        return made

    def update(self, kind: Kind, item: Json) -> Json:
        """Replaces the object of that name; the same content is no change. Raises ApiError 404."""
        metadata = item["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        old = self.get(kind, *key)
        if old == item:
            return old
        new = copy.deepcopy(item)
        self._put(kind, self._objects[kind.resource], key, old, new)
        return new

    def change(self, kind: Kind, namespace: str, name: str, edit: Callable[[Json], None]) -> Json | None:
        """``edit`` changes a copy, which is stored. None when the object is not there."""
        old = self.find(kind, namespace, name)
        if old is None:
            return None
        new = copy.deepcopy(old)
        edit(new)
        return self.update(kind, new)

    def remove(self, kind: Kind, namespace: str, name: str) -> Json | None:
        """Its last state, or None when it was not there."""
        old = self._objects.get(kind.resource, {}).pop((namespace, name), None)
        if old is None:
            return None
        self._uids.pop(old["metadata"]["uid"], None)
        self.version += 1
        last = copy.deepcopy(old)
        last["metadata"]["resourceVersion"] = str(self.version)
        self._tell(Change(version=self.version, kind=kind, old=last, new=None))
        return last

    def since(self, version: int) -> list[Change]:
        """What has happened after ``version``; the caller has seen that it is not older than :attr:`oldest`."""
        return [change for change in self._history if change.version > version]

    def compact(self) -> None:
        """Forgets the history, as etcd does every five minutes."""
        self._history.clear()
        self.oldest = self.version

    def _put(self, kind: Kind, objects: dict[Key, Json], key: Key, old: Json | None, new: Json) -> None:
        self.version += 1
        new["metadata"]["resourceVersion"] = str(self.version)
        objects[key] = new
        self._uids[new["metadata"]["uid"]] = key
        self._tell(Change(version=self.version, kind=kind, old=old, new=new))

    def _tell(self, change: Change) -> None:
        if len(self._history) == _HISTORY:
            self.oldest = self._history[0].version
        self._history.append(change)
        for listener in list(self._listeners):
            listener(change)


def stamp(moment: datetime) -> str:
    """As in ``creationTimestamp``: whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment_of(text: str) -> datetime:
    """The reverse."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
