"""A Pod template of the operator's over ours: node selectors, tolerations, volumes, pull secrets, whatever we did not think of.

Objects are merged, null removes, and lists whose members have names are merged by them, as kubectl's strategic merge does
(https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/); other lists replace.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cifixer_exec.errors import InvalidRequestError

#: By what the members of a list are told apart.
_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "hostAliases": "ip",
}
_SHAPE = "give a Pod template: an object with metadata and spec, as under spec.template of a Job"


def read(path: str) -> dict[str, Any]:
    """The template in a YAML or JSON file; nothing for no path.

    Raises:
        InvalidRequestError: it cannot be read, or is no Pod template.
    """
    if not path:
        return {}
    what = f"kubernetes_pod_template={path!r}"
    try:
        found = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InvalidRequestError(f"{what} cannot be read: {error.strerror}: give the path of a YAML or JSON file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{what} is no YAML: {str(error).splitlines()[0]}") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not set(found) <= {"metadata", "spec"} or not all(isinstance(v, dict) for v in found.values()):
        raise InvalidRequestError(f"{what} is no Pod template: {_SHAPE}")
    for part, name in (("metadata", "labels"), ("metadata", "annotations"), ("spec", "securityContext")):
        if not isinstance(found.get(part, {}).get(name) or {}, dict):
            raise InvalidRequestError(f"{what} has a {part}.{name} that is no object: {_SHAPE}")
    _check_lists(found, what)
    return found


def _check_lists(value: Any, what: str, name: str = "") -> None:
    """Raises InvalidRequestError where what is merged by names has none; our container cannot be removed."""
    if name == "containers" and value is None:
        raise InvalidRequestError(f"{what} removes all containers: give those that you add or change, by their names (ours: 'sandbox')")
    if name in _KEYS and value is not None:
        key = _KEYS[name]
        if not isinstance(value, list) or not all(isinstance(member, dict) and member.get(key) for member in value):
            raise InvalidRequestError(f"{what} is no Pod template: {name!r} is a list of objects, each with its {key!r}")
    members = value.items() if isinstance(value, dict) else [("", member) for member in value] if isinstance(value, list) else ()
    for key, member in members:
        _check_lists(member, what, str(key))


def merged(ours: Any, theirs: Any, name: str = "") -> Any:
    """``theirs`` over ``ours``; neither is changed. ``name``: of the member that both are."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        kept = {key: merged(value, theirs[key], key) if key in theirs else value for key, value in ours.items()}
        added = {key: value for key, value in theirs.items() if key not in ours}
        return {key: value for key, value in {**kept, **added}.items() if value is not None}
    if isinstance(ours, list) and isinstance(theirs, list) and name in _KEYS:
        return _merged_by(_KEYS[name], ours, theirs)
    return theirs


def _merged_by(key: str, ours: list[Any], theirs: list[Any]) -> list[Any]:
    over = {member.get(key): member for member in theirs if isinstance(member, Mapping)}
    kept = [merged(member, over.pop(member[key])) if member[key] in over else member for member in ours]
    return [*kept, *(member for member in theirs if isinstance(member, Mapping) and member.get(key) in over)]
