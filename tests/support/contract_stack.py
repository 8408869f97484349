"""What the contract suite runs on: each backend, direct and queued, one worker process per backend, and what must not be left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pytest

from cifixer_exec import AppConfig, AsyncSandboxEnvironment, SandboxEnvironment, create_async_sandbox, create_sandbox
from cifixer_exec.backends.base import Backend
from cifixer_exec.backends.local import cgroups
from cifixer_exec.backends.local.processes import descendants
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.model import SandboxHandle
from cifixer_exec.store.records import WorkerRecord
from cifixer_exec.wiring import make_journal
from tests.support.docker_daemon import NoDaemonError, docker_host, image_for_tests, left_on_daemon
from tests.support.e2b_service import MOST_LIFETIME_S, NoServiceError, left_in_service, service_settings
from tests.support.kubernetes_cluster import NoClusterError, cluster_settings, left_in_cluster

REQUIRE = "CIFIXER_TEST_REQUIRE"
#: In the environment of the worker and of this process; no sandbox may ever show it.
HOST_SECRET = "host-secret-2f7c91"
_READY_S = 40.0
_STOP_S = 40.0


def required_backends() -> set[str]:
    """The backends whose absence is a failure."""
    return set(os.environ.get(REQUIRE, "").replace(",", " ").split())


def check_daemon(name: str) -> None:
    """As :func:`check_present`, for what must be there before there is a configuration."""
    if name == "docker_local":
        try:
            docker_host()
        except NoDaemonError as error:
            absent(name, str(error))
    if name == "kubernetes":
        try:
            cluster_settings()
        except NoClusterError as error:
            absent(name, str(error))
    if name == "e2b":
        try:
            service_settings()
        except NoServiceError as error:
            absent(name, str(error))


def check_present(name: str, config: AppConfig) -> None:
    """Skip, or fail if the backend is required, when its probe is not ok."""
    health = make_backend(config).probe()
    if not health.ok:
        absent(name, f"{health.summary}; remedy: {health.remedy or 'none known'}")


def on_backend(name: str, config: AppConfig) -> AppConfig:
    """``config`` for this backend, with what its tests need. Raises NoDaemonError where a daemon is needed and there is none."""
    if name == "docker_local":
        return config.with_(execution_backend=name, docker_host=docker_host(), image=image_for_tests(docker_host()))
    if name == "kubernetes":
        return config.with_(execution_backend=name, **cluster_settings())
    if name == "e2b":
        return config.with_(execution_backend=name, lifetime_s=min(config.lifetime_s, MOST_LIFETIME_S), **service_settings())
    return config.with_(execution_backend=name)


#: The backends that were found to work: a probe makes a whole sandbox, and not each test needs one.
_present: set[str] = set()


def on_present_backend(name: str, config: AppConfig) -> AppConfig:
    """As :func:`on_backend`; skip, or fail if the backend is required, when it does not work here."""
    check_daemon(name)
    made = on_backend(name, config)
    if name not in _present:
        check_present(name, made)
        _present.add(name)
    return made


def absent(name: str, why: str) -> NoReturn:
    """Skip the test, or let it fail if the backend is required."""
    said = f"backend {name!r} is not usable here: {why}"
    if name in required_backends():
        pytest.fail(said)
    pytest.skip(said)


class WorkerProcess:
    """A real Celery worker of the package."""

    def __init__(self, config: AppConfig, directory: Path) -> None:
        self._config = config
        self._log = directory / f"worker-{config.execution_backend}.log"
        environ = {k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")}
        environ.update(config.to_env(), CONTRACT_SECRET=HOST_SECRET)
        command = [sys.executable, "-m", "celery", "-A", "cifixer_exec.tasks", "worker", "--loglevel", "INFO"]
        command += ["--without-gossip", "--without-mingle", "-n", "test@%h"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def wait_ready(self) -> None:
        """Return when the worker holds its lease."""
        give_up = time.monotonic() + _READY_S
        while not workers(self._config):
            if self.process.poll() is not None or time.monotonic() > give_up:
                self.stop()
                raise RuntimeError(f"the worker did not become ready:\n{self.log()}")
            time.sleep(0.1)

    def log(self) -> str:
        """The end of what it said."""
        return self._log.read_text(errors="replace")[-6000:]

    def stop(self) -> int:
        """SIGTERM, and its exit code; one that does not end is killed and that is -9."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def workers(config: AppConfig) -> list[WorkerRecord]:
    """The workers that live, by the journal."""

    async def ask() -> list[WorkerRecord]:
        journal = make_journal(config)
        try:
            return await journal.workers()
        finally:
            await journal.redis.aclose()

    return asyncio.run(ask())


