"""Pod Security admission, level *restricted* (which contains *baseline*). https://kubernetes.io/docs/concepts/security/pod-security-standards/

The words are those of k8s.io/pod-security-admission.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

_VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret")
_SECCOMP = ("RuntimeDefault", "Localhost")


def violations(spec: Json, level: str) -> list[str]:
    """What a namespace with that ``enforce`` label refuses in a Pod; nothing for *privileged* and where there is no label."""
    if level == "restricted":
        return [*_baseline(spec), *_restricted(spec)]
    return _baseline(spec) if level == "baseline" else []


def _containers(spec: Json) -> list[Json]:
    return [*(spec.get("initContainers") or []), *spec["containers"]]


def _context(container: Json) -> Json:
    return container.get("securityContext") or {}


def _named(names: list[str], one: str = "container", several: str = "containers") -> str:
    quoted = ", ".join(f'"{name}"' for name in names)
    return f"{one if len(names) == 1 else several} {quoted}"


def _baseline(spec: Json) -> list[str]:
    found: list[str] = []
    hosts = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    if hosts:
        found.append(f"host namespaces ({', '.join(f'{name}=true' for name in hosts)})")
    paths = [v["name"] for v in spec.get("volumes") or [] if "hostPath" in v]
    if paths:
        found.append(f"hostPath volumes ({_named(paths, 'volume', 'volumes')})")
    privileged = [c["name"] for c in _containers(spec) if _context(c).get("privileged")]
    if privileged:
        found.append(f"privileged ({_named(privileged)} must not set securityContext.privileged=true)")
    return found


def _restricted(spec: Json) -> list[str]:
    rules = (_escalation, _capabilities, _volume_types, _non_root, _user, _seccomp)
    return [words for rule in rules if (words := rule(spec))]


def _escalation(spec: Json) -> str:
    names = [c["name"] for c in _containers(spec) if _context(c).get("allowPrivilegeEscalation") is not False]
    what = f"allowPrivilegeEscalation != false ({_named(names)} must set securityContext.allowPrivilegeEscalation=false)"
    return what if names else ""


def _capabilities(spec: Json) -> str:
    def drops(container: Json) -> bool:
        return "ALL" in ((_context(container).get("capabilities") or {}).get("drop") or [])

    def adds(container: Json) -> list[str]:
        return [c for c in (_context(container).get("capabilities") or {}).get("add") or [] if c != "NET_BIND_SERVICE"]

    words: list[str] = []
    keeping = [c["name"] for c in _containers(spec) if not drops(c)]
    if keeping:
        words.append(f'{_named(keeping)} must set securityContext.capabilities.drop=["ALL"]')
    adding = [c["name"] for c in _containers(spec) if adds(c)]
    if adding:
        added = ", ".join(f'"{name}"' for name in sorted({a for c in _containers(spec) for a in adds(c)}))
        words.append(f"{_named(adding)} must not include {added} in securityContext.capabilities.add")
    return f"unrestricted capabilities ({'; '.join(words)})" if words else ""


def _volume_types(spec: Json) -> str:
    bad = [(v["name"], next(k for k in v if k != "name")) for v in spec.get("volumes") or [] if not any(k in v for k in _VOLUMES)]
    if not bad:
        return ""
    types = ", ".join(f'"{kind}"' for kind in sorted({kind for _, kind in bad}))
    plural = "type" if len({kind for _, kind in bad}) == 1 else "types"
    return f"restricted volume types ({_named([name for name, _ in bad], 'volume', 'volumes')} uses restricted volume {plural} {types})"


def _non_root(spec: Json) -> str:
    pod = (spec.get("securityContext") or {}).get("runAsNonRoot")
    explicit = [c["name"] for c in _containers(spec) if _context(c).get("runAsNonRoot") is False]
    if explicit or pod is False:
        where = ["pod must not set securityContext.runAsNonRoot=false"] if pod is False else []
        where += [f"{_named(explicit)} must not set securityContext.runAsNonRoot=false"] if explicit else []
        return f"runAsNonRoot != true ({'; '.join(where)})"
    silent = [c["name"] for c in _containers(spec) if _context(c).get("runAsNonRoot") is None]
    if pod is True or not silent:
        return ""
    return f"runAsNonRoot != true (pod or {_named(silent)} must set securityContext.runAsNonRoot=true)"


def _user(spec: Json) -> str:
    words = ["pod"] if (spec.get("securityContext") or {}).get("runAsUser") == 0 else []
    roots = [c["name"] for c in _containers(spec) if _context(c).get("runAsUser") == 0]
    words += [_named(roots)] if roots else []
    return f"runAsUser=0 ({' and '.join(words)} must not set runAsUser=0)" if words else ""


def _seccomp(spec: Json) -> str:
    pod = ((spec.get("securityContext") or {}).get("seccompProfile") or {}).get("type")
    types = {c["name"]: (_context(c).get("seccompProfile") or {}).get("type") for c in _containers(spec)}
    wrong = [name for name, kind in types.items() if kind is not None and kind not in _SECCOMP]
    if wrong:
        return f'seccompProfile ({_named(wrong)} must not set securityContext.seccompProfile.type to "Unconfined")'
    silent = [name for name, kind in types.items() if kind is None]
    if pod in _SECCOMP or not silent:
        return ""
    return f'seccompProfile (pod or {_named(silent)} must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost")'
