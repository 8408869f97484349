"""From a container of a Pod to what the launcher needs, by the rules of Kubernetes."""

from __future__ import annotations

import os
import re
from typing import Any

from cifixer_exec.backends.local.cgroups import Limits
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.quantities import quantity, whole

Json = dict[str, Any]

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_REFERENCE = re.compile(r"\$(\$|\(([-._A-Za-z0-9]+)\))")
_API = "10.96.0.1"
#: In every container, whatever enableServiceLinks says.
_MASTER = {
    "KUBERNETES_SERVICE_HOST": _API,
    "KUBERNETES_SERVICE_PORT": "443",
    "KUBERNETES_SERVICE_PORT_HTTPS": "443",
    "KUBERNETES_PORT": f"tcp://{_API}:443",
    "KUBERNETES_PORT_443_TCP": f"tcp://{_API}:443",
    "KUBERNETES_PORT_443_TCP_PROTO": "tcp",
    "KUBERNETES_PORT_443_TCP_PORT": "443",
    "KUBERNETES_PORT_443_TCP_ADDR": _API,
}


class ConfigError(Exception):
    """CreateContainerConfigError, in the kubelet's words."""


def request_of(pod: Json, container: Json, image: Json, mounts: list[Json], shm: str, mount_point: str, knobs: Knobs) -> Json:
    """Raises ConfigError."""
    context = {**pod["spec"]["securityContext"], **(container.get("securityContext") or {})}
    environment = _environment(pod, container)
    command = [_expand(word, environment) for word in container.get("command") or ["/bin/sh"]]
    command += [_expand(word, environment) for word in container.get("args") or []]
    dropped = "ALL" in ((context.get("capabilities") or {}).get("drop") or [])
    return {
        "command": command,
        "environment": environment,
        "directory": container.get("workingDir") or "/",
        **_identity(pod, container, context),
        "drop_capabilities": dropped,
        "no_new_privileges": context.get("allowPrivilegeEscalation") is False,
        "readonly_root": bool(context.get("readOnlyRootFilesystem")),
        "hostname": pod["spec"].get("hostname") or pod["metadata"]["name"],
        "host_network": knobs.host_network or bool(pod["spec"].get("hostNetwork")),
        "image": image,
        "mounts": mounts,
        "shm": shm,
        "mount_point": mount_point,
    }


def _identity(pod: Json, container: Json, context: Json) -> Json:
    user, group = context.get("runAsUser", 0), context.get("runAsGroup", 0)
    if context.get("runAsNonRoot") and user == 0:
        name = pod["metadata"]["name"]
        where = f'(pod: "{name}_{pod["metadata"]["namespace"]}({pod["metadata"]["uid"]})", container: {container["name"]})'
        if "runAsUser" in context:
            raise ConfigError(f"container's runAsUser breaks non-root policy {where}")
        raise ConfigError(f"container has runAsNonRoot and image will run as root {where}")
    more = [*(context.get("supplementalGroups") or []), *([context["fsGroup"]] if "fsGroup" in context else [])]
    return {"user": user, "group": group, "supplementary_groups": [group, *more]}


def _environment(pod: Json, container: Json) -> dict[str, str]:
    found = {"PATH": _PATH, "HOSTNAME": pod["spec"].get("hostname") or pod["metadata"]["name"], **_MASTER}
    for variable in container.get("env") or []:
        if variable.get("valueFrom"):
            path = (variable["valueFrom"].get("fieldRef") or {}).get("fieldPath")
            if path is None:
                kind = "secret" if "secretKeyRef" in variable["valueFrom"] else "configmap"
                raise ConfigError(f'{kind} "{variable["valueFrom"].get(f"{kind}KeyRef", {}).get("name", "")}" not found')
            found[variable["name"]] = _field(pod, path)
        else:
            found[variable["name"]] = _expand(variable.get("value", ""), found)
    return found


def _field(pod: Json, path: str) -> str:
    found: Any = pod
    for name in path.split("."):
        found = found.get(name, "")
    return str(found)


def _expand(text: str, environment: dict[str, str]) -> str:
    """``$(NAME)``, and ``$$`` for a dollar. https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables/"""

    def value(match: re.Match[str]) -> str:
        return "$" if match[1] == "$" else environment.get(match[2], match[0])

    return _REFERENCE.sub(value, text)


def limits_of(container: Json, knobs: Knobs) -> Limits:
    """Of its control groups."""
    limits = container.get("resources", {}).get("limits", {})
    return Limits(
        memory_bytes=whole(limits["memory"]) if "memory" in limits else None,
        cpus=float(quantity(limits["cpu"])) if "cpu" in limits else None,
        max_processes=knobs.pids_limit or None,
    )


def is_below(path: str, root: str) -> bool:
    """Whether ``path`` is ``root`` or in it."""
    return os.path.commonpath([path, root]) == root
