"""What the API server answers when it does not do what was asked: metav1.Status in the real one's words.

https://github.com/kubernetes/kubernetes/blob/master/staging/src/k8s.io/apimachinery/pkg/api/errors/errors.go
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Cause:
    """One thing that is wrong with one field."""

    reason: str
    message: str
    field: str

    @property
    def body(self) -> Json:
        """As in ``details.causes``."""
        return {"reason": self.reason, "message": self.message, "field": self.field}


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(self, code: int, reason: str, message: str, details: Json | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details
        self.headers = headers or {}
        self.metadata: Json = {}

    @property
    def body(self) -> Json:
        """The Status object."""
        status: Json = {"kind": "Status", "apiVersion": "v1", "metadata": self.metadata, "status": "Failure", "message": self.message}
        if self.reason:
            status["reason"] = self.reason
        if self.details:
            status["details"] = self.details
        return {**status, "code": self.code}


def _details(group: str, kind: str, name: str, **more: Any) -> Json:
    found: Json = {"name": name, "group": group, "kind": kind, **more}
    return {key: value for key, value in found.items() if value not in ("", None)}


def qualified(group: str, resource: str) -> str:
    """``jobs.batch``."""
    return f"{resource}.{group}" if group else resource


def not_found(group: str, resource: str, name: str) -> ApiError:
    """404 for an object."""
    return ApiError(404, "NotFound", f'{qualified(group, resource)} "{name}" not found', _details(group, resource, name))


def no_such_path() -> ApiError:
    """404 for a resource that the server does not serve."""
    return ApiError(404, "NotFound", "the server could not find the requested resource", {})


def already_exists(group: str, resource: str, name: str) -> ApiError:
    """409 for a create."""
    return ApiError(409, "AlreadyExists", f'{qualified(group, resource)} "{name}" already exists', _details(group, resource, name))


def conflict(group: str, resource: str, name: str, why: str) -> ApiError:
    """409 for a precondition or an old resource version."""
    words = f'Operation cannot be fulfilled on {qualified(group, resource)} "{name}": {why}'
    return ApiError(409, "Conflict", words, _details(group, resource, name))


def forbidden(group: str, resource: str, name: str, why: str) -> ApiError:
    """403 by authorization, admission or quota."""
    which = f' "{name}"' if name else ""
    return ApiError(403, "Forbidden", f"{qualified(group, resource)}{which} is forbidden: {why}", _details(group, resource, name))


def unauthorized() -> ApiError:
    """401."""
    return ApiError(401, "Unauthorized", "Unauthorized")


def bad_request(message: str) -> ApiError:
    """400."""
    return ApiError(400, "BadRequest", message)


def invalid(group: str, kind: str, name: str, causes: list[Cause]) -> ApiError:
    """422 with all that is wrong."""
    errors = [f"{c.field}: {c.message}" for c in causes]
    text = errors[0] if len(errors) == 1 else f"[{', '.join(errors)}]"
    details = _details(group, kind, name, causes=[c.body for c in causes])
    return ApiError(422, "Invalid", f'{qualified(group, kind)} "{name}" is invalid: {text}', details)


def expired(message: str) -> ApiError:
    """410."""
    return ApiError(410, "Expired", message)


def too_many_requests(retry_after_s: int) -> ApiError:
    """429 as priority and fairness answers."""
    words = "the server has received too many requests and has asked us to try again later"
    return ApiError(429, "TooManyRequests", words, {"retryAfterSeconds": retry_after_s}, {"Retry-After": str(retry_after_s)})


def internal(message: str) -> ApiError:
    """500."""
    details = {"causes": [{"message": message}]}
    return ApiError(500, "InternalError", f"Internal error occurred: {message}", details)


def unavailable(message: str = "the server is currently unable to handle the request") -> ApiError:
    """503."""
    return ApiError(503, "ServiceUnavailable", message)