@dataclass
class ContractSession:
    """What all variants of one test run share: a state directory and names that nobody else uses."""

    redis_url: str
    namespace: str
    state_dir: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ct-")))

    def __post_init__(self) -> None:
        self.state_dir.chmod(0o711)
        self._numbers = count(1)

    def config(self, backend: str, dispatch: str) -> AppConfig:
        """The configuration of one variant. Raises NoDaemonError where a daemon is needed and there is none."""
        config = AppConfig(
            dispatch=dispatch,
            redis_url=self.redis_url,
            namespace=self.namespace,
            state_dir=self.state_dir,
            command_timeout_s=100.0,
            lifetime_s=900.0,
        )
        return on_backend(backend, config)

    def sandbox_id(self) -> str:
        """A new one, recognisable as ours."""
        return f"{self.namespace}-{next(self._numbers)}"

    def leftovers(self) -> list[str]:
        """Everything of ours that is still there: directories, processes, control groups."""
        found = [f"directory {path}" for path in self.state_dir.glob("*/sandboxes/*")]
        found += [f"process {line}" for line in processes_mentioning(str(self.state_dir))]
        groups = cgroups.detect()
        for base in dict.fromkeys((groups.bases if groups else {}).values()):
            found += [f"control group {g}" for g in (base / "cifixer-exec").glob(f"{self.namespace}-*")]
        if docker_host.cache_info().currsize:
            found += left_on_daemon(self.namespace)
        if cluster_settings.cache_info().currsize:
            found += left_in_cluster(self.namespace)
        if service_settings.cache_info().currsize:
            found += left_in_service(self.namespace)
        return found

    def remove(self) -> None:
        """Delete the state directory."""
        shutil.rmtree(self.state_dir, ignore_errors=True)


def processes_mentioning(text: str) -> list[str]:
    """``pid command`` of every other process whose command line or mounts have ``text`` (a sandbox's mounts name its directory)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            mounts = (entry / "mountinfo").read_text(errors="replace")
        except OSError:
            continue
        if text in command or text in mounts:
            found.append(f"{entry.name} {command[:200]}")
    return found


@dataclass(frozen=True)
class Stack:
    """One variant: a backend, direct or through the queue."""

    session: ContractSession
    config: AppConfig
    worker: WorkerProcess | None

    @property
    def backend(self) -> Backend:
        """The backend as any process of the placement has it."""
        return make_backend(self.config)

    @property
    def queued(self) -> bool:
        """True when a worker carries the operations out."""
        return self.worker is not None

    def create(self, **overrides: Any) -> SandboxEnvironment:
        """A sandbox that is not made yet."""
        return create_sandbox(self.config, sandbox_id=self.session.sandbox_id(), **overrides)

    def create_async(self, **overrides: Any) -> AsyncSandboxEnvironment:
        """As :meth:`create`, for the async API."""
        return create_async_sandbox(self.config, sandbox_id=self.session.sandbox_id(), **overrides)

    def handle(self, sandbox_id: str) -> SandboxHandle:
        """How the platform knows a sandbox."""
        return next(o.handle for o in self.backend.list_owned() if o.handle.sandbox_id == sandbox_id)

    def kill_from_outside(self, sandbox_id: str) -> None:
        """The sandbox dies behind everyone's back, as by an operator's SIGKILL."""
        if self.backend.name == "local":
            os.kill(self._init(sandbox_id), signal.SIGKILL)
        else:
            self.backend.destroy(self.handle(sandbox_id))

    def kill_monitor(self, sandbox_id: str) -> None:
        """Local backend: only bubblewrap outside is killed, the sandbox's own init goes on."""
        os.kill(self._launched(sandbox_id), signal.SIGKILL)

    def _launched(self, sandbox_id: str) -> int:
        found = next(self.config.state_dir.glob(f"*/sandboxes/{sandbox_id}/launch.json"))
        return int(json.loads(found.read_text())["pid"])

    def _init(self, sandbox_id: str) -> int:
        """The host's pid of the sandbox's PID 1: the first child of bubblewrap."""
        return descendants(self._launched(sandbox_id))[0]

    def python(self, program: str, *arguments: str, timeout_s: float = 60.0) -> str:
        """The standard output of a Python program in another process, with this variant's configuration in its environment."""
        environ = {**os.environ, **self.config.to_env()}
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], env=environ, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
