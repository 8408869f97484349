"""What a Pod may not have at the level *restricted* (https://kubernetes.io/docs/concepts/security/pod-security-standards/), as of 1.36."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_PROFILES = ("RuntimeDefault", "Localhost")


def violations(pod: Mapping[str, Any]) -> list[str]:
    """Of a Pod or a Pod template, a phrase each; none when the namespace lets it in."""
    return list(_of_pod(pod["spec"]))


def _of_pod(spec: Mapping[str, Any]) -> Iterator[str]:
    context = spec.get("securityContext") or {}
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield name
    for volume in spec.get("volumes") or []:
        if kinds := set(volume) - {"name"} - _VOLUMES:
            yield f"volume {volume['name']}: {', '.join(kinds)}"
    if context.get("sysctls"):
        yield "sysctls"
    for container in (*(spec.get("initContainers") or []), *spec["containers"], *(spec.get("ephemeralContainers") or [])):
        yield from (f"container {container['name']}: {what}" for what in _of_container(container, context))


def _of_container(container: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterator[str]:
    own = container.get("securityContext") or {}
    context, capabilities = {**pod, **own}, own.get("capabilities") or {}
    broken = {
        "privileged": bool(own.get("privileged")),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
        "capabilities are not dropped": "ALL" not in (capabilities.get("drop") or []),
        "capabilities are added": bool(set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}),
        "runAsNonRoot": context.get("runAsNonRoot") is not True,
        "runAsUser": context.get("runAsUser") == 0,
        "seccompProfile": (context.get("seccompProfile") or {}).get("type") not in _PROFILES,
        "procMount": own.get("procMount", "Default") != "Default",
        "appArmorProfile": (context.get("appArmorProfile") or {}).get("type") == "Unconfined",
        "hostPort": any(port.get("hostPort") for port in container.get("ports") or []),
    }
    yield from (what for what, is_so in broken.items() if is_so)
