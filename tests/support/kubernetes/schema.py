"""The fields of Jobs and Pods with their types: what is unknown is dropped with a warning, what is of a wrong type is refused.

https://kubernetes.io/docs/reference/using-api/api-concepts/#field-validation. A type is a name, a [type of items], a {fields}, or
{"*": type} for a map. Fields that no sandbox could want are missing here: they are told as unknown, which is stricter than the real one.
"""

from __future__ import annotations

from typing import Any

from tests.support.kubernetes.problems import bad_request
from tests.support.kubernetes.quantities import quantity

Json = dict[str, Any]

_TEXTS: Json = {"*": "string"}
_RESOURCES: Json = {"limits": {"*": "quantity"}, "requests": {"*": "quantity"}, "claims": "any"}
_SELECTOR: Json = {"matchLabels": _TEXTS, "matchExpressions": [{"key": "string", "operator": "string", "values": ["string"]}]}
_META: Json = {
    **dict.fromkeys(("name", "generateName", "namespace", "selfLink", "uid", "resourceVersion", "creationTimestamp"), "string"),
    "deletionTimestamp": "string",
    "labels": _TEXTS,
    "annotations": _TEXTS,
    "finalizers": ["string"],
    "managedFields": "any",
    "generation": "integer",
    "deletionGracePeriodSeconds": "integer",
    "ownerReferences": "any",
}
_SECCOMP: Json = {"type": "string", "localhostProfile": "string"}
_IDENTITY: Json = {
    "runAsUser": "integer",
    "runAsGroup": "integer",
    "runAsNonRoot": "boolean",
    "seccompProfile": _SECCOMP,
    "seLinuxOptions": "any",
    "windowsOptions": "any",
    "appArmorProfile": "any",
}
_POD_SECURITY: Json = {
    **_IDENTITY,
    "fsGroup": "integer",
    "fsGroupChangePolicy": "string",
    "supplementalGroups": ["integer"],
    "supplementalGroupsPolicy": "string",
    "sysctls": [{"name": "string", "value": "string"}],
    "seLinuxChangePolicy": "string",
}
_SECURITY: Json = {
    **_IDENTITY,
    "allowPrivilegeEscalation": "boolean",
    "privileged": "boolean",
    "readOnlyRootFilesystem": "boolean",
    "procMount": "string",
    "capabilities": {"add": ["string"], "drop": ["string"]},
}
_ENVIRONMENT: Json = {"name": "string", "value": "string", "valueFrom": "any"}
_MOUNT: Json = {
    "name": "string",
    "mountPath": "string",
    "subPath": "string",
    "subPathExpr": "string",
    "readOnly": "boolean",
    "mountPropagation": "string",
    "recursiveReadOnly": "string",
}
_CONTAINER: Json = {
    **dict.fromkeys(("name", "image", "imagePullPolicy", "workingDir", "terminationMessagePath", "terminationMessagePolicy"), "string"),
    "command": ["string"],
    "args": ["string"],
    "env": [_ENVIRONMENT],
    "envFrom": "any",
    "resources": _RESOURCES,
    "securityContext": _SECURITY,
    "volumeMounts": [_MOUNT],
    "volumeDevices": "any",
    "ports": "any",
    "resizePolicy": "any",
    "livenessProbe": "any",
    "readinessProbe": "any",
    "startupProbe": "any",
    "lifecycle": "any",
    "restartPolicy": "string",
    "stdin": "boolean",
    "stdinOnce": "boolean",
    "tty": "boolean",
}
_FIELD_REF: Json = {"apiVersion": "string", "fieldPath": "string"}
_FILE: Json = {"path": "string", "mode": "integer", "fieldRef": _FIELD_REF, "resourceFieldRef": "any"}
_VOLUME: Json = {
    "name": "string",
    "emptyDir": {"medium": "string", "sizeLimit": "quantity"},
    "downwardAPI": {"defaultMode": "integer", "items": [_FILE]},
    "persistentVolumeClaim": {"claimName": "string", "readOnly": "boolean"},
    "hostPath": {"path": "string", "type": "string"},
    **dict.fromkeys(("configMap", "secret", "projected", "ephemeral", "csi", "nfs", "image"), "any"),
}
_POD: Json = {
    **dict.fromkeys(("restartPolicy", "dnsPolicy", "nodeName", "hostname", "subdomain", "schedulerName", "priorityClassName"), "string"),
    **dict.fromkeys(("serviceAccountName", "serviceAccount", "runtimeClassName", "preemptionPolicy"), "string"),
    **dict.fromkeys(("hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace", "enableServiceLinks"), "boolean"),
    **dict.fromkeys(("activeDeadlineSeconds", "terminationGracePeriodSeconds", "priority"), "integer"),
    **dict.fromkeys(("affinity", "dnsConfig", "hostAliases", "readinessGates", "topologySpreadConstraints", "overhead", "os"), "any"),
    "automountServiceAccountToken": "boolean",
    "setHostnameAsFQDN": "boolean",
    "resourceClaims": "any",
    "schedulingGates": "any",
    "volumes": [_VOLUME],
    "initContainers": [_CONTAINER],
    "containers": [_CONTAINER],
    "securityContext": _POD_SECURITY,
    "nodeSelector": _TEXTS,
    "tolerations": "any",
    "imagePullSecrets": [{"name": "string"}],
    "resources": _RESOURCES,
}
_JOB: Json = {
    **dict.fromkeys(("parallelism", "completions", "activeDeadlineSeconds", "backoffLimit", "backoffLimitPerIndex"), "integer"),
    **dict.fromkeys(("maxFailedIndexes", "ttlSecondsAfterFinished"), "integer"),
    **dict.fromkeys(("completionMode", "podReplacementPolicy", "managedBy"), "string"),
    "suspend": "boolean",
    "manualSelector": "boolean",
    "podFailurePolicy": "any",
    "successPolicy": "any",
    "selector": _SELECTOR,
    "template": {"metadata": _META, "spec": _POD},
}
_OBJECTS: dict[str, Json] = {
    "jobs": {"apiVersion": "string", "kind": "string", "metadata": _META, "spec": _JOB, "status": "any"},
    "pods": {"apiVersion": "string", "kind": "string", "metadata": _META, "spec": _POD, "status": "any"},
}
_DELETE_OPTIONS: Json = {
    "apiVersion": "string",
    "kind": "string",
    "gracePeriodSeconds": "integer",
    "propagationPolicy": "string",
    "orphanDependents": "boolean",
    "preconditions": {"uid": "string", "resourceVersion": "string"},
    "dryRun": ["string"],
    "ignoreStoreReadErrorWithClusterBreakingPotential": "boolean",
}


