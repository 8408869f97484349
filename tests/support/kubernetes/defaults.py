"""The values that the API server gives to fields that are not set.

https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/core/v1/defaults.go and pkg/apis/batch/v1/defaults.go
"""

from __future__ import annotations

import copy
from typing import Any

Json = dict[str, Any]

_TOLERATIONS = [
    {"key": f"node.kubernetes.io/{why}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
    for why in ("not-ready", "unreachable")
]
_JOB_LABELS = (("controller-uid", "uid"), ("job-name", "name"))


def pod_spec(spec: Json) -> None:
    """In place."""
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("schedulerName", "default-scheduler")
    spec.setdefault("securityContext", {})
    for container in (*spec.get("containers", []), *spec.get("initContainers", [])):
        _container(container)
    for volume in spec.get("volumes", []):
        if len(volume) == 1:
            volume["emptyDir"] = {}
        if "downwardAPI" in volume:
            volume["downwardAPI"].setdefault("defaultMode", 0o644)
            for item in volume["downwardAPI"].get("items", []):
                item.get("fieldRef", {}).setdefault("apiVersion", "v1")


def _container(container: Json) -> None:
    image = container.get("image", "")
    latest = ":" not in image.rpartition("/")[2] or image.endswith(":latest")
    container.setdefault("imagePullPolicy", "Always" if latest and "@" not in image else "IfNotPresent")
    container.setdefault("terminationMessagePath", "/dev/termination-log")
    container.setdefault("terminationMessagePolicy", "File")
    resources = container.setdefault("resources", {})
    for name, value in resources.get("limits", {}).items():
        resources.setdefault("requests", {}).setdefault(name, value)


def pod(item: Json) -> None:
    """A Pod itself, as its admission completes it."""
    spec = item["spec"]
    pod_spec(spec)
    spec.setdefault("enableServiceLinks", True)
    spec["serviceAccountName"] = spec.get("serviceAccountName") or "default"
    spec["serviceAccount"] = spec["serviceAccountName"]
    spec["tolerations"] = [*(spec.get("tolerations") or []), *copy.deepcopy(_TOLERATIONS)]
    spec.setdefault("priority", 0)
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")


def job(item: Json) -> None:
    """A Job without its generated selector."""
    spec = item["spec"]
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = spec["parallelism"] = 1
    spec.setdefault("parallelism", 1)
    spec.setdefault("backoffLimit", 6)
    spec.setdefault("completionMode", "NonIndexed")
    spec.setdefault("suspend", False)
    spec.setdefault("manualSelector", False)
    policy = spec.get("podFailurePolicy")
    spec.setdefault("podReplacementPolicy", "TerminatingOrFailed" if policy is None else "Failed")
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {})
    pod_spec(template.setdefault("spec", {}))
    if not item["metadata"].get("labels"):
        labels = template["metadata"].get("labels")
        if labels:
            item["metadata"]["labels"] = dict(labels)


def job_selector(item: Json) -> None:
    """The labels by which a Job knows its Pods."""
    metadata, spec = item["metadata"], item["spec"]
    if spec["manualSelector"]:
        return
    labels = spec["template"]["metadata"].setdefault("labels", {})
    for label, source in _JOB_LABELS:
        for key in (label, f"batch.kubernetes.io/{label}"):
            labels.setdefault(key, metadata[source])
    chosen = spec.setdefault("selector", {}).setdefault("matchLabels", {})
    chosen.setdefault("batch.kubernetes.io/controller-uid", metadata["uid"])
