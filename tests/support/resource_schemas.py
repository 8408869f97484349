"""Whether an object is what the API server would take, by published schemas; of custom resources, by small ones of our own.

The schemas of Kubernetes' own kinds come from its OpenAPI documents and with the package kubernetes-validate; unknown fields are errors.
KEDA's and the Prometheus Operator's kinds are not in it: for them the fields that we use are listed here
(https://keda.sh/docs/latest/reference/scaledobject-spec/, https://keda.sh/docs/latest/concepts/authentication/,
https://prometheus-operator.dev/docs/api-reference/api/), and any other is an error.
"""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate

from tests.support.manifests import Document

OLDEST, NEWEST = "1.29", "1.37"

_TEXT, _COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required), "additionalProperties": False}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1}


_METADATA = _object({"name": _TEXT, "namespace": _TEXT}, labels={"type": "object", "additionalProperties": {"type": "string"}})
_POLICY = _object({"type": {"enum": ["Pods", "Percent"]}, "value": _COUNT, "periodSeconds": {"type": "integer", "maximum": 1800}})
_RULES = _object({"policies": _list(_POLICY)}, stabilizationWindowSeconds={"type": "integer", "maximum": 3600})
_TRIGGER = _object(
    {
        "type": {"const": "redis"},
        "metadata": _object({"address": _TEXT, "listName": _TEXT, "listLength": {"pattern": "^[0-9]+$"}, "databaseIndex": _TEXT}),
        "authenticationRef": _object({"name": _TEXT}),
    }
)
_SCALED_OBJECT = _object(
    {"scaleTargetRef": _object({"name": _TEXT}, apiVersion=_TEXT, kind=_TEXT), "triggers": _list(_TRIGGER)},
    minReplicaCount=_COUNT,
    maxReplicaCount=_COUNT,
    pollingInterval=_COUNT,
    cooldownPeriod=_COUNT,
    fallback=_object({"failureThreshold": _COUNT, "replicas": _COUNT}),
    advanced=_object({"horizontalPodAutoscalerConfig": _object({"behavior": _object({}, scaleDown=_RULES, scaleUp=_RULES)})}),
)
_RELABELING = _object({"sourceLabels": _list(_TEXT), "targetLabel": _TEXT})
_ENDPOINT = _object({"port": _TEXT}, path=_TEXT, interval=_TEXT, scrapeTimeout=_TEXT, relabelings=_list(_RELABELING))
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_ALERT = _object({"alert": _TEXT, "expr": _TEXT, "labels": _TEXTS, "annotations": _TEXTS}, **{"for": _TEXT})
_SPECS = {
    ("keda.sh/v1alpha1", "ScaledObject"): _SCALED_OBJECT,
    ("keda.sh/v1alpha1", "TriggerAuthentication"): _object(
        {"secretTargetRef": _list(_object({"parameter": _TEXT, "name": _TEXT, "key": _TEXT}))}
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _object(
        {"selector": {"type": "object"}, "endpoints": _list(_ENDPOINT)}, jobLabel=_TEXT
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _object({"groups": _list(_object({"name": _TEXT, "rules": _list(_ALERT)}))}),
}
CUSTOM = frozenset(kind for _, kind in _SPECS)


def faults(document: Document, version: str) -> str:
    """What is wrong with it in that version of Kubernetes; empty when nothing is."""
    kind = (document["apiVersion"], document["kind"])
    try:
        if kind in _SPECS:
            whole = _object({"apiVersion": _TEXT, "kind": _TEXT, "metadata": _METADATA, "spec": _SPECS[kind]})
            jsonschema.validate(document, whole)
        else:
            kubernetes_validate.validate(document, version, strict=True)
    except jsonschema.ValidationError as error:
        return f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return str(error.message)
    return ""
