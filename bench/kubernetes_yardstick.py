"""Kubernetes without us: a Job with the same image, limits and hardening, made and used by the kubernetes package and by kubectl."""

from __future__ import annotations

import copy
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kubernetes import client, config, watch
from kubernetes.stream import stream

from cifixer_exec import AppConfig

LABEL = "cifixer-bench"


class KubernetesYardstick:
    """Direct use of one cluster. ``job``: what a sandbox beside it is made of."""

    def __init__(self, settings: AppConfig, job: dict[str, Any]) -> None:
        self._settings = settings
        self._namespace = settings.kubernetes_namespace
        self._job = _idle(job)
        configuration: Any = client.Configuration()
        config.load_kube_config(settings.kubernetes_kubeconfig, client_configuration=configuration)  # type: ignore[no-untyped-call]
        api = client.ApiClient(configuration)
        self._batch: Any = client.BatchV1Api(api)
        self._core: Any = client.CoreV1Api(api)

    def create(self) -> tuple[str, str]:
        """A Job and its running Pod, by name."""
        job = copy.deepcopy(self._job)
        name = job["metadata"]["name"] = f"cifixer-bench-{uuid.uuid4().hex[:12]}"
        self._batch.create_namespaced_job(self._namespace, job)
        events = watch.Watch().stream(  # type: ignore[no-untyped-call]
            self._core.list_namespaced_pod, self._namespace, label_selector=f"job-name={name}", _request_timeout=60
        )
        for event in events:
            if event["object"].status.phase == "Running":
                return name, str(event["object"].metadata.name)
        raise RuntimeError(f"the Pod of {name} does not run")

    def execute(self, pod: str, command: list[str]) -> str:
        """What ``kubernetes.stream`` does for one command. Raises RuntimeError when the command fails."""
        socket: Any = stream(
            self._core.connect_get_namespaced_pod_exec, pod, self._namespace, command=command, stderr=True, stdin=False, stdout=True,
            tty=False, _preload_content=False,
        )  # fmt: skip
        socket.run_forever(timeout=60)
        said: str = socket.read_stdout() if socket.peek_stdout() else ""
        if socket.returncode != 0:
            raise RuntimeError(f"{command} failed: {said!r}")
        return said

    def first_command(self, command: list[str]) -> Callable[[], None]:
        """A Job, its Pod and the first command in it; how to remove them."""
        job, pod = self.create()
        self.execute(pod, command)
        return lambda: self.remove(job)

    @contextmanager
    def pod(self) -> Iterator[str]:
        """One for the ``with`` block."""
        job, pod = self.create()
        try:
            yield pod
        finally:
            self.remove(job)

    def remove(self, job: str) -> None:
        self._batch.delete_namespaced_job(job, self._namespace, propagation_policy="Background")

    def has_tar(self, pod: str) -> bool:
        """Which ``kubectl cp`` needs in the image."""
        return self.execute(pod, ["sh", "-c", "command -v tar || true"]) != ""

    def pour_in(self, source: Path, pod: str, path: str) -> None:
        """``kubectl exec -i`` with ``cat``, which is what ``kubectl cp`` does without its tar."""
        with source.open("rb") as file:
            self._kubectl("exec", "-i", pod, "--", "sh", "-c", f"cat > {path}", stdin=file)

    def pour_out(self, pod: str, path: str, target: Path) -> None:
        with target.open("wb") as file:
            self._kubectl("exec", pod, "--", "cat", path, stdout=file)

    def copy_in(self, source: Path, pod: str, path: str) -> None:
        """``kubectl cp`` from a file of this machine."""
        self._kubectl("cp", str(source), f"{pod}:{path}")

    def copy_out(self, pod: str, path: str, target: Path) -> None:
        self._kubectl("cp", f"{pod}:{path}", str(target))

    def _kubectl(self, *arguments: str, **streams: Any) -> None:
        command = ["kubectl", "--kubeconfig", self._settings.kubernetes_kubeconfig, "-n", self._namespace, *arguments]
        done = subprocess.run(command, stderr=subprocess.PIPE, check=False, **streams)
        if done.returncode != 0:
            raise RuntimeError(f"kubectl {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")


def has_kubectl() -> bool:
    """Whether there is a ``kubectl`` to compare with."""
    return shutil.which("kubectl") is not None


def _idle(job: dict[str, Any]) -> dict[str, Any]:
    """The Job of a sandbox, with a program that does nothing instead of the runner, and without the labels that would make it ours."""
    idle = copy.deepcopy(job)
    for metadata in (idle["metadata"], idle["spec"]["template"]["metadata"]):
        metadata["labels"] = {LABEL: "yes"}
    idle["metadata"].pop("annotations")
    pod = idle["spec"]["template"]["spec"]
    pod.pop("initContainers", None)
    container = pod["containers"][0]
    container.pop("lifecycle", None)
    container.pop("args", None)
    container["command"] = ["sleep", "3600"]
    return idle
