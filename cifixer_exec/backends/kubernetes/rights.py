"""Whether we may do in the namespace what sandboxes need, asked before something fails half-way.

https://kubernetes.io/docs/reference/access-authn-authz/authorization/#checking-api-access; everybody may ask about himself.
"""

from __future__ import annotations

from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.refusals import RefusedError, translate

#: (group, resource, verbs): all that the backend asks for; k8s/rbac/role.yaml grants this and nothing else.
#: An exec by WebSocket is a GET, so "get" was always needed, and since 1.35 "create" as well (KEP-4006).
NEEDED = (
    ("batch", "jobs", ("create", "get", "list", "patch", "delete")),
    ("", "pods", ("get", "list", "watch", "delete")),
    ("", "pods/log", ("get",)),
    ("", "pods/exec", ("get", "create")),
    ("", "events", ("list",)),
)
EXEC = tuple(right for right in NEEDED if right[1] == "pods/exec")


def missing(cluster: Cluster, needed: tuple[tuple[str, str, tuple[str, ...]], ...] = NEEDED) -> list[str]:
    """Those that we have not, as ``"create pods/exec"``.

    Raises:
        BackendUnavailableError: the cluster does not answer.
    """
    return [f"{verb} {resource}" for group, resource, verbs in needed for verb in verbs if not _may(cluster, group, resource, verb)]


def _may(cluster: Cluster, group: str, resource: str, verb: str) -> bool:
    kind, _, part = resource.partition("/")
    asked = {"namespace": cluster.namespace, "verb": verb, "group": group, "resource": kind, "subresource": part}
    body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": asked}}
    doing = "asking what is allowed"
    try:
        answer = cluster.ask("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", doing, body=body)
    except RefusedError as error:
        raise translate(error, doing) from None
    return bool((answer.document.get("status") or {}).get("allowed"))
