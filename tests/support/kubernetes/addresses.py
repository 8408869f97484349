"""What a request's method and path ask for. https://kubernetes.io/docs/reference/access-authn-authz/authorization/#determine-the-request-verb"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.support.kubernetes.authorization import Attributes

_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "GET": "get", "HEAD": "get"}


@dataclass(frozen=True, kw_only=True)
class Address:
    """``version`` "" means a path like /version."""

    verb: str
    path: str
    group: str = ""
    version: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""

    @property
    def attributes(self) -> Attributes:
        """For the authorizer."""
        if not self.resource:
            return Attributes(verb=self.verb, path=self.path)
        return Attributes(
            verb=self.verb, group=self.group, resource=self.resource, subresource=self.subresource, namespace=self.namespace, name=self.name
        )


def address_of(method: str, path: str, query: Mapping[str, str]) -> Address:
    """Paths that are not of resources keep the method as their verb."""
    parts = [p for p in path.split("/") if p]
    verb = _VERBS.get(method, method.lower())
    plain = Address(verb=method.lower(), path=path)
    if parts[:1] == ["api"] and len(parts) >= 3:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[:1] == ["apis"] and len(parts) >= 4:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return plain
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    resource, name, subresource = (*rest, "", "")[:3]
    if resource == "namespaces" and name:
        namespace = name
    if verb == "get" and not name:
        verb = "watch" if _true(query.get("watch", "")) else "list"
    elif verb == "get" and not subresource and _true(query.get("watch", "")):
        verb = "watch"
    elif verb == "delete" and not name:
        verb = "deletecollection"
    return Address(
        verb=verb, path=path, group=group, version=version, resource=resource, subresource=subresource, namespace=namespace, name=name
    )


def _true(text: str) -> bool:
    return text.lower() in ("1", "t", "true")
