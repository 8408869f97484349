"""What the e2b SDK raises, as errors of this package."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from e2b import exceptions
from e2b.exceptions import (
    AuthenticationException,
    BuildException,
    FileNotFoundException,
    FileUploadException,
    GuestUnresponsiveException,
    InvalidArgumentException,
    NotEnoughSpaceException,
    NotFoundException,
    RateLimitException,
    SandboxException,
    SandboxNotFoundException,
    SandboxNotRunningException,
    SandboxUnreachableException,
    ServiceBusyException,
    TemplateException,
    TimeoutException,
)
from pyqwest import ReadError, WriteError

from cifixer_exec.backends.e2b.account import translated
from cifixer_exec.backends.e2b.vendor_errors import VENDOR_ERRORS, translate
from cifixer_exec.errors import (
    BackendError,
    BackendUnavailableError,
    CapacityError,
    CircuitOpenError,
    ExecutorError,
    InvalidRequestError,
    SandboxLostError,
    SandboxStartError,
)

REQUEST = httpx.Request("GET", "https://api.example")
RATE: Any = RateLimitException  # untyped in the SDK
UNRESPONSIVE: Any = GuestUnresponsiveException
OURS: dict[str, tuple[Exception, type[ExecutorError]]] = {
    "authentication": (AuthenticationException("401: Unauthorized"), BackendUnavailableError),
    "rate": (RATE("429: Rate limit exceeded"), CapacityError),
    "busy": (ServiceBusyException("503: Service temporarily unavailable"), BackendUnavailableError),
    "not running": (SandboxNotRunningException("The sandbox was not found"), SandboxLostError),
    "unreachable": (SandboxUnreachableException("port is not open"), BackendUnavailableError),
    "timed out": (TimeoutException("Request timed out"), BackendUnavailableError),
    "no such sandbox": (SandboxNotFoundException("Sandbox i not found"), SandboxLostError),
    "no such file": (FileNotFoundException("file not found: /x"), SandboxLostError),
    "not found": (NotFoundException("process with pid 3 not found"), SandboxLostError),
    "argument": (InvalidArgumentException("Invalid idempotency_key"), InvalidRequestError),
    "space": (NotEnoughSpaceException("no space"), BackendError),
    "template": (TemplateException("You need to update the template"), SandboxStartError),
    "unresponsive": (UNRESPONSIVE("cannot be resumed"), SandboxLostError),
    "build": (BuildException("the build failed"), BackendError),
    "file upload": (FileUploadException("the upload failed"), BackendError),
    "status 400": (SandboxException("400: Timeout cannot be greater than 1 hours", status_code=400), InvalidRequestError),
    "status 403": (SandboxException("403: Forbidden", status_code=403), BackendUnavailableError),
    "status 404": (SandboxException("404: not found", status_code=404), SandboxLostError),
    "status 409": (SandboxException("409: conflict", status_code=409), BackendError),
    "status 500": (SandboxException("500: oops", status_code=500), BackendUnavailableError),
    "status 502": (SandboxException("502: bad gateway", status_code=502), BackendUnavailableError),
    "without a status": (SandboxException("who knows"), BackendError),
    "httpx connect": (httpx.ConnectError("Connection refused", request=REQUEST), BackendUnavailableError),
    "httpx read": (httpx.ReadError("reset", request=REQUEST), BackendUnavailableError),
    "httpx timeout": (httpx.ReadTimeout("too long", request=REQUEST), BackendUnavailableError),
    "httpx protocol": (httpx.RemoteProtocolError("peer closed", request=REQUEST), BackendUnavailableError),
    "pyqwest read": (ReadError("reset"), BackendUnavailableError),
    "pyqwest write": (WriteError("reset"), BackendUnavailableError),
    "refused": (ConnectionRefusedError("refused"), BackendUnavailableError),
    "builtin timeout": (TimeoutError(), BackendUnavailableError),
    "rpc": (ConnectError(Code.INTERNAL, "no such thing"), BackendUnavailableError),
    "a page of a proxy": (json.JSONDecodeError("Expecting value", "<html>", 0), BackendUnavailableError),
}


@pytest.mark.parametrize("what", OURS)
def test_each_becomes_exactly_one_of_ours_and_says_what_was_done(what: str) -> None:
    error, ours = OURS[what]
    told = translate(error, "moving its deadline")
    assert type(told) is ours
    assert "moving its deadline" in str(told)
    assert (str(error) or type(error).__name__) in str(told)


def test_none_of_the_sdks_comes_through() -> None:
    """Those of volumes and secrets are of verbs that are not used here."""
    unused = ("Volume", "Secret")
    classes = [c for name, c in inspect.getmembers(exceptions, inspect.isclass) if issubclass(c, Exception) and not name.startswith(unused)]
    assert len(classes) >= 15
    for vendors in classes:
        with pytest.raises(ExecutorError):
            translated("testing", raiser(vendors("no words")))


def raiser(error: Exception) -> Callable[[], None]:
    def verb() -> None:
        raise error

    return verb


def test_what_stands_outside_the_sdks_base_is_in_the_list_of_who_catches_them() -> None:
    for vendors in (AuthenticationException, ServiceBusyException, BuildException, httpx.HTTPError, OSError, ConnectError, ReadError):
        assert issubclass(vendors, VENDOR_ERRORS)
        assert not issubclass(vendors, SandboxException)


def test_a_sandbox_that_is_gone_is_no_time_out_though_the_sdk_derives_it_from_that() -> None:
    assert issubclass(SandboxNotRunningException, TimeoutException)
    assert isinstance(translate(SandboxNotRunningException("x"), "y"), SandboxLostError)
    assert not isinstance(translate(TimeoutException("x"), "y"), SandboxLostError)


def test_a_bare_exception_is_the_sdks_and_any_other_is_a_mistake_of_ours() -> None:
    with pytest.raises(BackendError, match="Body of the request is None"):
        translated("testing", raiser(Exception("Body of the request is None")))
    with pytest.raises(KeyError):
        translated("testing", raiser(KeyError("x")))


def test_ours_pass_as_they_are() -> None:
    ours = CircuitOpenError("later", "code")
    with pytest.raises(CircuitOpenError) as caught:
        translated("testing", raiser(ours))
    assert caught.value is ours


REMEDIES: dict[str, tuple[Exception, str]] = {
    "401": (AuthenticationException("401"), "E2B_API_KEY"),
    "403": (SandboxException("403: Forbidden", status_code=403), "E2B_API_KEY"),
    "rate": (RATE("429: Rate limit exceeded, please try again later."), "CIFIXER_E2B_CREATES_PER_S"),
    "room": (RATE("429: the maximum number of concurrent E2B sandboxes (20)"), "tear sandboxes down"),
    "template": (TemplateException("old"), "e2b template build"),
}


@pytest.mark.parametrize("what", REMEDIES)
def test_the_remedy_is_named_in_the_words_and_apart(what: str) -> None:
    error, remedy = REMEDIES[what]
    told = translate(error, "doing something")
    assert remedy in told.code
    assert remedy in str(told)


def test_an_error_without_words_says_its_kind() -> None:
    assert "TimeoutError" in str(translate(TimeoutError(), "waiting"))
    assert "ConnectTimeout" in str(translate(httpx.ConnectTimeout("", request=REQUEST), "waiting"))