def cleaned(resource: str, body: Json) -> tuple[Json, list[str]]:
    """The object without null and unknown fields, and the warnings about these. Raises ApiError 400."""
    shape = _OBJECTS.get(resource)
    if shape is None:
        return body, []
    unknown: list[str] = []
    return _clean(body, shape, "", unknown), [f'unknown field "{path}"' for path in unknown]


def delete_options(body: Json) -> Json:
    """Raises ApiError 400."""
    return dict(_clean(body, _DELETE_OPTIONS, "", []))


def _clean(value: Any, shape: Any, path: str, unknown: list[str]) -> Any:
    if shape == "any":
        return value
    if isinstance(shape, str):
        return _scalar(value, shape, path)
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise _ill(value, path, "list")
        return [_clean(v, shape[0], f"{path}[{i}]", unknown) for i, v in enumerate(value)]
    if not isinstance(value, dict):
        raise _ill(value, path, "object")
    return _clean_object(value, shape, path, unknown)


def _clean_object(value: Json, shape: Json, path: str, unknown: list[str]) -> Json:
    found: Json = {}
    for name, inner in value.items():
        below = f"{path}.{name}" if path else name
        kind = shape.get(name, shape.get("*"))
        if kind is None:
            unknown.append(below)
        elif inner is not None:
            found[name] = _clean(inner, kind, below, unknown)
    return found


def _scalar(value: Any, kind: str, path: str) -> Any:
    if kind == "quantity":
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise _ill(value, path, "Quantity")
        try:
            quantity(value)
        except ValueError as error:
            raise bad_request(f"unable to decode: json: {path}: {error}") from None
        return str(value)
    right = {"string": str, "integer": int, "boolean": bool}[kind]
    if not isinstance(value, right) or (kind == "integer" and isinstance(value, bool)):
        raise _ill(value, path, {"string": "string", "integer": "int64", "boolean": "bool"}[kind])
    return value


def _ill(value: Any, path: str, wanted: str) -> Exception:
    names = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}
    return bad_request(f"json: cannot unmarshal {names.get(type(value), 'null')} into Go struct field .{path} of type {wanted}")
