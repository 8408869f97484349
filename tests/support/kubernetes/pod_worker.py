"""One Pod on its node, from its binding to its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.kubernetes.container import ConfigError, limits_of, request_of
from tests.support.kubernetes.deletion import delete
from tests.support.kubernetes.images import PullError, image
from tests.support.kubernetes.kinds import PODS
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.logs import Log
from tests.support.kubernetes.pod_status import ContainerState, conditions, phase_of
from tests.support.kubernetes.problems import ApiError
from tests.support.kubernetes.recorder import Recorder
from tests.support.kubernetes.runtime import LaunchError, Process, Runtime
from tests.support.kubernetes.store import Store, stamp
from tests.support.kubernetes.volumes import VolumeError, Volumes

Json = dict[str, Any]
_SOURCE = "kubelet"
HOST_ADDRESS = "192.0.2.10"
#: Whatever was asked for, a container has this long between SIGTERM and SIGKILL: kuberuntime's minimumGracePeriodInSeconds.
_LEAST_GRACE_S = 2
_MOUNT_RETRY_S = 0.5


@dataclass
class Tools:
    """What every worker needs."""

    store: Store
    recorder: Recorder
    runtime: Runtime
    knobs: Knobs
    directory: Path
    set_group: bool


class PodWorker:
    """``run`` is its life; the other methods may be called meanwhile."""

    def __init__(self, tools: Tools, pod: Json, address: str) -> None:
        self._tools = tools
        self._pod = pod
        self._address = address
        metadata, spec = pod["metadata"], pod["spec"]
        self.name, self._namespace, self._uid = metadata["name"], metadata["namespace"], metadata["uid"]
        self._volumes = Volumes(pod, tools.directory / "pods" / self._uid, tools.directory / "claims", set_group=tools.set_group)
        self._init = [_initial(c, bool(spec.get("initContainers"))) for c in spec.get("initContainers") or []]
        self._main = [_initial(c, bool(spec.get("initContainers"))) for c in spec["containers"]]
        self.logs = {c.name: Log() for c in (*self._init, *self._main)}
        self._stopping = asyncio.Event()
        self._grace_s: float = 30.0
        self._extra: Json = {}
        self.lost = False

    async def run(self) -> None:
        """Returns when nothing of it is left on the node; cancelled, it kills what runs."""
        try:
            life = asyncio.create_task(self._live())
            stopped = asyncio.create_task(self._stopping.wait())
            await asyncio.wait({life, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not life.done():
                await self._terminate(life)
            else:
                life.result()
            stopped.cancel()
            self._tell_status()
            await self._clear()
            await self._gone()
        finally:
            for state in (*self._init, *self._main):
                if state.process is not None:
                    self._tools.runtime.kill(state.process, signal.SIGKILL)
            self._volumes.remove()

    def stop(self, grace_s: float) -> None:
        """SIGTERM now, SIGKILL after the grace. A later call may only shorten it."""
        self._grace_s = min(self._grace_s, grace_s) if self._stopping.is_set() else grace_s
        self._stopping.set()

    def vanish(self, *, grace_s: float = _LEAST_GRACE_S) -> None:
        """The API server does not know it any more."""
        self._extra["forgotten"] = True
        self.stop(grace_s)

    def evict(self, reason: str, message: str, condition: Json) -> None:
        """The node ends it: Failed, and the object stays."""
        now = stamp(self._tools.store.now())
        told = {"status": "True", "lastProbeTime": None, "lastTransitionTime": now, **condition}
        self._extra |= {"status": {"phase": "Failed", "reason": reason, "message": message}, "condition": told}
        self._tell("Evicted", message, warning=True)
        self.stop(0)

    def lose(self) -> None:
        """The node does not answer any more: nothing is told, nothing can be asked, and what ran on it has stopped."""
        self.lost = True
        for state in (*self._init, *self._main):
            if state.process is not None:
                self._tools.runtime.kill(state.process, signal.SIGKILL)

    def container(self, name: str) -> Process | None:
        """The process of one that has been started; it may have ended."""
        return next((c.process for c in (*self._init, *self._main) if c.name == name and c.process is not None), None)

    async def _live(self) -> None:
        self._tell_status()
        if not await self._mount():
            return
        for state, container in zip(self._init, self._pod["spec"].get("initContainers") or [], strict=True):
            await self._run_container(state, container, "initContainers")
            await self._wait(state)
            if state.ended is None or state.ended["exitCode"] != 0:
                self._tell_status()
                return
        self._tell_status()
        for state, container in zip(self._main, self._pod["spec"]["containers"], strict=True):
            await self._run_container(state, container, "containers")
        self._tell_status()
        await asyncio.gather(*(self._wait(state) for state in self._main))

    async def _mount(self) -> bool:
        try:
            self._volumes.make()
        except VolumeError as error:
            self._tell("FailedMount", str(error), warning=True)
            await asyncio.Event().wait()  # the kubelet tries for ever
        return True

    async def _run_container(self, state: ContainerState, container: Json, kind: str) -> None:
        """Returns when it has been started, or has ended without."""
        field = f"spec.{kind}{{{state.name}}}"
        root = await self._pull(state, field)
        while True:
            try:
                await self._start(state, container, root, field)
                return
            except (ConfigError, VolumeError) as error:
                self._wait_for(state, "CreateContainerConfigError", str(error))
                self._tell("Failed", f"Error: {error}", warning=True, field=field)
                await asyncio.sleep(self._tools.knobs.pull_backoff_s)

    async def _start(self, state: ContainerState, container: Json, root: Json, field: str) -> None:
        tools = self._tools
        mounts = self._volumes.mounts(container)
        point = str(tools.directory / "root")
        request = request_of(self._pod, container, root, mounts, self._volumes.shm, point, tools.knobs)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            self._tell("Created", f"Container created: {state.name}", field=field)
            state.process = await tools.runtime.run(request, [nothing, writer, writer], limits_of(container, tools.knobs))
        except LaunchError as error:
            os.close(reader)
            words = f"failed to create containerd task: failed to create shim task: OCI runtime create failed: {error}"
            if error.reason == "start":
                words = f"{words.rpartition(': ')[0]}: unable to start container process: {error}"
            state.end(tools.store.now(), 128, reason="StartError", message=words)
            self._tell("Failed", f"Error: {words}", warning=True, field=field)
            return
        finally:
            os.close(writer)
            os.close(nothing)
        self.logs[state.name].read(reader)
        state.waiting = None
        state.started_at = stamp(tools.store.now())
        self._tell("Started", f"Container started: {state.name}", field=field)
        if state in self._init:
            self._tell_status()

    async def _pull(self, state: ContainerState, field: str) -> Json:
        """Tried again for ever, with a back-off."""
        while True:
            try:
                root = image(state.image, self._tools.knobs)
            except PullError as error:
                await self._refused(state, error, field)
                continue
            self._tell("Pulled", f'Container image "{state.image}" already present on machine', field=field)
            return root

    async def _refused(self, state: ContainerState, error: PullError, field: str) -> None:
        if error.reason == "InvalidImageName":
            self._tell("InspectFailed", str(error), warning=True, field=field)
            self._tell("Failed", "Error: InvalidImageName", warning=True, field=field)
            self._wait_for(state, "InvalidImageName", str(error))
            await asyncio.sleep(self._tools.knobs.pull_backoff_s)
            return
        self._tell("Pulling", f'Pulling image "{state.image}"', field=field)
        self._tell("Failed", f'Failed to pull image "{state.image}": {error}', warning=True, field=field)
        self._tell("Failed", "Error: ErrImagePull", warning=True, field=field)
        self._wait_for(state, "ErrImagePull", str(error))
        await asyncio.sleep(self._tools.knobs.pull_backoff_s / 5)
        self._tell("BackOff", f'Back-off pulling image "{state.image}"', field=field)
        self._tell("Failed", "Error: ImagePullBackOff", warning=True, field=field)
        self._wait_for(state, "ImagePullBackOff", f'Back-off pulling image "{state.image}": ErrImagePull: {error}')
        await asyncio.sleep(self._tools.knobs.pull_backoff_s)

    def _wait_for(self, state: ContainerState, reason: str, message: str) -> None:
        state.waiting = {"reason": reason, "message": message}
        self._tell_status()

    async def _wait(self, state: ContainerState) -> None:
        if state.process is None or state.ended is not None:
            return
        await asyncio.shield(state.process.status)
        out_of_memory = state.process.out_of_memory
        await self._tools.runtime.clear(state.process)
        await self.logs[state.name].end()
        if state.ended is None:
            state.end(self._tools.store.now(), state.process.exit_code, out_of_memory=out_of_memory)
        if any(c.running for c in (*self._init, *self._main)):
            self._tell_status()

    async def _terminate(self, life: asyncio.Task[None]) -> None:
        """Each container that runs gets its signals; one that was being started is waited for."""
        running = [c for c in (*self._init, *self._main) if c.running]
        if not running:
            life.cancel()
            with suppress(asyncio.CancelledError):
                await life
            running = [c for c in (*self._init, *self._main) if c.running]
        for state in running:
            assert state.process is not None
            self._tell("Killing", f"Stopping container {state.name}", field=f"spec.containers{{{state.name}}}")
            self._tools.runtime.kill(state.process, signal.SIGTERM)
        loop = asyncio.get_running_loop()
        began = loop.time()
        while any(c.process and not c.process.status.done() for c in running):
            if loop.time() - began >= max(self._grace_s, _LEAST_GRACE_S if self._grace_s else 0):
                for state in running:
                    assert state.process is not None
                    self._tools.runtime.kill(state.process, signal.SIGKILL)
            await asyncio.wait([c.process.status for c in running if c.process], timeout=0.05, return_when=asyncio.ALL_COMPLETED)
        await asyncio.gather(*(self._wait(state) for state in running))
        if not life.done():
            life.cancel()
        with suppress(asyncio.CancelledError):
            await life
        for state in (*self._init, *self._main):
            if state.ended is None and state.process is None:
                state.waiting = state.waiting or {"reason": "ContainerCreating"}

    def _tell_status(self) -> None:
        if not self._tools.knobs.kubelet or self.lost:
            return
        self._tools.store.change(PODS, self._namespace, self.name, self._edit)

    def _edit(self, pod: Json) -> None:
        if pod["metadata"]["uid"] != self._uid:
            return
        status, now = pod["status"], self._tools.store.now()
        phase = phase_of(self._init, self._main)
        if self._stopping.is_set() and not any(c.running for c in (*self._init, *self._main)):
            phase = phase if phase in ("Succeeded", "Failed") else "Failed"
        status |= {
            "phase": phase,
            "hostIP": HOST_ADDRESS,
            "hostIPs": [{"ip": HOST_ADDRESS}],
            "startTime": status.get("startTime") or stamp(now),
        }
        if any(c.started_at for c in (*self._init, *self._main)):
            status |= {"podIP": self._address, "podIPs": [{"ip": self._address}]}
        status["conditions"] = conditions(status.get("conditions") or [], now, self._init, self._main, phase)
        status["containerStatuses"] = [c.shown() for c in self._main]
        if self._init:
            status["initContainerStatuses"] = [c.shown() for c in self._init]
        status |= self._extra.get("status", {})
        if told := self._extra.get("condition"):
            status["conditions"] = [told, *(c for c in status["conditions"] if c["type"] != told["type"])]

    async def _clear(self) -> None:
        for state in (*self._init, *self._main):
            if state.process is not None:
                await self._tools.runtime.clear(state.process)

    async def _gone(self) -> None:
        """The volumes go with the containers; the object when somebody has asked for that."""
        self._volumes.remove()
        while not self._extra.get("forgotten"):
            pod = self._tools.store.find(PODS, self._namespace, self.name)
            if pod is None or pod["metadata"]["uid"] != self._uid:
                return
            if pod["metadata"].get("deletionTimestamp") and not self.lost and self._tools.knobs.kubelet:
                with suppress(ApiError):
                    delete(
                        self._tools.store, PODS, self._namespace, self.name, {"gracePeriodSeconds": 0, "preconditions": {"uid": self._uid}}
                    )
                return
            self._stopping.clear()
            await self._stopping.wait()

    def _tell(self, reason: str, message: str, *, warning: bool = False, field: str = "") -> None:
        if not self.lost and not self._extra.get("forgotten"):
            self._tools.recorder.tell(self._pod, reason, message, source=_SOURCE, warning=warning, field=field)


def _initial(container: Json, after_init: bool) -> ContainerState:
    waiting: Callable[[], Json] = lambda: {"reason": "PodInitializing" if after_init else "ContainerCreating"}  # noqa: E731
    return ContainerState(container["name"], container["image"], waiting=waiting())
