"""The Job of a sandbox: what its Pod sees, may do and can use up. Pure data; nothing here asks a cluster.

It fits into namespaces of the Pod Security level *restricted*
(https://kubernetes.io/docs/concepts/security/pod-security-standards/), whatever the image says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cifixer_exec.backends.disk import disk_size_bytes, spool_size_bytes
from cifixer_exec.backends.kubernetes import names as named
from cifixer_exec.backends.kubernetes.template import merged
from cifixer_exec.backends.limits import limit_arguments, root_arguments, user_id
from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import MIB, SandboxSpec

DEFAULT_IMAGE = "nikolaik/python-nodejs:python3.11-nodejs20-bullseye"
CONTAINER = "sandbox"
BIN, SPOOL, CHANNEL = "/run/cifixer/bin", "/run/cifixer/spool", "/run/cifixer/channel"
RUNNER, SOCKET = f"{BIN}/runner", f"{CHANNEL}/socket"
WORKSPACE, HOME, TMP = "/workspace", "/home/sandbox", "/tmp"  # noqa: S108
BRIDGE = [RUNNER, "bridge", "--socket", SOCKET]
STOP = [RUNNER, "stop", "--socket", SOCKET]
#: Where the runner image has it.
OFFERED = "/runner"
#: A Pod that waits for its runner to be uploaded: as PID 1, which the runner then takes over. Not every sleep knows fractions.
AWAIT_RUNNER = (
    f"i=0; until [ -x {RUNNER} ]; do i=$((i+1)); if [ $i -lt 500 ]; then sleep 0.02 2>/dev/null || sleep 1; else sleep 1; fi; done; "
    f'exec {RUNNER} "$@"'
)

DEFAULT_CPUS, DEFAULT_MEMORY_BYTES = 1.0, 2048 * MIB
MOST_DISK_BYTES = 4096 * MIB
TTL_AFTER_FINISHED_S = 300
NODE_LOST_S = 60
#: Of a disk on the node: more, and the kubelet evicts the Pod, some time later.
NODE_DISK_BYTES = 16 * 1024 * MIB
_RUNNER_BYTES = 32 * MIB
#: Browsers and the like want more than the 64 MiB that container engines give.
_SHM_BYTES = 256 * MIB
#: Nothing answers there: names are not looked up where nothing could be reached (RFC 5737).
_NO_NAMESERVER = "192.0.2.1"
#: Networks: of the cluster, whatever that lets through; or as the NetworkPolicies of k8s/ have it.
CLUSTER, NONE, EGRESS = "cluster", "none", "egress"


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """How sandboxes are made in this cluster, whatever their spec. ``pod_template`` is merged over ours (template.py)."""

    image: str = DEFAULT_IMAGE
    service_account: str = "ci-fixer-sandbox"
    #: Has the runner at :data:`OFFERED`; empty: it is uploaded into each Pod.
    runner_image: str = ""
    cpu_request: float = 0.25
    memory_request_bytes: int = 512 * MIB
    #: "memory": of a true size, and part of the container's memory. "node": on the node's disk, where no exact limit holds for it.
    disk: str = "memory"
    #: The workspace of all sandboxes, one after the other, instead of an empty one.
    volume_claim: str = ""
    writable_root: bool = False
    runtime_class: str = ""
    priority_class: str = ""
    #: Whether somebody has seen to it that the NetworkPolicies of k8s/ are applied and enforced.
    network_policies: bool = False
    grace_s: int = 1
    start_timeout_s: float = 110.0
    pod_template: Mapping[str, Any] = field(default_factory=dict)

    @property
    def networks(self) -> tuple[str, ...]:
        """Those that there are, the default first."""
        return (NONE, EGRESS) if self.network_policies else (CLUSTER,)


def manifest(spec: SandboxSpec, *, names: named.Names, placement: str, options: KubernetesOptions, now_s: float) -> dict[str, Any]:
    """The Job. ``now_s``: Unix time.

    Raises:
        InvalidRequestError: the sizes do not fit together.
    """
    job = names.job(spec.sandbox_id)
    labels = names.labels(spec.sandbox_id, spec.network or options.networks[0])
    annotations = names.annotations(spec.sandbox_id, placement)
    times = {named.CREATED_AT: f"{now_s:.3f}", named.EXPIRES_AT: f"{now_s + spec.lifetime_s:.3f}"}
    given = {named.LABELS: json.dumps(dict(spec.labels))} if spec.labels else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job, "labels": labels, "annotations": {**annotations, **times, **given}},
        "spec": {
            "activeDeadlineSeconds": max(1, math.ceil(spec.lifetime_s)),
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",
            "ttlSecondsAfterFinished": TTL_AFTER_FINISHED_S,
            "template": _template(spec, job, labels, annotations, options),
        },
    }


def _template(
    spec: SandboxSpec, job: str, labels: dict[str, str], annotations: dict[str, str], options: KubernetesOptions
) -> dict[str, Any]:
    # A claim's files outlive the sandbox and its user, so there the user is the claim's.
    uid = user_id(options.volume_claim or job, few_ids=_few_ids(options))
    ours = {"metadata": {}, "spec": _pod(spec, uid, options)}
    template: dict[str, Any] = merged(ours, options.pod_template)
    pod, metadata = template["spec"], template["metadata"]
    pod["restartPolicy"] = "Never"  # anything else would start the sandbox again, empty
    metadata["labels"] = {**(metadata.get("labels") or {}), **labels}
    metadata["annotations"] = {**(metadata.get("annotations") or {}), **annotations, **_accounts(pod)}
    return template


def _few_ids(options: KubernetesOptions) -> bool:
    return (options.pod_template.get("spec") or {}).get("hostUsers") is False


def _pod(spec: SandboxSpec, uid: int, options: KubernetesOptions) -> dict[str, Any]:
    network = spec.network or options.networks[0]
    memory_bytes = int(spec.memory_bytes or DEFAULT_MEMORY_BYTES)
    resources = _resources(spec, memory_bytes, options)
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "containers": [_container(spec, resources, options)],
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "securityContext": {
            "fsGroup": uid,
            "fsGroupChangePolicy": "OnRootMismatch",
            "runAsGroup": uid,
            "runAsNonRoot": True,
            "runAsUser": uid,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "serviceAccountName": options.service_account,
        "terminationGracePeriodSeconds": options.grace_s,
        "tolerations": [_gone_after(condition) for condition in ("not-ready", "unreachable")],
        "volumes": _volumes(spec, memory_bytes, options),
    }
    if options.runner_image:
        pod["initContainers"] = [_installer(uid, resources, options)]
    if network == NONE:
        pod |= {"dnsPolicy": "None", "dnsConfig": {"nameservers": [_NO_NAMESERVER]}}
    named_by_options = {"runtimeClassName": options.runtime_class, "priorityClassName": options.priority_class}
    return {**pod, **{name: value for name, value in named_by_options.items() if value}}


def _gone_after(condition: str) -> dict[str, Any]:
    """A node that is lost takes its sandboxes along after a minute; the cluster's default is five."""
    return {"key": f"node.kubernetes.io/{condition}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_LOST_S}


def _container(spec: SandboxSpec, resources: dict[str, Any], options: KubernetesOptions) -> dict[str, Any]:
    serve = _serve_arguments(spec)
    uploaded = {"command": ["/bin/sh", "-c", AWAIT_RUNNER, "sh"], "args": serve}
    return {
        "name": CONTAINER,
        "image": spec.image or options.image,
        # The runner as PID 1 heeds no signal that commands could send too: without this each end takes the whole grace.
        "lifecycle": {"preStop": {"exec": {"command": STOP}}},
        **({"command": [RUNNER], "args": serve} if options.runner_image else uploaded),
        "env": [{"name": name, "value": value} for name, value in _ENVIRONMENT.items()],
        "resources": resources,
        "securityContext": _hardened(read_only=not options.writable_root),
        "volumeMounts": _mounts(options),
        # A file of the node's disk without a limit, which may not be left out: where only root comes.
        "terminationMessagePath": "/root/termination-log",
        "workingDir": WORKSPACE,
    }


_ENVIRONMENT = {"HOME": HOME, "USER": "sandbox", "LOGNAME": "sandbox", "SHELL": "/bin/sh", "TERM": "dumb", "CI": "true"}


def _serve_arguments(spec: SandboxSpec) -> list[str]:
    command = ["serve", "--socket", SOCKET, "--learn-token", "--spool", SPOOL, "--volatile-spool", "--workspace", WORKSPACE]
    return [*command, *root_arguments(WORKSPACE, TMP, HOME), *limit_arguments(spec)]


def _installer(uid: int, resources: dict[str, Any], options: KubernetesOptions) -> dict[str, Any]:
    """Another user than the sandbox's, so that no command can read, change or replace the runner."""
    return {
        "name": "runner",
        "image": options.runner_image,
        "command": [OFFERED, "install", RUNNER],
        "resources": resources,
        "securityContext": {**_hardened(read_only=True), "runAsUser": uid + 1},
        "volumeMounts": [{"name": "cifixer", "mountPath": BIN, "subPath": "bin"}],
    }


def _hardened(*, read_only: bool) -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": read_only}


def _resources(spec: SandboxSpec, memory_bytes: int, options: KubernetesOptions) -> dict[str, Any]:
    cpus = spec.cpus or DEFAULT_CPUS
    return {
        "limits": {"cpu": _milli(cpus), "memory": _bytes(memory_bytes)},
        "requests": {
            "cpu": _milli(min(cpus, options.cpu_request)),
            "memory": _bytes(min(memory_bytes, options.memory_request_bytes)),
        },
    }


def _milli(cpus: float) -> str:
    return str(int(cpus)) if cpus == int(cpus) else f"{max(1, round(cpus * 1000))}m"


def _bytes(size: int) -> str:
    """As people write it, where it comes out even."""
    for unit, name in ((1024 * MIB, "Gi"), (MIB, "Mi")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


def _volumes(spec: SandboxSpec, memory_bytes: int, options: KubernetesOptions) -> list[dict[str, Any]]:
    size = disk_size_bytes(spec.disk_bytes, memory_bytes=memory_bytes, most_bytes=MOST_DISK_BYTES)
    spool = spool_size_bytes(size)
    disk: dict[str, Any] = {"medium": "Memory", "sizeLimit": _bytes(size)}
    if options.disk == "node":
        disk = {"sizeLimit": _bytes(NODE_DISK_BYTES)}
    volumes = [
        {"name": "disk", "emptyDir": disk},
        {"name": "cifixer", "emptyDir": {"medium": "Memory", "sizeLimit": _bytes(spool + _RUNNER_BYTES)}},
        {"name": "dev-shm", "emptyDir": {"medium": "Memory", "sizeLimit": _bytes(_SHM_BYTES)}},
        {"name": "accounts", "downwardAPI": {"items": [_file(named.PASSWD, "passwd"), _file(named.GROUP, "group")]}},
    ]
    if options.volume_claim:
        volumes.append({"name": "workspace", "persistentVolumeClaim": {"claimName": options.volume_claim}})
    return volumes


def _file(annotation: str, path: str) -> dict[str, Any]:
    return {"path": path, "fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}}


def _mounts(options: KubernetesOptions) -> list[dict[str, Any]]:
    """One disk under all names, so that one size holds for them together."""
    workspace = {"name": "workspace"} if options.volume_claim else {"name": "disk", "subPath": "workspace"}
    read_only = {"readOnly": True} if options.runner_image else {}
    return [
        {**workspace, "mountPath": WORKSPACE},
        {"name": "disk", "subPath": "home", "mountPath": HOME},
        {"name": "disk", "subPath": "tmp", "mountPath": TMP},
        {"name": "disk", "subPath": "tmp", "mountPath": "/var/tmp"},  # noqa: S108
        {"name": "dev-shm", "mountPath": "/dev/shm"},  # noqa: S108
        {"name": "cifixer", "subPath": "bin", "mountPath": BIN, **read_only},
        {"name": "cifixer", "subPath": "spool", "mountPath": SPOOL},
        {"name": "cifixer", "subPath": "channel", "mountPath": CHANNEL},
        {"name": "accounts", "subPath": "passwd", "mountPath": "/etc/passwd", "readOnly": True},
        {"name": "accounts", "subPath": "group", "mountPath": "/etc/group", "readOnly": True},
    ]


def _accounts(pod: Mapping[str, Any]) -> dict[str, str]:
    """The sandbox's user by name, which many tools look up; as the template has left it to be."""
    context = pod.get("securityContext") or {}
    uid, gid = context.get("runAsUser"), context.get("runAsGroup", 0)
    user, group = (f"sandbox:x:{uid}:{gid}:sandbox:{HOME}:/bin/sh\n", f"sandbox:x:{gid}:\n") if uid is not None else ("", "")
    nobody = "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    return {named.PASSWD: f"root:x:0:0:root:/root:/bin/sh\n{user}{nobody}", named.GROUP: f"root:x:0:\n{group}nogroup:x:65534:\n"}


def check_image(image: str) -> None:
    """Raises InvalidRequestError for a reference that no registry could have."""
    if not image or any(c.isspace() or not c.isprintable() for c in image):
        raise InvalidRequestError(f"image={image!r} is not usable: give a reference such as registry.example/name:tag")
