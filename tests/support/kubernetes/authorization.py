"""Who asks, and what they may: bearer tokens and the rules of Roles. https://kubernetes.io/docs/reference/access-authn-authz/rbac/"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from tests.support.kubernetes.problems import ApiError, forbidden, unauthorized

Json = dict[str, Any]


@dataclass
class Grant:
    """A Role's rules; ``namespace`` "" is a ClusterRole bound cluster-wide."""

    namespace: str
    rules: list[Json]


@dataclass
class User:
    """``name`` as in messages; ``token`` is what is good now; an administrator may everything."""

    name: str
    token: str
    grants: list[Grant] = field(default_factory=list)
    is_admin: bool = False


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What is asked for. ``path`` is set instead of a resource for those like /version."""

    verb: str
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""

    @property
    def full_resource(self) -> str:
        """``pods/exec``."""
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource


#: What system:discovery and system:public-info-viewer give to everybody.
_PUBLIC_PATHS = ("/api", "/api/", "/apis", "/healthz", "/livez", "/openapi", "/readyz", "/version", "/version/")
#: What system:basic-user gives to everybody.
_PUBLIC_RESOURCES = ("selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews")


class Users:
    """Every user of the server."""

    def __init__(self) -> None:
        self._users: dict[str, User] = {}

    def add(self, name: str, *, is_admin: bool, grants: list[Grant]) -> User:
        """With a token of its own; a user of that name is replaced and keeps its token."""
        token = self._users[name].token if name in self._users else secrets.token_urlsafe(24)
        user = self._users[name] = User(name, token, grants, is_admin)
        return user

    def rotate(self, name: str) -> str:
        """The old token is refused from here on; returns the new one."""
        self._users[name].token = secrets.token_urlsafe(24)
        return self._users[name].token

    def by_header(self, header: str) -> User:
        """Raises ApiError 401."""
        kind, _, token = header.partition(" ")
        for user in self._users.values():
            if kind.lower() == "bearer" and secrets.compare_digest(user.token, token.strip()):
                return user
        raise unauthorized()


def allows(user: User, wanted: Attributes) -> bool:
    """By the user's rules and by what everybody may."""
    if user.is_admin or (wanted.group == "authorization.k8s.io" and wanted.resource in _PUBLIC_RESOURCES):
        return True
    if wanted.path:
        return wanted.verb == "get" and any(wanted.path == p or wanted.path.startswith(f"{p.rstrip('/')}/") for p in _PUBLIC_PATHS)
    rules = [r for g in user.grants if g.namespace in ("", wanted.namespace) for r in g.rules]
    return any(_covers(rule, wanted) for rule in rules)


def _covers(rule: Json, wanted: Attributes) -> bool:
    names = rule.get("resourceNames") or []
    return (
        _has(rule.get("verbs"), wanted.verb)
        and _has(rule.get("apiGroups"), wanted.group)
        and (_has(rule.get("resources"), wanted.full_resource) or f"*/{wanted.subresource}" in (rule.get("resources") or []))
        and (not names or wanted.name in names)
    )


def _has(words: list[str] | None, word: str) -> bool:
    return word in (words or []) or "*" in (words or [])


def check(user: User, wanted: Attributes) -> None:
    """Raises ApiError 403."""
    if not allows(user, wanted):
        raise denial(user, wanted)


def denial(user: User, wanted: Attributes) -> ApiError:
    """As the real one words it."""
    who = f'User "{user.name}" cannot {wanted.verb}'
    if wanted.path:
        return ApiError(403, "Forbidden", f'forbidden: {who} path "{wanted.path}"', {})
    where = f'in the namespace "{wanted.namespace}"' if wanted.namespace else "at the cluster scope"
    words = f'{who} resource "{wanted.full_resource}" in API group "{wanted.group}" {where}'
    return forbidden(wanted.group, wanted.resource, wanted.name, words)


def access_review(user: User, body: Json) -> Json:
    """The status of a SelfSubjectAccessReview."""
    spec = body.get("spec") or {}
    about = spec.get("resourceAttributes")
    if about is None:
        path = spec.get("nonResourceAttributes") or {}
        wanted = Attributes(verb=path.get("verb", ""), path=path.get("path", ""))
    else:
        wanted = Attributes(**{name: about.get(name, "") for name in ("verb", "group", "resource", "subresource", "namespace", "name")})
    return {"allowed": True, "reason": "RBAC: allowed"} if allows(user, wanted) else {"allowed": False}


def rules_review(user: User, namespace: str) -> Json:
    """The status of a SelfSubjectRulesReview."""
    everything = [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}] if user.is_admin else []
    rules = [r for g in user.grants if g.namespace in ("", namespace) for r in g.rules]
    paths = [{"verbs": ["get"], "nonResourceURLs": list(_PUBLIC_PATHS)}]
    return {"resourceRules": everything + rules, "nonResourceRules": paths, "incomplete": False}
