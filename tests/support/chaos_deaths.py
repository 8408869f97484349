"""Ways in which a sandbox dies or stands still behind everyone's back, on each backend."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cifixer_exec import AppConfig
from cifixer_exec.backends.local.processes import descendants
from tests.support import docker_containers, e2b_sandboxes, kubernetes_pods


def kill_init(config: AppConfig, sandbox_id: str) -> None:
    """The sandbox's PID 1, which is the runner: the kernel ends the rest."""
    if config.execution_backend == "docker_local":
        docker_containers.kill_container(config, sandbox_id)
    elif config.execution_backend == "kubernetes":
        kubernetes_pods.end_first_process(config, sandbox_id)
    elif config.execution_backend == "e2b":
        e2b_sandboxes.signal_runner(config, sandbox_id, "KILL")
    else:
        os.kill(_pid(config, sandbox_id, "init.json"), signal.SIGKILL)


def kill_all(config: AppConfig, sandbox_id: str) -> None:
    """As an operator ends it: its container is removed; locally every process, bubblewrap outside first, as ``pkill -f`` does it."""
    if config.execution_backend == "docker_local":
        docker_containers.remove_container(config, sandbox_id)
        return
    if config.execution_backend == "kubernetes":
        kubernetes_pods.delete_job(config, sandbox_id)
        return
    if config.execution_backend == "e2b":
        e2b_sandboxes.end_machine(config, sandbox_id)
        return
    launched = _pid(config, sandbox_id, "launch.json")
    for pid in [launched, *descendants(launched), _pid(config, sandbox_id, "init.json")]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def frozen(config: AppConfig, sandbox_id: str) -> Iterator[None]:
    """The sandbox's runner stands still for the ``with`` block; a container does as a whole."""
    if config.execution_backend == "docker_local":
        with docker_containers.paused_container(config, sandbox_id):
            yield
        return
    if config.execution_backend == "kubernetes":
        kubernetes_pods.stop_first_process(config, sandbox_id)
        try:
            yield
        finally:
            kubernetes_pods.continue_first_process(config, sandbox_id)
        return
    if config.execution_backend == "e2b":
        with e2b_sandboxes.stopped_runner(config, sandbox_id):
            yield
        return
    runner = _pid(config, sandbox_id, "init.json")
    os.kill(runner, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(runner, signal.SIGCONT)


def _pid(config: AppConfig, sandbox_id: str, file: str) -> int:
    found = next(config.state_dir.glob(f"*/sandboxes/{sandbox_id}"))
    return int(json.loads((Path(found) / file).read_text())["pid"])
