"""What the API server refuses with 422: the rules that a client of this project could break.

https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/core/validation/validation.go and pkg/apis/batch/validation/validation.go
"""

from __future__ import annotations

import re
from typing import Any

from tests.support.kubernetes.problems import Cause
from tests.support.kubernetes.quantities import quantity
from tests.support.kubernetes.selection import is_label_key, is_label_value

Json = dict[str, Any]

_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
_SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
_MAX_ID = 2**31 - 1
_SUBDOMAIN_WORDS = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an "
    "alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_LABEL_WORDS = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an "
    "alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_VALUE_WORDS = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an "
    "alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_ANNOTATION_BYTES = 256 * 1024


def _invalid(field: str, value: object, why: str) -> Cause:
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    return Cause("FieldValueInvalid", f"Invalid value: {shown}: {why}", field)


def _required(field: str, why: str = "") -> Cause:
    return Cause("FieldValueRequired", f"Required value: {why}" if why else "Required value", field)


def _not_supported(field: str, value: str, valid: tuple[str, ...]) -> Cause:
    words = ", ".join(f'"{v}"' for v in sorted(valid))
    return Cause("FieldValueNotSupported", f'Unsupported value: "{value}": supported values: {words}', field)


def metadata(meta: Json, path: str = "metadata", *, named: bool = True) -> list[Cause]:
    """Name, labels and annotations."""
    wrong: list[Cause] = []
    name = meta.get("name", "")
    if named and not name:
        wrong.append(_required(f"{path}.name", "name or generateName is required"))
    elif named and (len(name) > 253 or not _SUBDOMAIN.match(name)):
        wrong.append(_invalid(f"{path}.name", name, _SUBDOMAIN_WORDS if len(name) <= 253 else "must be no more than 253 characters"))
    for key, value in (meta.get("labels") or {}).items():
        if not is_label_key(key):
            wrong.append(_invalid(f"{path}.labels", key, "name part must consist of alphanumeric characters, '-', '_' or '.'"))
        if not is_label_value(value):
            wrong.append(_invalid(f"{path}.labels", value, "must be no more than 63 characters" if len(value) > 63 else _VALUE_WORDS))
    annotations = meta.get("annotations") or {}
    for key in annotations:
        if not is_label_key(key.lower()):
            wrong.append(_invalid(f"{path}.annotations", key, "name part must consist of alphanumeric characters, '-', '_' or '.'"))
    if sum(len(k.encode()) + len(v.encode()) for k, v in annotations.items()) > _ANNOTATION_BYTES:
        wrong.append(Cause("FieldValueTooLong", f"Too long: may not be more than {_ANNOTATION_BYTES} bytes", f"{path}.annotations"))
    return wrong


def job(item: Json) -> list[Cause]:
    """All that is wrong with a Job."""
    spec = item["spec"]
    wrong = metadata(item["metadata"])
    for name in ("parallelism", "completions", "activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"):
        if spec.get(name, 0) < 0:
            wrong.append(_invalid(f"spec.{name}", spec[name], "must be greater than or equal to 0"))
    if spec["podReplacementPolicy"] not in ("Failed", "TerminatingOrFailed"):
        wrong.append(_not_supported("spec.podReplacementPolicy", spec["podReplacementPolicy"], ("Failed", "TerminatingOrFailed")))
    template = spec["template"]
    wrong += metadata(template["metadata"], "spec.template.metadata", named=False)
    wrong += _generated_labels(item)
    wrong += pod_spec(template["spec"], "spec.template.spec")
    restart = template["spec"].get("restartPolicy")
    if restart == "Always":
        wrong.append(_required("spec.template.spec.restartPolicy", 'valid values: "OnFailure", "Never"'))
    elif restart not in ("OnFailure", "Never"):
        wrong.append(_not_supported("spec.template.spec.restartPolicy", str(restart), ("OnFailure", "Never")))
    return wrong


def _generated_labels(item: Json) -> list[Cause]:
    labels = item["spec"]["template"]["metadata"].get("labels", {})
    wrong: list[Cause] = []
    for label, value in (("controller-uid", item["metadata"]["uid"]), ("job-name", item["metadata"]["name"])):
        for key in (label, f"batch.kubernetes.io/{label}"):
            if labels.get(key) != value:
                wrong.append(_invalid("spec.template.metadata.labels", labels, f"must be '{value}'"))
            elif not is_label_value(value):
                wrong.append(_invalid("spec.template.labels", value, "must be no more than 63 characters"))
    return wrong


