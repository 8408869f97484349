"""The Docker backend: each sandbox is a container with the runner as PID 1.

Everything that is known of a sandbox is on the daemon (names.py), so that any process that reaches the daemon can go on with it. Workspace,
home, /tmp and spool are memory of the container and go with it (layout.py).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.backends.breaker import BreakerState
from cifixer_exec.backends.docker_local import images, layout
from cifixer_exec.backends.docker_local.containers import Containers, DockerOptions, is_alive
from cifixer_exec.backends.docker_local.daemon import Address, Daemon, daemon_at
from cifixer_exec.backends.docker_local.death import REMOVED, cause_of_death
from cifixer_exec.backends.docker_local.names import CREATED_AT, EXPIRES_AT, SANDBOX_ID, SET_AT, TOKEN, Names
from cifixer_exec.backends.docker_local.networks import possible_networks
from cifixer_exec.backends.docker_local.stream import DIAL_TIMEOUT_S, RefusedError, dial_exec
from cifixer_exec.backends.readings import number
from cifixer_exec.backends.threads import asking
from cifixer_exec.channel.transport import Dial, Transport
from cifixer_exec.errors import BackendUnavailableError, ExecutorError, SandboxLostError
from cifixer_exec.model import Capabilities, Health, Inspection, SandboxHandle, SandboxSpec, check_id

#: What nobody owns any more is removed by whoever makes the next sandbox: so long after its end, looking so often.
LITTER_AGE_S, LITTER_PAUSE_S, LITTER_MOST = 60.0, 30.0, 5

_littering = threading.Lock()
_looked_at: dict[str, float] = {}


class DockerBackend(Backend):
    """See the module. ``namespace``: what is labelled with it is ours to reap."""

    name = "docker_local"

    def __init__(
        self, *, address: Address, namespace: str, options: DockerOptions | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._address = address
        self._names = Names(namespace)
        self._options = options or DockerOptions()
        self._clock = clock

    @property
    def placement(self) -> str:
        """The daemon: its name, and what follows from its own id. Raises BackendUnavailableError when it does not answer."""
        return self._daemon.facts.placement

    @property
    def capabilities(self) -> Capabilities:
        """Raises BackendUnavailableError when the daemon does not answer."""
        facts = self._daemon.facts
        return Capabilities(
            images=True,
            memory=facts.memory,
            cpus=facts.cpus,
            disk=self._options.disk == "memory" and not facts.podman,  # which mounts another /tmp over ours
            # The kernel does not count root's processes: then the control group is all there is.
            max_processes=facts.max_processes or not self._options.commands_as_root,
            networks=possible_networks(facts, self._options.network),
        )

    @property
    def breaker_state(self) -> BreakerState:
        return self._daemon.breaker.state

    def remedy_for(self, name: str) -> str:
        if name == "readonly_paths":
            return "the daemon may be on another machine; put what is needed into the image, or upload it"
        if name == "disk_bytes":
            return "leave it out: with CIFIXER_DOCKER_DISK=volume, and with Podman, the size of the disk is not limited"
        return "the daemon's control groups do not offer it (docker info says why), or leave it out"

    def probe(self) -> Health:
        """Makes a real sandbox of the default image and removes it, if that is there; nothing is pulled for it."""
        details = {"daemon": self._address.host or "the usual socket"}
        try:
            facts = self._daemon.facts
            details |= {"placement": facts.placement, "server": facts.server, "networks": ", ".join(self.capabilities.networks)}
            limits = {"memory": facts.memory, "cpus": facts.cpus, "disk": self.capabilities.disk}
            absent = [name for name, enforced in limits.items() if not enforced]
            details["limits"] = f"{', '.join(absent)} NOT limited" if absent else "memory, cpus, processes, disk"
            details["limits_remedy"] = "docker info says what this daemon cannot limit, and why; a disk of memory has a size"
            if not images.is_there(self._daemon, self._options.image):
                details["image"] = (
                    f"{self._options.image} is not there yet: the first sandbox pulls it ('docker pull' before makes that one fast)"
                )
                return Health(ok=True, summary="the Docker daemon answers; nothing was tried out", details=details)
            self._try_out()
        except ExecutorError as error:
            return Health(ok=False, summary=str(error), remedy=error.code, details=details)
        return Health(ok=True, summary="Docker sandboxes work", details=details)

    def _try_out(self) -> None:
        spec = SandboxSpec(backend=self.name, sandbox_id=f"probe-{uuid.uuid4().hex[:12]}", image=self._options.image, lifetime_s=60)
        self.destroy(self.create(spec))

    def create(self, spec: SandboxSpec) -> SandboxHandle:
        self.check(spec)
        check_id(spec.sandbox_id, "sandbox id")
        self._remove_litter()
        return self._handle(spec.sandbox_id, self._containers.make(spec))

    def token(self, handle: SandboxHandle) -> str:
        return str(handle.data.get("token", ""))

    def dial(self, handle: SandboxHandle) -> Dial:
        daemon, container = self._daemon, self._names.container(handle.sandbox_id)
        # Commands that are root could read it from there in the moment before the bridge gives its capabilities up.
        without = (layout.TOKEN,) if self.token(handle) else ()

        async def dial() -> Transport:
            if daemon.breaker.state is not BreakerState.CLOSED:
                await asking(daemon.breaker.check)
            version = (await asking(lambda: daemon.facts)).api_version
            user, command = layout.BRIDGE_USER, layout.BRIDGE
            try:
                return await dial_exec(
                    daemon.endpoint, api_version=version, container=container, user=user, command=command, without=without
                )
            except RefusedError as error:
                if "is paused" in str(error):  # by somebody with access to the daemon: it lives, and must not be taken for lost
                    raise BackendUnavailableError(f"{error}: docker unpause {container}") from None
                raise  # it has answered; what of the container is for inspect to say
            except TimeoutError:
                # One that is slow tells nothing of the sandbox, which would count as lost and be removed. And one sandbox whose execs hang
                # must not open the breaker for all others, so whether the daemon is there is asked for apart.
                await asking(daemon.breaker.look)
                raise BackendUnavailableError(f"the Docker daemon has not opened a channel within {DIAL_TIMEOUT_S:g} s") from None
            except OSError as error:
                daemon.breaker.heard(error)
                raise

        return dial

    def destroy(self, handle: SandboxHandle) -> None:
        containers = self._containers
        found = containers.find(handle.sandbox_id)
        if found is not None:
            containers.check_ours(found, handle.sandbox_id)
            containers.remove(str(found["Id"]))
        containers.volumes.remove(handle.sandbox_id)

    def inspect(self, handle: SandboxHandle) -> Inspection:
        found = self._containers.ours(handle.sandbox_id)
        if found is None:
            return Inspection(alive=False, cause=REMOVED)
        if is_alive(found):
            return Inspection(alive=True)
        return Inspection(alive=False, cause=cause_of_death(self._daemon, found))

    def extend(self, handle: SandboxHandle, expires_at_s: float) -> None:
        found = self._containers.ours(handle.sandbox_id)
        if found is None or not is_alive(found):
            raise SandboxLostError(f"the container of sandbox {handle.sandbox_id!r} is gone, so its lifetime cannot be moved")
        self._containers.volumes.set_deadline(handle.sandbox_id, expires_at_s)

    def list_owned(self) -> Sequence[Owned]:
        with self._daemon.asked("listing its containers"):
            containers = self._daemon.api.containers(all=True, filters=self._names.filters())
        moved = self._containers.volumes.latest()
        found: dict[str, Owned] = {}
        for container in containers:
            labels = container["Labels"]
            sandbox_id = labels[SANDBOX_ID]
            created = number(labels.get(CREATED_AT), float(container["Created"]))
            expires = number({**labels, **moved.pop(sandbox_id, {})}.get(EXPIRES_AT), created)
            found[sandbox_id] = self._owned(sandbox_id, created, expires, labels.get(TOKEN, ""))
        for sandbox_id, labels in moved.items():  # their containers were removed by somebody else
            found[sandbox_id] = self._owned(sandbox_id, number(labels.get(CREATED_AT), number(labels.get(SET_AT), 0.0) / 1e9), 0.0)
        return list(found.values())

    def _owned(self, sandbox_id: str, created_at_s: float, expires_at_s: float, token: str = "") -> Owned:
        return Owned(handle=self._handle(sandbox_id, token), created_at_s=created_at_s, expires_at_s=expires_at_s)

    def _handle(self, sandbox_id: str, token: str) -> SandboxHandle:
        data = {"token": token} if token else {}
        return SandboxHandle(backend=self.name, sandbox_id=sandbox_id, placement=self.placement, data=data)

    @property
    def _daemon(self) -> Daemon:
        return daemon_at(self._address)

    @property
    def _containers(self) -> Containers:
        return Containers(self._daemon, self._names, self._options, self._clock)

    def _remove_litter(self) -> None:
        """Remove what crashed clients left: their sandboxes ended by themselves, but containers stay. Never raises."""
        with _littering:
            if time.monotonic() - _looked_at.get(self._names.namespace, float("-inf")) < LITTER_PAUSE_S:
                return
            _looked_at[self._names.namespace] = time.monotonic()
        with suppress(ExecutorError):
            now = self._clock()
            old = [o for o in self.list_owned() if now - max(o.created_at_s, o.expires_at_s) > LITTER_AGE_S]
            dead = (owned for owned in old if not self.inspect(owned.handle).alive)
            for owned in islice(dead, LITTER_MOST):
                self.destroy(owned.handle)
