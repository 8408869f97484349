"""What the e2b SDK raises as this package's errors: the one table of this boundary.

The SDK's classes have no common base: ``AuthenticationException``, ``ServiceBusyException`` and, for a stream that was cut, a bare
``Exception`` stand outside of it, httpx's errors come through as they are, and a sandbox that is gone is a kind of its time-out
(https://github.com/e2b-dev/E2B, e2b/exceptions.py), so the order here matters.
"""

from __future__ import annotations

import json
from typing import TypeGuard

import httpx
from connectrpc.errors import ConnectError
from e2b.exceptions import (
    AuthenticationException,
    BuildException,
    GuestUnresponsiveException,
    InvalidArgumentException,
    NotFoundException,
    RateLimitException,
    SandboxException,
    SandboxNotRunningException,
    SandboxUnreachableException,
    ServiceBusyException,
    TemplateException,
    TimeoutException,
)
from pyqwest import ReadError, StreamError, WriteError

from cifixer_exec.errors import (
    BackendError,
    BackendUnavailableError,
    CapacityError,
    ExecutorError,
    InvalidRequestError,
    SandboxLostError,
    SandboxStartError,
)

#: No answer at all, or a stream that broke, or what some proxy on the way said instead of JSON.
NO_ANSWER = (httpx.HTTPError, OSError, ReadError, WriteError, StreamError, ConnectError, json.JSONDecodeError)
VENDOR_ERRORS = (*NO_ANSWER, SandboxException, AuthenticationException, ServiceBusyException, BuildException)
GONE = (SandboxNotRunningException, NotFoundException)

LOG_IN = "set E2B_API_KEY to a key of the account that owns the sandboxes (https://e2b.dev/dashboard, Keys)"
SLOWER = "lower CIFIXER_E2B_CREATES_PER_S to what your plan allows"
_ROOM = "tear sandboxes down, or ask E2B for a higher limit"
_TABLE: tuple[tuple[type[Exception], type[ExecutorError], str], ...] = (
    (AuthenticationException, BackendUnavailableError, LOG_IN),
    (RateLimitException, CapacityError, SLOWER),
    (ServiceBusyException, BackendUnavailableError, ""),
    (SandboxNotRunningException, SandboxLostError, ""),
    (NotFoundException, SandboxLostError, ""),
    (SandboxUnreachableException, BackendUnavailableError, ""),
    (TimeoutException, BackendUnavailableError, ""),
    (TemplateException, SandboxStartError, "build the template again (e2b template build)"),
    (InvalidArgumentException, InvalidRequestError, ""),
    (GuestUnresponsiveException, SandboxLostError, ""),
    (BuildException, BackendError, ""),
)
#: Of a refusal that only has its status and words.
_BY_STATUS: dict[int, type[ExecutorError]] = {400: InvalidRequestError, 403: BackendUnavailableError, 404: SandboxLostError}


def is_vendors(error: BaseException) -> TypeGuard[Exception]:
    """Whether it is one of theirs: they raise bare exceptions too."""
    return isinstance(error, VENDOR_ERRORS) or type(error) is Exception


def translate(error: Exception, doing: str) -> ExecutorError:
    """``doing`` completes "while …"."""
    said = str(error).strip() or type(error).__name__
    if isinstance(error, NO_ANSWER):
        return BackendUnavailableError(f"E2B does not answer while {doing}: {said}")
    for vendors, ours, mend in _TABLE:
        if isinstance(error, vendors):
            return _refusal(ours, doing, said, _ROOM if mend == SLOWER and "concurrent" in said.lower() else mend)
    status = getattr(error, "status_code", None) or 0
    kind = _BY_STATUS.get(status, BackendUnavailableError if status >= 500 else BackendError)
    return _refusal(kind, doing, said, LOG_IN if status == 403 else "")


def _refusal(kind: type[ExecutorError], doing: str, said: str, mend: str) -> ExecutorError:
    return kind(f"E2B refused {doing}: {said}" + (f": {mend}" if mend else ""), mend)