def job_update(new: Json, old: Json) -> list[Cause]:
    """What may not change."""
    wrong = job(new)
    for name in ("completions", "selector", "template", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy"):
        if new["spec"].get(name) != old["spec"].get(name):
            wrong.append(Cause("FieldValueInvalid", "Invalid value: field is immutable", f"spec.{name}"))
    return wrong


def pod(item: Json) -> list[Cause]:
    """All that is wrong with a Pod."""
    return metadata(item["metadata"]) + pod_spec(item["spec"], "spec")


def pod_update(new: Json, old: Json) -> list[Cause]:
    """A Pod's spec is what it was, but for images, deadlines and tolerations."""
    free = {"activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds"}
    same = {k: v for k, v in new["spec"].items() if k not in free} == {k: v for k, v in old["spec"].items() if k not in free}
    words = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    words += "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    words += "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
    return metadata(new["metadata"]) + ([] if same else [Cause("FieldValueForbidden", f"Forbidden: {words}", "spec")])


def pod_spec(spec: Json, path: str) -> list[Cause]:
    """Of a Pod or of a template."""
    wrong: list[Cause] = []
    volumes = _volume_names(spec, path, wrong)
    containers = spec.get("containers") or []
    if not containers:
        wrong.append(_required(f"{path}.containers"))
    seen: set[str] = set()
    for kind, several in (("initContainers", spec.get("initContainers") or []), ("containers", containers)):
        for index, container in enumerate(several):
            wrong += _container(container, f"{path}.{kind}[{index}]", volumes, seen)
    return wrong + _scalars(spec, path)


def _scalars(spec: Json, path: str) -> list[Cause]:
    wrong: list[Cause] = []
    if spec.get("restartPolicy") not in ("Always", "OnFailure", "Never"):
        wrong.append(_not_supported(f"{path}.restartPolicy", str(spec.get("restartPolicy")), ("Always", "OnFailure", "Never")))
    if not 1 <= spec.get("activeDeadlineSeconds", 1) <= _MAX_ID:
        wrong.append(
            _invalid(f"{path}.activeDeadlineSeconds", spec["activeDeadlineSeconds"], f"must be between 1 and {_MAX_ID}, inclusive")
        )
    if spec["terminationGracePeriodSeconds"] < 0:
        value = spec["terminationGracePeriodSeconds"]
        wrong.append(_invalid(f"{path}.terminationGracePeriodSeconds", value, "must be greater than or equal to 0"))
    wrong += _identity(spec.get("securityContext") or {}, f"{path}.securityContext")
    for field in ("serviceAccountName", "priorityClassName", "runtimeClassName"):
        if spec.get(field) and not _SUBDOMAIN.match(spec[field]):
            wrong.append(_invalid(f"{path}.{field}", spec[field], _SUBDOMAIN_WORDS))
    for key, value in (spec.get("nodeSelector") or {}).items():
        if not is_label_key(key) or not is_label_value(value):
            wrong.append(_invalid(f"{path}.nodeSelector", value, _VALUE_WORDS))
    return wrong


def _volume_names(spec: Json, path: str, wrong: list[Cause]) -> set[str]:
    names: set[str] = set()
    for index, volume in enumerate(spec.get("volumes") or []):
        where = f"{path}.volumes[{index}]"
        name = volume.get("name", "")
        if not name:
            wrong.append(_required(f"{where}.name"))
        elif name in names:
            wrong.append(Cause("FieldValueDuplicate", f'Duplicate value: "{name}"', f"{where}.name"))
        elif not _LABEL.match(name) or len(name) > 63:
            wrong.append(_invalid(f"{where}.name", name, _LABEL_WORDS))
        if len(volume) > 2:
            wrong.append(Cause("FieldValueForbidden", "Forbidden: may not specify more than 1 volume type", where))
        medium = volume.get("emptyDir", {}).get("medium", "")
        if medium not in ("", "Memory") and not medium.startswith("HugePages"):
            wrong.append(_not_supported(f"{where}.emptyDir.medium", medium, ("", "Memory", "HugePages")))
        for item in volume.get("downwardAPI", {}).get("items", []):
            _relative(item.get("path", ""), f"{where}.downwardAPI.path", wrong)
        names.add(name)
    return names


def _relative(path: str, field: str, wrong: list[Cause]) -> None:
    if path.startswith("/"):
        wrong.append(_invalid(field, path, "must be a relative path"))
    if ".." in path.split("/"):
        wrong.append(_invalid(field, path, "must not contain '..'"))


def _container(container: Json, path: str, volumes: set[str], seen: set[str]) -> list[Cause]:
    wrong: list[Cause] = []
    name = container.get("name", "")
    if not name:
        wrong.append(_required(f"{path}.name"))
    elif not _LABEL.match(name) or len(name) > 63:
        wrong.append(_invalid(f"{path}.name", name, _LABEL_WORDS))
    elif name in seen:
        wrong.append(Cause("FieldValueDuplicate", f'Duplicate value: "{name}"', f"{path}.name"))
    seen.add(name)
    image = container.get("image", "")
    if not image:
        wrong.append(_required(f"{path}.image"))
    elif image != image.strip():
        wrong.append(_invalid(f"{path}.image", image, "must not have leading or trailing whitespace"))
    wrong += _mounts(container.get("volumeMounts") or [], path, volumes)
    wrong += _resources(container.get("resources") or {}, f"{path}.resources")
    wrong += _identity(container.get("securityContext") or {}, f"{path}.securityContext")
    for index, variable in enumerate(container.get("env") or []):
        if not variable.get("name"):
            wrong.append(_required(f"{path}.env[{index}].name"))
        elif "=" in variable["name"] or not variable["name"].isprintable():
            words = "a valid environment variable name must consist only of printable ASCII characters other than '='"
            wrong.append(_invalid(f"{path}.env[{index}].name", variable["name"], words))
    if container.get("imagePullPolicy") not in ("Always", "IfNotPresent", "Never"):
        wrong.append(_not_supported(f"{path}.imagePullPolicy", container["imagePullPolicy"], ("Always", "IfNotPresent", "Never")))
    return wrong


def _mounts(mounts: list[Json], path: str, volumes: set[str]) -> list[Cause]:
    wrong: list[Cause] = []
    targets: set[str] = set()
    for index, mount in enumerate(mounts):
        where = f"{path}.volumeMounts[{index}]"
        if mount.get("name") not in volumes:
            wrong.append(Cause("FieldValueNotFound", f'Not found: "{mount.get("name", "")}"', f"{where}.name"))
        target = mount.get("mountPath", "")
        if not target:
            wrong.append(_required(f"{where}.mountPath"))
        elif target in targets:
            wrong.append(_invalid(f"{where}.mountPath", target, "must be unique"))
        if ":" in target:
            wrong.append(_invalid(f"{where}.mountPath", target, "must not contain ':'"))
        targets.add(target)
        _relative(mount.get("subPath", ""), f"{where}.subPath", wrong)
    return wrong


def _resources(resources: Json, path: str) -> list[Cause]:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    wrong: list[Cause] = []
    for field, values in (("limits", limits), ("requests", requests)):
        for name, value in values.items():
            if quantity(value) < 0:
                wrong.append(_invalid(f"{path}.{field}[{name}]", value, "must be greater than or equal to 0"))
            if name not in ("cpu", "memory", "ephemeral-storage") and "/" not in name and not name.startswith("hugepages-"):
                wrong.append(_invalid(f"{path}.{field}[{name}]", name, "must be a standard resource for containers"))
    for name, value in requests.items():
        if name in limits and quantity(value) > quantity(limits[name]):
            wrong.append(_invalid(f"{path}.requests", str(value), f"must be less than or equal to {name} limit of {limits[name]}"))
    return wrong


def _identity(context: Json, path: str) -> list[Cause]:
    wrong: list[Cause] = []
    for field in ("runAsUser", "runAsGroup", "fsGroup"):
        if not 0 <= context.get(field, 0) <= _MAX_ID:
            wrong.append(_invalid(f"{path}.{field}", context[field], f"must be between 0 and {_MAX_ID}, inclusive"))
    for capability in (context.get("capabilities") or {}).get("add", []):
        if not capability:
            wrong.append(_required(f"{path}.capabilities.add"))
    if context.get("allowPrivilegeEscalation") is False and context.get("privileged"):
        words = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true"
        wrong.append(_invalid(path, "", words))
    profile = context.get("seccompProfile")
    if profile is not None and profile.get("type") not in ("RuntimeDefault", "Unconfined", "Localhost"):
        wrong.append(_not_supported(f"{path}.seccompProfile.type", str(profile.get("type")), ("Localhost", "RuntimeDefault", "Unconfined")))
    return wrong
