"""Making, finding and removing the containers of sandboxes."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from docker.errors import APIError, ImageNotFound, NotFound

from cifixer_exec.backends.docker_local import images, layout
from cifixer_exec.backends.docker_local.daemon import Daemon
from cifixer_exec.backends.docker_local.death import cause_of_death
from cifixer_exec.backends.docker_local.names import CREATED_AT, EXPIRES_AT, TOKEN, Names
from cifixer_exec.backends.docker_local.networks import network_mode
from cifixer_exec.backends.docker_local.vendor_errors import VENDOR_ERRORS, explanation, remedy, translate
from cifixer_exec.backends.docker_local.volumes import Volumes
from cifixer_exec.backends.limits import user_id
from cifixer_exec.errors import (
    BackendError,
    BackendUnavailableError,
    CapacityError,
    ExecutorError,
    InvalidRequestError,
    SandboxStartError,
)
from cifixer_exec.model import SandboxSpec

#: How often a removal that another has begun, or a name that was just taken, is looked at again.
TRIES, PAUSE_S = 50, 0.1
#: A daemon gets slower, not faster, with more containers in the making at once.
MOST_CREATIONS = 16

_creations = threading.BoundedSemaphore(MOST_CREATIONS)


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


@dataclass(frozen=True)
class Containers:
    """Of one namespace on one daemon."""

    daemon: Daemon
    names: Names
    options: DockerOptions
    clock: Callable[[], float]

    @property
    def volumes(self) -> Volumes:
        return Volumes(self.daemon, self.names)

    def find(self, sandbox_id: str) -> dict[str, Any] | None:
        """As inspected; None where there is none of this name. Whose it is: see :meth:`is_ours`."""
        with self.daemon.asked(f"looking for sandbox {sandbox_id!r}"):
            try:
                return dict(self.daemon.api.inspect_container(self.names.container(sandbox_id)))
            except NotFound:
                return None

    def is_ours(self, found: Mapping[str, Any], sandbox_id: str) -> bool:
        """Whether it bears our labels, and not only a name like ours."""
        return self.names.has(found["Config"].get("Labels"), sandbox_id)

    def ours(self, sandbox_id: str) -> dict[str, Any] | None:
        """As :meth:`find`, and None for somebody else's."""
        found = self.find(sandbox_id)
        return found if found is not None and self.is_ours(found, sandbox_id) else None

    def check_ours(self, found: Mapping[str, Any], sandbox_id: str) -> None:
        """Raises SandboxStartError for somebody else's."""
        if not self.is_ours(found, sandbox_id):
            mend = "remove or rename it, or take another sandbox id"
            raise SandboxStartError(f"the container {self.names.container(sandbox_id)!r} is there and not one of ours: {mend}", mend)

    def make(self, spec: SandboxSpec) -> str:
        """Make and start it, or adopt the one there is; its secret, empty where it needs none.

        Raises: as :meth:`cifixer_exec.backends.base.Backend.create`.
        """
        for _ in range(TRIES):
            token = secrets.token_hex(32) if self.options.commands_as_root else ""
            if self._make(spec, token):
                return token
            found = self.find(spec.sandbox_id)
            if found is not None and self._adopt(found, spec.sandbox_id):
                return str(found["Config"]["Labels"].get(TOKEN, ""))
            time.sleep(PAUSE_S)
        name = self.names.container(spec.sandbox_id)
        raise SandboxStartError(f"the container {name!r} is made and removed by others all the time: try again")

    def start(self, container: str) -> None:
        """Start one that was made, and see that it runs."""
        self.daemon.api.start(container)
        found = self.daemon.api.inspect_container(container)
        if not found["State"].get("Running"):
            raise SandboxStartError(f"the container ended at once: {cause_of_death(self.daemon, found)}")

    def remove(self, container: str) -> None:
        """Kill and remove it, and wait until its name is free."""
        with self.daemon.asked(f"removing the container {container[:12]}"):
            for _ in range(TRIES):
                try:
                    self.daemon.api.remove_container(container, force=True, v=True)
                    return
                except NotFound:
                    return
                except APIError as error:
                    if error.status_code != 409:  # another removes it just now
                        raise
                time.sleep(PAUSE_S)
        raise BackendError(f"the container {container[:12]} is still there: destroy it again")

    def _adopt(self, found: Mapping[str, Any], sandbox_id: str) -> bool:
        """Whether it lives, or could be started: its maker may have died in between, or be just about to. A dead one is removed."""
        self.check_ours(found, sandbox_id)
        if is_alive(found):
            return True
        if found["State"].get("Status") == "created":
            with suppress(*VENDOR_ERRORS):
                self.daemon.api.start(found["Id"])
                return True
        self.remove(str(found["Id"]))
        return False

    def _make(self, spec: SandboxSpec, token: str) -> bool:
        """False when the name is taken, or the prepared image has just gone. With a ``token``, commands are root.

        Each request costs a creation about a hundredth of its time, so nothing is asked for that the daemon's answers tell anyway.
        """
        image = images.prepared_image(self.daemon, spec.image or self.options.image)
        self._check_runtime()
        network = network_mode(self.daemon, spec.network, self.options.network)
        volumes = () if self._writes_to_disk(token) else images.volumes_of(self.daemon, image)
        made_id = ""
        try:
            with _creations:
                begun_at_s = time.time()
                disk = self.volumes.make_disk(spec.sandbox_id) if self.options.disk == "volume" else ""
                wanted = self._wanted(spec, token, disk, network, volumes)
                made_id = str(self.daemon.api.create_container(image, **wanted)["Id"])
                with ThreadPoolExecutor(1) as beside:  # the listing takes a while, the start takes longer
                    old = beside.submit(self.volumes.remove, spec.sandbox_id, before_s=begun_at_s)
                    self.start(made_id)
                    old.result()
        except ImageNotFound:  # a newer version of us has just replaced it
            images.forget(self.daemon, image)
            return False
        except VENDOR_ERRORS as error:
            if not made_id and isinstance(error, APIError) and error.status_code == 409:
                return False
            ours = _start_error(error, spec.sandbox_id)
            self.daemon.breaker.heard(ours)
            self._undo(spec.sandbox_id, made_id)
            raise ours from None
        except BaseException:
            self._undo(spec.sandbox_id, made_id)
            raise
        return True

    def _writes_to_disk(self, token: str) -> bool:
        """Whether more than memory can be written, by the operator's choice. With a ``token``, commands are root."""
        return bool(self.options.disk == "volume" or self.options.writable_root or token)

    def _check_runtime(self) -> None:
        wanted, known = self.options.runtime, self.daemon.facts.runtimes
        if wanted and wanted not in known:
            mend = (
                f"take one of {', '.join(known)}, or let the daemon know it (https://docs.docker.com/engine/daemon/alternative-runtimes/)"
            )
            raise SandboxStartError(f"the daemon has no runtime {wanted!r}: {mend}", mend)

    def _wanted(self, spec: SandboxSpec, token: str, disk: str, network: str, volumes: tuple[str, ...]) -> dict[str, Any]:
        """Arguments of docker-py's ``create_container``."""
        facts, options = self.daemon.facts, self.options
        host = layout.host_config(
            spec,
            facts=facts,
            network_mode=network,
            volume=disk,
            of_image=volumes,
            runtime=options.runtime,
            read_only=not (options.writable_root or token),
            as_root=bool(token),
        )
        uid = layout.ROOT if token else user_id(self.names.container(spec.sandbox_id), few_ids=facts.few_ids)
        return {
            "command": layout.serve_command(spec, uid=uid),
            "entrypoint": [layout.RUNNER],
            "environment": {layout.TOKEN: token, "USER": "root", "LOGNAME": "root"} if token else None,
            "healthcheck": {"test": ["NONE"]},  # the image's would be root's, in reach of what commands leave in its way
            "host_config": self.daemon.api.create_host_config(**host),
            "hostname": "sandbox",
            "labels": self._labels(spec, token),
            "name": self.names.container(spec.sandbox_id),
            "use_config_proxy": False,  # ~/.docker/config.json may have a password for it
            "user": layout.BRIDGE_USER,
            "stop_signal": "SIGKILL",  # the runner as PID 1 heeds no other: a stop, and the end of the daemon, would wait for nothing
            "working_dir": "/",
        }

    def _labels(self, spec: SandboxSpec, token: str) -> dict[str, str]:
        now = self.clock()
        times = {CREATED_AT: f"{now:.3f}", EXPIRES_AT: f"{now + spec.lifetime_s:.3f}"}
        ours = self.names.labels(spec.sandbox_id, self.daemon.facts.placement)
        return {**spec.labels, **ours, **times, **({TOKEN: token} if token else {})}

    def _undo(self, sandbox_id: str, made_id: str) -> None:
        """Remove what this creation has made, and not what another one of the same sandbox has."""
        with suppress(*VENDOR_ERRORS, ExecutorError):
            if made_id:
                self.remove(made_id)
                self.volumes.remove(sandbox_id)


def is_alive(found: Mapping[str, Any]) -> bool:
    """Whether an inspected container runs."""
    return bool(found["State"].get("Running")) and not found["State"].get("Dead")


def _start_error(error: Exception, sandbox_id: str) -> ExecutorError:
    ours = translate(error, f"making sandbox {sandbox_id!r}")
    if isinstance(ours, (InvalidRequestError, BackendUnavailableError, CapacityError)):
        return ours
    said = explanation(error)
    mend = remedy(said)
    return SandboxStartError(f"the container of sandbox {sandbox_id!r} did not start: {said}" + (f": {mend}" if mend else ""), mend)
