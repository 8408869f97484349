"""The Docker backend: each sandbox is a container with the runner as PID 1.

Everything that is known of a sandbox is on the daemon, so that any process that reaches the daemon can go on with it::

    container  cifixer-<sandbox id>-<hash>        labelled before it starts; its name follows from namespace and sandbox id
    volume     cifixer-expiry-<hash>-<time>       mounted nowhere: its labels carry the deadline that ``extend`` set,
                                                  because a container's own labels cannot be changed. The newest counts
    volume     cifixer-disk-<hash>                the disk, where that was asked for instead of memory

Workspace, home, /tmp and spool are memory of the container and go with it (layout.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from docker.errors import APIError, ImageNotFound, NotFound

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.backends.breaker import BreakerState
from cifixer_exec.backends.docker_local import images, layout
from cifixer_exec.backends.docker_local.daemon import Address, Daemon, daemon_at
from cifixer_exec.backends.docker_local.death import cause_of_death
from cifixer_exec.backends.docker_local.networks import network_mode, possible_networks
from cifixer_exec.backends.docker_local.stream import RefusedError, dial_exec
from cifixer_exec.backends.docker_local.vendor_errors import VENDOR_ERRORS, explanation, remedy, translate
from cifixer_exec.channel.transport import Dial, Transport
from cifixer_exec.errors import (
    BackendError,
    BackendUnavailableError,
    CapacityError,
    ExecutorError,
    InvalidRequestError,
    SandboxLostError,
    SandboxStartError,
)
from cifixer_exec.model import Capabilities, Health, Inspection, SandboxHandle, SandboxSpec, check_id

SANDBOX_ID, PLACEMENT, NAMESPACE = "cifixer.sandbox_id", "cifixer.placement", "cifixer.namespace"
EXPIRES_AT, CREATED_AT, SET_AT = "cifixer.expires_at", "cifixer.created_at", "cifixer.set_at"
#: Whoever can read it controls the daemon anyway.
TOKEN = "cifixer.token"  # noqa: S105  # its name
#: A daemon gets slower, not faster, with more containers in the making at once.
MOST_CREATIONS = 16
#: How often a removal that another has begun, or a name that was just taken, is looked at again.
_TRIES, _PAUSE_S = 50, 0.1
#: What nobody owns any more is removed by whoever makes the next sandbox: so long after its end, looking so often.
LITTER_AGE_S, LITTER_PAUSE_S, LITTER_MOST = 60.0, 30.0, 5

_creations = threading.BoundedSemaphore(MOST_CREATIONS)
_littering = threading.Lock()
_looked_at: dict[str, float] = {}


@dataclass(frozen=True, kw_only=True)
class DockerOptions:
    """How sandboxes are made on this daemon, whatever their spec. The defaults are the safe choices."""

    image: str = images.DEFAULT_IMAGE
    runtime: str = ""
    #: "memory": of a true size, and part of the container's memory. "volume": on the daemon's disk, where no limit holds for it.
    disk: str = "memory"
    #: Another network for the policy "bridge"; empty: one of ours (networks.py).
    network: str = ""
    #: What is written outside of the sandbox's disk is on the daemon's, and no limit holds for it.
    writable_root: bool = False
    #: For package managers: commands are root, with :data:`layout.ROOT_CAPABILITIES` and a writable root.
    commands_as_root: bool = False


class DockerBackend(Backend):
    """See the module. ``namespace``: what is labelled with it is ours to reap."""

    name = "docker_local"

    def __init__(
        self, *, address: Address, namespace: str, options: DockerOptions | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._address = address
        self._namespace = namespace
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
            disk=self._options.disk == "memory",
            max_processes=True,
            networks=possible_networks(facts, self._options.network),
        )

    @property
    def breaker_state(self) -> BreakerState:
        return self._daemon.breaker.state

    def remedy_for(self, name: str) -> str:
        if name == "readonly_paths":
            return "the daemon may be on another machine; put what is needed into the image, or upload it"
        return "the daemon's control groups do not offer it (docker info says why), or leave it out"

    def probe(self) -> Health:
        """Makes a real sandbox of the default image and removes it, if that is there; nothing is pulled for it."""
        details = {"daemon": self._address.host or "the usual socket"}
        try:
            facts = self._daemon.facts
            details |= {"placement": facts.placement, "server": facts.server, "networks": ", ".join(self.capabilities.networks)}
            absent = [n for n in ("memory", "cpus") if not getattr(facts, n)]
            details["limits"] = f"{', '.join(absent)} NOT limited (docker info says why)" if absent else "memory, cpus, processes, disk"
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
        with _creations:
            for _ in range(_TRIES):
                found = self._find(spec.sandbox_id)
                if found is None:
                    token = secrets.token_hex(32) if self._options.commands_as_root else ""
                    if self._make(spec, token):
                        return self._handle(spec.sandbox_id, token)
                elif self._adopt(found, spec.sandbox_id):
                    return self._handle(spec.sandbox_id, found["Config"]["Labels"].get(TOKEN, ""))
                time.sleep(_PAUSE_S)
        raise SandboxStartError(f"the container {self._container(spec.sandbox_id)!r} is made and removed by others all the time: try again")

    def token(self, handle: SandboxHandle) -> str:
        return str(handle.data.get("token", ""))

    def dial(self, handle: SandboxHandle) -> Dial:
        daemon, container = self._daemon, self._container(handle.sandbox_id)

        async def dial() -> Transport:
            if daemon.breaker.state is not BreakerState.CLOSED:
                await asyncio.to_thread(daemon.breaker.check)
            version = (await asyncio.to_thread(lambda: daemon.facts)).api_version
            user, command = layout.BRIDGE_USER, layout.BRIDGE
            try:
                return await dial_exec(daemon.endpoint, api_version=version, container=container, user=user, command=command)
            except RefusedError:
                raise  # it has answered; what of the container is for inspect to say
            except OSError as error:
                daemon.heard(error)
                raise

        return dial

    def destroy(self, handle: SandboxHandle) -> None:
        found = self._find(handle.sandbox_id)
        if found is not None:
            self._check_ours(found, handle.sandbox_id)
            self._remove(str(found["Id"]))
        self._remove_volumes(handle.sandbox_id)

    def inspect(self, handle: SandboxHandle) -> Inspection:
        found = self._find(handle.sandbox_id)
        if found is None or not self._is_ours(found, handle.sandbox_id):
            return Inspection(alive=False, cause="its container was removed")
        state = found["State"]
        if state.get("Running") and not state.get("Dead"):
            return Inspection(alive=True)
        return Inspection(alive=False, cause=cause_of_death(self._daemon, found))

    def extend(self, handle: SandboxHandle, expires_at_s: float) -> None:
        found = self._find(handle.sandbox_id)
        if found is None or not self._is_ours(found, handle.sandbox_id) or not found["State"].get("Running"):
            raise SandboxLostError(f"the container of sandbox {handle.sandbox_id!r} is gone, so its lifetime cannot be moved")
        now = time.time_ns()
        labels = self._labels(handle.sandbox_id) | {EXPIRES_AT: f"{expires_at_s:.3f}", SET_AT: str(now)}
        name = f"cifixer-expiry-{self._seal(handle.sandbox_id)}-{now}"
        with self._daemon.asked(f"moving the deadline of sandbox {handle.sandbox_id!r}"):
            self._api.create_volume(name, labels=labels)
        self._forget_expiry(handle.sandbox_id, before_ns=now)

    def list_owned(self) -> Sequence[Owned]:
        wanted = {"label": [f"{NAMESPACE}={self._namespace}", SANDBOX_ID]}
        with self._daemon.asked("listing its containers"):
            containers = self._api.containers(all=True, filters=wanted)
            expiries = self._api.volumes(filters=wanted).get("Volumes") or []
        set_last: dict[str, Mapping[str, str]] = {}
        for volume in sorted(expiries, key=lambda v: int(v["Labels"].get(SET_AT, "0"))):
            if EXPIRES_AT in volume["Labels"] or volume["Labels"][SANDBOX_ID] not in set_last:
                set_last[str(volume["Labels"][SANDBOX_ID])] = volume["Labels"]
        found: dict[str, Owned] = {}
        for container in containers:
            labels = container["Labels"]
            sandbox_id = labels[SANDBOX_ID]
            created = _number(labels.get(CREATED_AT), float(container["Created"]))
            expires = _number({**labels, **set_last.pop(sandbox_id, {})}.get(EXPIRES_AT), created)
            found[sandbox_id] = self._owned(sandbox_id, created, expires, labels.get(TOKEN, ""))
        for sandbox_id, labels in set_last.items():  # their containers were removed by somebody else
            found[sandbox_id] = self._owned(sandbox_id, _number(labels.get(SET_AT), 0.0) / 1e9, 0.0)
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
    def _api(self) -> Any:
        return self._daemon.api

    def _seal(self, sandbox_id: str) -> str:
        return hashlib.sha256(f"{self._namespace}\0{sandbox_id}".encode()).hexdigest()[:16]

    def _container(self, sandbox_id: str) -> str:
        return f"cifixer-{check_id(sandbox_id, 'sandbox id')}-{self._seal(sandbox_id)}"

    def _labels(self, sandbox_id: str) -> dict[str, str]:
        return {SANDBOX_ID: sandbox_id, PLACEMENT: self.placement, NAMESPACE: self._namespace}

    def _find(self, sandbox_id: str) -> dict[str, Any] | None:
        with self._daemon.asked(f"looking for sandbox {sandbox_id!r}"):
            try:
                return dict(self._api.inspect_container(self._container(sandbox_id)))
            except NotFound:
                return None

    def _is_ours(self, found: Mapping[str, Any], sandbox_id: str) -> bool:
        labels = found["Config"].get("Labels") or {}
        return (labels.get(NAMESPACE), labels.get(SANDBOX_ID)) == (self._namespace, sandbox_id)

    def _check_ours(self, found: Mapping[str, Any], sandbox_id: str) -> None:
        if not self._is_ours(found, sandbox_id):
            mend = "remove or rename it, or take another sandbox id"
            raise SandboxStartError(f"the container {self._container(sandbox_id)!r} is there and not one of ours: {mend}", mend)

    def _adopt(self, found: Mapping[str, Any], sandbox_id: str) -> bool:
        """Whether it lives, or could be started: its maker may have died in between, or be just about to. A dead one is removed."""
        self._check_ours(found, sandbox_id)
        state = found["State"]
        if state.get("Running") and not state.get("Dead"):
            return True
        if state.get("Status") == "created":
            with suppress(*VENDOR_ERRORS):
                self._api.start(found["Id"])
                return True
        self._remove(str(found["Id"]))
        return False

    def _make(self, spec: SandboxSpec, token: str) -> bool:
        """False when another took the name meanwhile. With a ``token``, commands are root."""
        name = self._container(spec.sandbox_id)
        image = images.prepared_image(self._daemon, spec.image or self._options.image)
        facts, options = self._daemon.facts, self._options
        if options.runtime and options.runtime not in facts.runtimes:
            mend = f"take one of {', '.join(facts.runtimes)}, or let the daemon know it (https://docs.docker.com/engine/daemon/alternative-runtimes/)"
            raise SandboxStartError(f"the daemon has no runtime {options.runtime!r}: {mend}", mend)
        host = layout.host_config(
            spec,
            memory=facts.memory,
            cpus=facts.cpus,
            processes=facts.max_processes,
            volume=self._disk_volume(spec.sandbox_id),
            limit_inodes=not facts.podman,  # it refuses the mount option
            network_mode=network_mode(self._daemon, spec.network, options.network),
            runtime=options.runtime,
            read_only=not (options.writable_root or token),
            as_root=bool(token),
        )
        now = self._clock()
        labels = dict(spec.labels) | self._labels(spec.sandbox_id)
        labels |= {CREATED_AT: f"{now:.3f}", EXPIRES_AT: f"{now + spec.lifetime_s:.3f}"} | ({TOKEN: token} if token else {})
        uid = layout.ROOT if token else layout.user_id(spec.sandbox_id, few_ids=facts.few_ids)
        try:
            self._remove_volumes(spec.sandbox_id)
            if volume := self._disk_volume(spec.sandbox_id):
                self._api.create_volume(volume, labels=self._labels(spec.sandbox_id))
            try:
                made = self._api.create_container(
                    image,
                    command=layout.serve_command(spec, uid=uid),
                    entrypoint=[layout.RUNNER],
                    environment={layout.TOKEN: token, "USER": "root", "LOGNAME": "root"} if token else None,
                    host_config=self._api.create_host_config(**host),
                    hostname="sandbox",
                    labels=labels,
                    name=name,
                    user=layout.BRIDGE_USER,
                    stop_signal="SIGKILL",  # the runner as PID 1 heeds no other: a stop, and the end of the daemon, would wait for nothing
                    working_dir="/",
                )
            except ImageNotFound:  # a newer version of us has just replaced it
                return False
            except APIError as error:
                if error.status_code == 409:
                    return False
                raise
            self._start(str(made["Id"]))
        except VENDOR_ERRORS as error:
            ours = _start_error(error, spec.sandbox_id)
            self._daemon.heard(ours)
            self._remove_quietly(spec.sandbox_id)
            raise ours from None
        except BaseException:
            self._remove_quietly(spec.sandbox_id)
            raise
        return True

    def _start(self, container: str) -> None:
        self._api.start(container)
        found = self._api.inspect_container(container)
        if not found["State"].get("Running"):
            raise SandboxStartError(f"the container ended at once: {cause_of_death(self._daemon, found)}")

    def _remove(self, container: str) -> None:
        """Kill and remove it, and wait until its name is free."""
        with self._daemon.asked(f"removing the container {container[:12]}"):
            for _ in range(_TRIES):
                try:
                    self._api.remove_container(container, force=True, v=True)
                    return
                except NotFound:
                    return
                except APIError as error:
                    if error.status_code != 409:  # another removes it just now
                        raise
                time.sleep(_PAUSE_S)
        raise BackendError(f"the container {container[:12]} is still there: destroy it again")

    def _remove_quietly(self, sandbox_id: str) -> None:
        with suppress(*VENDOR_ERRORS, ExecutorError):
            found = self._find(sandbox_id)
            if found is not None and self._is_ours(found, sandbox_id):
                self._remove(str(found["Id"]))

    def _forget_expiry(self, sandbox_id: str, before_ns: int) -> None:
        """Remove the deadlines that a newer one has replaced."""
        for volume in self._volumes(sandbox_id):
            if 0 < int(volume["Labels"].get(SET_AT, "0")) < before_ns:
                self._remove_volume(volume["Name"])

    def _remove_volumes(self, sandbox_id: str) -> None:
        """All that a sandbox has besides its container, which is gone."""
        for volume in self._volumes(sandbox_id):
            self._remove_volume(volume["Name"])

    def _volumes(self, sandbox_id: str) -> list[dict[str, Any]]:
        wanted = {"label": [f"{NAMESPACE}={self._namespace}", f"{SANDBOX_ID}={sandbox_id}"]}
        with self._daemon.asked(f"looking for the volumes of sandbox {sandbox_id!r}"):
            return self._api.volumes(filters=wanted).get("Volumes") or []

    def _remove_volume(self, name: str) -> None:
        with self._daemon.asked(f"removing the volume {name!r}"), suppress(NotFound):
            self._api.remove_volume(name)

    def _disk_volume(self, sandbox_id: str) -> str:
        return f"cifixer-disk-{self._seal(sandbox_id)}" if self._options.disk == "volume" else ""

    def _remove_litter(self) -> None:
        """Remove what crashed clients left: their sandboxes ended by themselves, but containers stay. Never raises."""
        with _littering:
            if time.monotonic() - _looked_at.get(self._namespace, float("-inf")) < LITTER_PAUSE_S:
                return
            _looked_at[self._namespace] = time.monotonic()
        with suppress(ExecutorError):
            now = self._clock()
            old = [o for o in self.list_owned() if now - max(o.created_at_s, o.expires_at_s) > LITTER_AGE_S]
            for owned in old[:LITTER_MOST]:
                if not self.inspect(owned.handle).alive:
                    self.destroy(owned.handle)


def _start_error(error: Exception, sandbox_id: str) -> ExecutorError:
    ours = translate(error, f"making sandbox {sandbox_id!r}")
    if isinstance(ours, (InvalidRequestError, BackendUnavailableError, CapacityError)):
        return ours
    said = explanation(error)
    mend = remedy(said)
    return SandboxStartError(f"the container of sandbox {sandbox_id!r} did not start: {said}" + (f": {mend}" if mend else ""), mend)


def _number(text: str | None, otherwise: float) -> float:
    try:
        return float(text) if text is not None else otherwise
    except ValueError:
        return otherwise
