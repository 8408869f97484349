"""The events of one watch. https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from tests.support.kubernetes.kinds import Kind
from tests.support.kubernetes.problems import expired
from tests.support.kubernetes.selection import Test
from tests.support.kubernetes.store import Change, Store

Json = dict[str, Any]


class Watch:
    """``version`` "": what is there comes first as ADDED, as it does for "0". An older one than the history has: one ERROR event, 410.

    ``bookmark_s`` 0 sends none.
    """

    def __init__(self, store: Store, kind: Kind, namespace: str, test: Test, version: str, bookmark_s: float) -> None:
        self._store = store
        self._kind = kind
        self._namespace = namespace
        self._test = test
        self._version = version
        self._bookmark_s = bookmark_s
        self._queue: asyncio.Queue[Change | None] = asyncio.Queue()
        self._end: Callable[[], None] | None = store.listen(self._hear)

    def close(self) -> None:
        """No more events are gathered, and the iteration ends."""
        if self._end is not None:
            self._end()
            self._end = None
            self._queue.put_nowait(None)

    async def events(self) -> AsyncIterator[Json]:
        """Until it is closed."""
        start = self._store.version
        if self._version not in ("", "0"):
            start = int(self._version)
            if start < self._store.oldest:
                words = f"too old resource version: {start} ({self._store.oldest})"
                yield {"type": "ERROR", "object": expired(words).body}
                return
        for event in self._first(start):
            yield event
        while True:
            try:
                async with asyncio.timeout(self._bookmark_s or None):
                    change = await self._queue.get()
            except TimeoutError:
                yield self.bookmark()
                continue
            if change is None:
                return
            if change.version > start and (told := self._event(change)) is not None:
                yield told

    def bookmark(self) -> Json:
        """How far this watch has come: nothing that is relevant to it and older is missing."""
        metadata = {"resourceVersion": str(self._store.version), "creationTimestamp": None}
        body: Json = {"kind": self._kind.kind, "apiVersion": self._kind.api_version, "metadata": metadata}
        return {"type": "BOOKMARK", "object": body | ({"spec": {}, "status": {}} if self._kind.resource != "events" else {})}

    def _first(self, start: int) -> list[Json]:
        if self._version in ("", "0"):
            items = self._store.all(self._kind, self._namespace)
            return [{"type": "ADDED", "object": item} for item in items if self._test(item)]
        while not self._queue.empty():  # the history has them too
            self._queue.get_nowait()
        events = [self._event(change) for change in self._store.since(start) if self._is_mine(change)]
        return [event for event in events if event is not None]

    def _hear(self, change: Change) -> None:
        if self._is_mine(change):
            self._queue.put_nowait(change)

    def _is_mine(self, change: Change) -> bool:
        namespace = change.item["metadata"].get("namespace", "")
        return change.kind is self._kind and (not self._namespace or namespace == self._namespace)

    def _event(self, change: Change) -> Json | None:
        """An object that begins or ceases to match its selector comes and goes like one that is made and deleted."""
        was = change.old is not None and self._test(change.old)
        if change.new is not None and self._test(change.new):
            return {"type": "MODIFIED" if was else "ADDED", "object": change.new}
        if not was or change.old is None:
            return None
        last = change.old
        if change.new is not None:
            last = {**last, "metadata": {**last["metadata"], "resourceVersion": change.new["metadata"]["resourceVersion"]}}
        return {"type": "DELETED", "object": last}
