"""The kubelet of the one node: a worker for each Pod that the scheduler has bound."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.kubernetes.kinds import PODS
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.pod_worker import PodWorker, Tools
from tests.support.kubernetes.recorder import Recorder
from tests.support.kubernetes.runtime import Runtime
from tests.support.kubernetes.scheduler import NODE
from tests.support.kubernetes.store import Change, Store

Json = dict[str, Any]


class Kubelet:
    """``directory`` is where Pods have their volumes."""

    def __init__(self, store: Store, recorder: Recorder, runtime: Runtime, knobs: Knobs, directory: Path, *, set_group: bool) -> None:
        self._store = store
        (directory / "root").mkdir()
        self._tools = Tools(store, recorder, runtime, knobs, directory, set_group)
        self._workers: dict[str, PodWorker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._number = 0
        store.listen(self._hear)

    def _hear(self, change: Change) -> None:
        if change.kind is not PODS:
            return
        uid = change.item["metadata"]["uid"]
        worker = self._workers.get(uid)
        if change.new is None:
            if worker is not None:
                worker.vanish()
            return
        if worker is None and change.new["spec"].get("nodeName") == NODE and change.new["status"]["phase"] not in ("Succeeded", "Failed"):
            self._start(uid, change.new)
        elif worker is not None and change.new["metadata"].get("deletionTimestamp"):
            worker.stop(change.new["metadata"]["deletionGracePeriodSeconds"])

    def _start(self, uid: str, pod: Json) -> None:
        self._number += 1
        address = f"10.244.{self._number // 250 % 256}.{self._number % 250 + 2}"
        worker = self._workers[uid] = PodWorker(self._tools, pod, address)
        task = self._tasks[uid] = asyncio.get_running_loop().create_task(worker.run())
        task.add_done_callback(lambda done: self._ended(uid, done))

    def _ended(self, uid: str, task: asyncio.Task[None]) -> None:
        del self._tasks[uid]
        del self._workers[uid]
        if not task.cancelled() and task.exception() is not None:
            asyncio.get_running_loop().call_exception_handler({"message": f"the worker of Pod {uid}", "exception": task.exception()})

    def worker(self, namespace: str, name: str) -> PodWorker | None:
        """Of a Pod that this node has."""
        pod = self._store.find(PODS, namespace, name)
        return None if pod is None else self._workers.get(pod["metadata"]["uid"])

    @property
    def pods(self) -> list[str]:
        """The names of those that are not wholly gone, also where the API has forgotten them."""
        return [w.name for w in self._workers.values()]

    async def close(self) -> None:
        """Kills what runs."""
        for worker in list(self._workers.values()):
            worker.vanish(at_once=True)
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=10)
            for task in late:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
