"""Label and field selectors. https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.support.kubernetes.problems import bad_request

Json = dict[str, Any]
Test = Callable[[Json], bool]

_KEY = re.compile(r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
_VALUE = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")
_SET = re.compile(r"^(\S+)\s+(in|notin)\s*\(([^()]*)\)$")
_EQUAL = re.compile(r"^([^=!\s]+)\s*(!=|==|=)\s*(\S*)$")
_SPLIT = re.compile(r",(?![^(]*\))")

#: https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/core/v1/conversion.go: what may be asked for.
_FIELDS = {
    "pods": (
        *("metadata.name", "metadata.namespace", "spec.nodeName", "spec.restartPolicy", "spec.schedulerName"),
        *("spec.serviceAccountName", "spec.hostNetwork", "status.phase", "status.podIP", "status.nominatedNodeName"),
    ),
    "jobs": ("metadata.name", "metadata.namespace", "status.successful"),
    "events": (
        *("metadata.name", "metadata.namespace", "reason", "type", "source", "reportingComponent"),
        *(f"involvedObject.{f}" for f in ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")),
    ),
}


def is_label_key(text: str) -> bool:
    """Whether it may be one."""
    return _KEY.match(text) is not None and len(text.rpartition("/")[0]) <= 253


def is_label_value(text: str) -> bool:
    """Whether it may be one."""
    return _VALUE.match(text) is not None


def label_test(selector: str) -> Test:
    """Raises ApiError 400."""
    tests = [_label_requirement(part.strip()) for part in _SPLIT.split(selector)] if selector.strip() else []
    return lambda item: all(test(item["metadata"].get("labels") or {}) for test in tests)


def _label_requirement(part: str) -> Callable[[dict[str, str]], bool]:
    if match := _SET.match(part):
        key, operator, text = match.groups()
        values = {v.strip() for v in text.split(",")}
        _check(part, key, *values)
        return (lambda labels: labels.get(key) in values) if operator == "in" else (lambda labels: labels.get(key) not in values)
    if match := _EQUAL.match(part):
        key, operator, value = match.groups()
        _check(part, key, value)
        return (lambda labels: labels.get(key) != value) if operator == "!=" else (lambda labels: labels.get(key) == value)
    absent, key = part.startswith("!"), part.lstrip("!").strip()
    _check(part, key)
    return lambda labels: (key in labels) is not absent


def _check(part: str, key: str, *values: str) -> None:
    if not is_label_key(key) or not all(is_label_value(v) for v in values):
        raise bad_request(f'unable to parse requirement: invalid label in selector "{part}"')


def field_test(resource: str, selector: str) -> Test:
    """Raises ApiError 400."""
    tests: list[Test] = []
    for part in filter(None, selector.split(",")):
        match = _EQUAL.match(part.strip())
        if match is None:
            raise bad_request(f'invalid selector: "{selector}"; can\'t understand "{part}"')
        key, operator, value = match.groups()
        if key not in _FIELDS.get(resource, ("metadata.name", "metadata.namespace")):
            raise bad_request(f'field label not supported: "{key}"')
        tests.append(_field_requirement(key.split("."), value, wanted=operator != "!="))
    return lambda item: all(test(item) for test in tests)


def _field_requirement(path: list[str], value: str, *, wanted: bool) -> Test:
    def test(item: Json) -> bool:
        found: Any = item
        for name in path:
            found = found.get(name, "") if isinstance(found, dict) else ""
        return (_text(found) == value) is wanted

    return test


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
