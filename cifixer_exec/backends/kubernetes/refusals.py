"""What an API server says as this package's errors: the one table of this boundary.

https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import urllib3
from kubernetes.client.exceptions import ApiException

from cifixer_exec.errors import BackendError, BackendUnavailableError, CapacityError, ExecutorError, InvalidRequestError, SandboxLostError

#: No answer at all; ApiException is what the kubernetes package makes of TLS errors.
NO_ANSWER = (urllib3.exceptions.HTTPError, ApiException, OSError)
#: "Not now": the same request may be welcome later.
LATER = frozenset({429, 500, 502, 503, 504})

_BY_STATUS: dict[int, type[ExecutorError]] = {
    400: InvalidRequestError,
    401: BackendUnavailableError,
    403: BackendUnavailableError,
    404: SandboxLostError,
    422: InvalidRequestError,
    429: BackendUnavailableError,
}
_RIGHTS = "grant it: kubectl apply -f k8s/rbac/k8s.yaml (k8s/README.md explains each right), and check CIFIXER_KUBERNETES_NAMESPACE"
_LOG_IN = "log in again, or check the token of the service account"
#: Remedies of errors that no waiting mends.
DENIALS = frozenset({_RIGHTS, _LOG_IN})
#: What is wrong on the way: (what the text has, what to do).
_ON_THE_WAY = (
    ("certificate", "check the certificate authority and the server name in the kubeconfig"),
    ("name or service not known", "check the server's host name in the kubeconfig"),
    ("failed to resolve", "check the server's host name in the kubeconfig"),
    ("connection refused", "start the API server, or check the server's address in the kubeconfig"),
)


class RefusedError(Exception):
    """An answer of the API server with an error status."""

    def __init__(self, code: int, status: Mapping[str, Any], retry_after_s: float | None = None) -> None:
        super().__init__(code, status)
        self.code = code
        self.reason = str(status.get("reason") or "")
        self.message = str(status.get("message") or f"status {code}")
        self.retry_after_s = retry_after_s
        #: Whether the API server itself has said it, and no proxy on the way: then it is there.
        self.is_answer = code < 500 or (code == 500 and bool(status.get("reason")))

    def __str__(self) -> str:
        return self.message


def refusal(code: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
    """From what came instead of the wanted object; proxies on the way answer with other texts than a Status."""
    try:
        status = json.loads(body)
    except ValueError:
        status = None
    if not isinstance(status, dict):
        status = {"message": body[:500].decode("utf-8", "replace").strip() or f"status {code}"}
    return RefusedError(code, status, _seconds(headers.get("Retry-After")))


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After; API servers give whole seconds."""
    return float(text) if text is not None and text.isascii() and text.isdigit() else None


def remedy(error: RefusedError) -> str:
    """What to do; empty where the API server's own words say it."""
    if error.code == 401:
        return _LOG_IN
    if error.code == 403 and "cannot " in error.message:
        return _RIGHTS
    if error.code == 404 and error.message.startswith("namespaces "):
        return "create it, or set CIFIXER_KUBERNETES_NAMESPACE to one that is there"
    return ""


def translate(error: Exception, doing: str) -> ExecutorError:
    """``doing`` completes "while …"."""
    if isinstance(error, RefusedError):
        kind = _BY_STATUS.get(error.code, BackendUnavailableError if error.code >= 500 else BackendError)
        if error.code == 403 and "exceeded quota" in error.message:
            kind = CapacityError
        if error.code == 404 and error.message.startswith("namespaces "):
            kind = BackendUnavailableError
        mend = remedy(error)
        return kind(f"the Kubernetes API refused {doing}: {error.message}" + (f": {mend}" if mend else ""), mend)
    said = str(getattr(error, "reason", None) or error)
    mend = next((m for sign, m in _ON_THE_WAY if sign in said.lower()), "")
    return BackendUnavailableError(f"the Kubernetes API does not answer while {doing}: {said}" + (f": {mend}" if mend else ""), mend)
