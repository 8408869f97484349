"""Jobs for tests: as strict as Pod Security *restricted* wants them."""

from __future__ import annotations

from typing import Any

from tests.support.kubernetes.images import RUNNER_IMAGE

Json = dict[str, Any]
USER = 1_234_567_890
IMAGE = "busybox:1"
ACCOUNT = "ci-fixer-sandbox"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
_CONTEXT: Json = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
_IDLE = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"]


def pod_spec(command: list[str] | None = None, **changes: Any) -> Json:
    """One container named ``sandbox`` that by default waits for its end; ``changes`` are of the Pod's spec."""
    resources: Json = {"limits": {"cpu": "1", "memory": "256Mi"}, "requests": {"cpu": "100m", "memory": "64Mi"}}
    mounts = [{"name": "disk", "mountPath": path, "subPath": path.rpartition("/")[2]} for path in ("/workspace", "/tmp")]
    container: Json = {"name": "sandbox", "image": IMAGE, "command": command or _IDLE, "securityContext": _CONTEXT}
    container |= {"resources": resources, "volumeMounts": mounts, "workingDir": "/workspace"}
    return {
        "restartPolicy": "Never",
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [{"name": "disk", "emptyDir": {"medium": "Memory", "sizeLimit": "32Mi"}}],
        "containers": [container],
        **changes,
    }


def job(name: str, spec: Json | None = None, *, labels: dict[str, str] | None = None, **changes: Any) -> Json:
    """``spec`` is the Pod's; ``changes`` are of the Job's spec."""
    meta = {"labels": {"app": "ci-fixer-sandbox", **(labels or {})}}
    template = {"metadata": {**meta, "annotations": {"cifixer.dev/note": "as it is"}}, "spec": spec or pod_spec()}
    whole = {"backoffLimit": 0, "completions": 1, "parallelism": 1, "podReplacementPolicy": "Failed", "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, **meta}, "spec": {**whole, **changes}}


def with_runner(spec: Json) -> Json:
    """The runner gets in by an init container and is PID 1."""
    place = {"name": "cifixer", "mountPath": "/run/cifixer/bin", "subPath": "bin"}
    install: Json = {"name": "install", "image": RUNNER_IMAGE, "command": ["/runner", "install", "/run/cifixer/bin/runner"]}
    install |= {"securityContext": _CONTEXT, "resources": spec["containers"][0]["resources"], "volumeMounts": [place]}
    command = "/run/cifixer/bin/runner serve --socket /run/cifixer/channel/socket --spool /run/cifixer/spool --workspace /workspace"
    container = {**spec["containers"][0], "command": command.split()}
    others = [{"name": "cifixer", "mountPath": f"/run/cifixer/{name}", "subPath": name} for name in ("spool", "channel")]
    container["volumeMounts"] = [*container["volumeMounts"], {**place, "readOnly": True}, *others]
    volumes = [*spec["volumes"], {"name": "cifixer", "emptyDir": {"medium": "Memory"}}]
    return {**spec, "initContainers": [install], "containers": [container], "volumes": volumes}
