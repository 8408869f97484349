"""The audit of the platform: nothing of ours is left there, and nothing of anybody else's was touched."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from e2b import Sandbox

from cifixer_exec import AppConfig
from cifixer_exec.backends.local import LocalBackend
from cifixer_exec.backends.local.cgroups import detect
from cifixer_exec.backends.registry import find_bwrap, make_backend
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.model import SandboxSpec
from tests.chaos.report import Report
from tests.support import e2b_sandboxes, e2b_service, kubernetes_bystanders
from tests.support.contract_stack import ContractSession, processes_mentioning
from tests.support.docker_bystanders import Bystanders
from tests.support.docker_events import ContainerEvents
from tests.support.kubernetes_cluster import is_real, stand_in

_SETTLE_S = 10.0


class Platform(Protocol):
    """Watched from before the first worker to behind the last."""

    def close(self) -> None:
        """All is over, also if it went wrong."""

    def check(self, report: Report) -> None:
        """What is left, and what was harmed, as findings. Behind :meth:`close`."""


def watch_platform(session: ContractSession, config: AppConfig) -> Platform:
    """The one of ``config``'s backend."""
    kinds: dict[str, Callable[[ContractSession, AppConfig], Platform]] = {
        "docker_local": DockerDaemon,
        "kubernetes": KubernetesCluster,
        "e2b": E2BService,
    }
    return kinds.get(config.execution_backend, LocalHost)(session, config)


class LocalHost:
    """No sandbox, process, control group, directory or lock."""

    def __init__(self, session: ContractSession, config: AppConfig) -> None:
        self._session = session
        self._config = config

    def close(self) -> None:
        """Nothing to let go of."""

    def check(self, report: Report) -> None:
        """What a killed worker was just removing is swept by whoever makes a sandbox a minute later; that minute is skipped here."""
        report.findings += _listed(self._config) + self._session.leftovers()
        report.notes["litter after kills"] += len(self._litter())
        self._sweep_litter()
        report.findings += [f"litter that no creation sweeps: {path}" for path in self._litter()]

    def _litter(self) -> list[Path]:
        return [p for p in self._config.state_dir.glob("*/*/*") if p.parent.name in ("sandboxes", "locks")]

    def _sweep_litter(self) -> None:
        config = self._config
        backend = LocalBackend(
            root=config.state_dir / config.namespace,
            runner=runner_path(),
            bwrap=find_bwrap(config.bwrap),
            groups=detect(),
            clock=lambda: time.time() + 120,
        )
        spec = SandboxSpec(backend="local", sandbox_id=f"{config.namespace}-sweep", lifetime_s=600)
        backend.destroy(backend.create(spec))


class DockerDaemon:
    """No container, volume, exec or process of a container; and the bystanders are as they were."""

    def __init__(self, session: ContractSession, config: AppConfig) -> None:
        self._session = session
        self._config = config
        self._events = ContainerEvents(config.namespace)
        self._bystanders = Bystanders(config.namespace, make_backend(config).placement)
        self._harmed: list[str] = []

    def close(self) -> None:
        """The bystanders go; what they saw is kept."""
        self._events.close()
        self._harmed = self._bystanders.harmed()
        self._bystanders.remove()

    def check(self, report: Report) -> None:
        """As the class says."""
        report.findings += _listed(self._config) + self._session.leftovers() + self._harmed
        events = self._events
        report.platform.update({k: v for k, v in events.counts.items() if k in ("create", "destroy", "oom", "exec_start", "exec_die")})
        report.platform["execs open in one container at its end, at most"] = events.most_execs
        if events.most_execs > report.options.workers + 1:  # each worker may have one, and one may have died just now
            report.findings.append(f"{events.most_execs} execs were open in one container: the bridges of dead owners do not end")
        report.findings += [f"exec {e[:12]} is still running" for e in events.running_execs()]
        report.findings += [f"container {c[:12]} was made and never destroyed" for c in events.created - events.destroyed]
        for container in events.created:
            report.findings += [f"process of container {container[:12]}: {p}" for p in processes_mentioning(container)]


class KubernetesCluster:
    """No Job, Pod, process or mount; nothing asked for that is not there or not allowed; and the Jobs of others are as they were."""

    def __init__(self, session: ContractSession, config: AppConfig) -> None:
        self._session = session
        self._config = config
        self._before = {} if is_real() else stand_in().order("left")  # other tests' may be going
        self._bystanders = kubernetes_bystanders.Bystanders(config)
        self._harmed: list[str] = []

    def close(self) -> None:
        """The bystanders go; what became of them is kept."""
        self._harmed = self._bystanders.harmed()
        self._bystanders.remove()

    def check(self, report: Report) -> None:
        """As the class says."""
        report.findings += _listed(self._config) + self._session.leftovers() + self._harmed
        if is_real():
            return
        asked = stand_in().order("asked")
        report.platform.update({what: count for what, count in asked["requests"].items() if what.endswith((" jobs", " pods/exec"))})
        report.findings += [f"the API server was asked for what it has not: {what}" for what in asked["unknown"]]
        report.findings += [f"{kind} left in the stand-in: {one}" for kind, ones in self._settled().items() for one in ones]

    def _settled(self) -> dict[str, list[str]]:
        """What is left when kubelet and garbage collector had a moment; the zygote of its Pods stays."""
        give_up = time.monotonic() + _SETTLE_S
        while time.monotonic() < give_up:
            now = stand_in().order("left")
            left = {k: [str(v) for v in now[k] if v not in self._before[k]] for k in ("jobs", "pods", "mounts", "groups")}
            if not any(left.values()):
                break
            time.sleep(0.2)
        return left


class E2BService:
    """No sandbox, process or mount; nothing asked for that there is not; and the sandboxes of others are as they were."""

    def __init__(self, session: ContractSession, config: AppConfig) -> None:
        self._session = session
        self._config = config
        self._before = {} if e2b_service.is_real() else e2b_service.service().left()
        self._options = e2b_sandboxes.account_of(config).options
        others = {"cifixer_app": "cifixer-exec", "cifixer_namespace": f"{config.namespace}x", "cifixer_sandbox_id": "bystander"}
        self._bystanders = [Sandbox.create(metadata=m, timeout=600, **self._options) for m in ({}, others)]
        self._harmed: list[str] = []

    def close(self) -> None:
        """The bystanders go."""
        for bystander in self._bystanders:
            if not Sandbox.kill(bystander.sandbox_id, **self._options):
                self._harmed.append(f"sandbox {bystander.sandbox_id} of somebody else was ended")

    def check(self, report: Report) -> None:
        """As the class says."""
        report.findings += _listed(self._config) + self._session.leftovers() + self._harmed
        if e2b_service.is_real():
            return
        report.platform.update(e2b_service.service().asked()["requests"])
        report.findings += [f"{kind} left in the stand-in: {one}" for kind, ones in self._settled().items() for one in ones]

    def _settled(self) -> dict[str, list[str]]:
        """What is left when the service had a moment."""
        give_up = time.monotonic() + _SETTLE_S
        while time.monotonic() < give_up:
            now = e2b_service.service().left()
            left = {kind: [str(one) for one in now[kind] if one not in self._before[kind]] for kind in now}
            if not any(left.values()):
                break
            time.sleep(0.2)
        return left


def _listed(config: AppConfig) -> list[str]:
    return [f"sandbox {owned.handle.sandbox_id} is left on the platform" for owned in make_backend(config).list_owned()]
