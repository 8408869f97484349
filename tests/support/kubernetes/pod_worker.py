"""One Pod on its node, from its binding to its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
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
        self._verdict: Json = {}
        self._condition: Json | None = None
        self._forgotten = self._at_once = self.lost = False

    async def run(self) -> None:
        """Returns when nothing of it is left on the node; cancelled, it kills what runs."""
        try:
            life = asyncio.create_task(self._live())
            others = [asyncio.create_task(c) for c in (self._stopping.wait(), self._enforce_deadline(), self._enforce_sizes())]
            await asyncio.wait({life, others[0]}, return_when=asyncio.FIRST_COMPLETED)
            if not life.done():
                await self._terminate(life)
            else:
                life.result()
            for task in others:
                task.cancel()
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

    def vanish(self, *, at_once: bool = False) -> None:
        """The API server does not know it any more."""
        self._forgotten = True
        self._at_once = at_once
        self.stop(0)

    def evict(self, reason: str, message: str, condition: Json | None) -> None:
        """The node ends it: Failed, and the object stays."""
        self._verdict = {"phase": "Failed", "reason": reason, "message": message}
        if condition is not None:
            now = stamp(self._tools.store.now())
            self._condition = {"status": "True", "lastProbeTime": None, "lastTransitionTime": now, **condition}
        self._tell(reason, message, warning=condition is not None)
        self.stop(1)

    async def _enforce_deadline(self) -> None:
        """The Pod's own, not that of its Job."""
        if "activeDeadlineSeconds" in self._pod["spec"]:
            await asyncio.sleep(self._pod["spec"]["activeDeadlineSeconds"])
            self.evict("DeadlineExceeded", "Pod was active on the node longer than the specified deadline", None)

    async def _enforce_sizes(self) -> None:
        """Of volumes on the node's disk, which have no limit of their own."""
        while self._volumes.on_disk:
            await asyncio.sleep(self._tools.knobs.eviction_s)
            if words := await asyncio.to_thread(self._volumes.excess):
                self.evict("Evicted", words, {"type": "DisruptionTarget", "reason": "TerminationByKubelet", "message": words})
                return

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
            if state.ended is None or state.ended["exitCode"] != 0 or self._stopping.is_set():
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
            await self._launch(state, tools.runtime.run(request, [nothing, writer, writer], limits_of(container, tools.knobs)))
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

    async def _launch(self, state: ContainerState, starting: Coroutine[Any, Any, Process]) -> None:
        """Who is cancelled meanwhile waits until the process is there, and ends it. Raises LaunchError."""
        task = asyncio.ensure_future(starting)
        try:
            state.process = await asyncio.shield(task)
        except asyncio.CancelledError:
            with suppress(LaunchError):
                state.process = await task
                self._tools.runtime.kill(state.process, signal.SIGKILL)
            raise

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
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._run_hooks(running)
        for state in running:
            assert state.process is not None
            self._tools.runtime.kill(state.process, signal.SIGTERM)
        while any(c.process and not c.process.status.done() for c in running):
            if loop.time() - began >= (0 if self._at_once else max(self._grace_s, _LEAST_GRACE_S)):
                for state in running:
                    assert state.process is not None
                    self._tools.runtime.kill(state.process, signal.SIGKILL)
            await asyncio.wait([c.process.status for c in running if c.process], timeout=0.05, return_when=asyncio.ALL_COMPLETED)
        await asyncio.gather(*(self._wait(state) for state in running))
        if not life.done():
            life.cancel()
        with suppress(asyncio.CancelledError):
            await life
        for state in self._main:
            if state.ended is None:
                words = "The container could not be located when the pod was terminated"
                state.end(self._tools.store.now(), 137, reason="ContainerStatusUnknown", message=words)

    async def _run_hooks(self, running: list[ContainerState]) -> None:
        """preStop, before SIGTERM and within the grace; none for who is killed at once."""
        hooks = {c["name"]: c.get("lifecycle", {}).get("preStop", {}).get("exec") for c in self._pod["spec"]["containers"]}
        due = [(c.process, hooks[c.name]["command"]) for c in running if c.process is not None and hooks.get(c.name)]
        if due and not self._at_once:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(self._grace_s, _LEAST_GRACE_S)):
                    await asyncio.gather(*(self._run_hook(process, command) for process, command in due))

    async def _run_hook(self, container: Process, command: list[str]) -> None:
        nothing = os.open(os.devnull, os.O_RDWR)
        try:
            hook = await self._tools.runtime.execute(container, command, [nothing, nothing, nothing])
            await hook.status
        except LaunchError as error:
            self._tell("FailedPreStopHook", f"PreStopHook failed: {error}", warning=True)
        finally:
            os.close(nothing)

    def _tell_status(self) -> None:
        if self.lost:
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
        status |= self._verdict
        if (told := self._condition) is not None:
            status["conditions"] = [told, *(c for c in status["conditions"] if c["type"] != told["type"])]

    async def _clear(self) -> None:
        for state in (*self._init, *self._main):
            if state.process is not None:
                await self._tools.runtime.clear(state.process)

    async def _gone(self) -> None:
        """The volumes go with the containers; the object when somebody has asked for that."""
        self._volumes.remove()
        while not self._forgotten:
            pod = self._tools.store.find(PODS, self._namespace, self.name)
            if pod is None or pod["metadata"]["uid"] != self._uid:
                return
            if pod["metadata"].get("deletionTimestamp") and not self.lost:
                options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self._uid}}
                with suppress(ApiError):
                    delete(self._tools.store, PODS, self._namespace, self.name, options)
                return
            self._stopping.clear()
            await self._stopping.wait()

    def _tell(self, reason: str, message: str, *, warning: bool = False, field: str = "") -> None:
        if not self.lost and not self._forgotten:
            self._tools.recorder.tell(self._pod, reason, message, source=_SOURCE, warning=warning, field=field)


def _initial(container: Json, after_init: bool) -> ContainerState:
    waiting = {"reason": "PodInitializing" if after_init else "ContainerCreating"}
    return ContainerState(container["name"], container["image"], waiting=waiting)
