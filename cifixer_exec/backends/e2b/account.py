"""The way to one E2B account: the e2b SDK, whose connections belong to the process that first used them.

Its transport is native code with threads of its own, so a process that was forked after the first use would wait for ever
(measured; https://github.com/e2b-dev/E2B): such a process is told so instead.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import Any, TypeVar
from urllib.parse import urlsplit

from e2b import Sandbox, SandboxInfo, SandboxQuery

from cifixer_exec.backends.breaker import Breaker
from cifixer_exec.backends.e2b.vendor_errors import LOG_IN, is_vendors, translate
from cifixer_exec.errors import BackendUnavailableError, CapacityError, ExecutorError

T = TypeVar("T")
# Else it would tell of each request, on the level that workers log.
logging.getLogger("httpx").setLevel(logging.WARNING)
DEFAULT_DOMAIN = "e2b.app"
#: Of one request, which the SDK lets take twice that; its own for commands is 60 s, and holds for the whole command.
REQUEST_TIMEOUT_S = 15.0
PROBE_TIMEOUT_S = 3.0
#: The SDK's, of 429, 502, 503 and 504, with its back-off and what the server says of it: each request here may be sent again.
RETRIES = 3
#: Who connects may lengthen a sandbox's time with it, and never shorten it; this lengthens none that is worth a word.
KEEP_S = 15
_PAGE = 100
_MOST_KNOWN = 4096
#: The request took as long to get there.
_END_SKEW_S = 2.0
#: The process that has used the SDK.
_used_by: list[int] = []


@dataclass(frozen=True, kw_only=True)
class Access:
    """Whose sandboxes, and where. Empty addresses follow from the domain. ``account``: a name for placements instead of the domain."""

    api_key: str = field(default="", repr=False)
    domain: str = ""
    api_url: str = ""
    sandbox_url: str = ""
    account: str = ""


class Account:
    """One account as this process sees it. Nothing is contacted before first use."""

    def __init__(self, access: Access, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.access = access
        self.breaker = Breaker(f"E2B at {self.where}", self.ping)
        self._clock = clock
        self._known: dict[str, Sandbox] = {}
        self._ends: dict[str, float] = {}

    @property
    def where(self) -> str:
        """For people."""
        return self.access.api_url or self.access.domain or DEFAULT_DOMAIN

    @property
    def place(self) -> str:
        """For placements: a host name."""
        return urlsplit(self.access.api_url).hostname or self.access.domain or DEFAULT_DOMAIN

    @property
    def fingerprint(self) -> str:
        """Tells accounts apart and nothing of the key."""
        return hashlib.sha256(f"cifixer-exec\0{self.access.api_key}".encode()).hexdigest()[:16]

    @property
    def options(self) -> dict[str, Any]:
        """Of the SDK's verbs. Raises BackendUnavailableError where there is no key, or this process cannot use the SDK."""
        if not self.access.api_key:
            raise BackendUnavailableError(f"there is no key for E2B: {LOG_IN}", LOG_IN)
        if not self.access.api_key.isascii() or not self.access.api_key.isprintable():  # errors about headers would show it
            raise BackendUnavailableError(f"the key for E2B has a character, such as a line break, that no key has: {LOG_IN}", LOG_IN)
        _check_process()
        named = {"domain": self.access.domain, "api_url": self.access.api_url, "sandbox_url": self.access.sandbox_url}
        given = {name: value for name, value in named.items() if value}
        return {
            "api_key": self.access.api_key,
            "debug": False,  # by E2B_DEBUG the SDK would only pretend to make and end sandboxes
            "request_timeout": REQUEST_TIMEOUT_S,
            "retries": RETRIES,
            **given,
        }

    def ask(self, doing: str, verb: Callable[[], T]) -> T:
        """As :meth:`make`; "too many requests" is never "no room": in the middle of a command that would say that it never began."""
        try:
            return self.make(doing, verb)
        except CapacityError as error:
            raise BackendUnavailableError(*error.args) from None

    def make(self, doing: str, verb: Callable[[], T]) -> T:
        """Around one verb of the SDK: only errors of this package come out, and the breaker learns from them.

        Raises:
            CircuitOpenError: E2B has not answered for a while, so it is not asked.
        """
        self.breaker.check()
        try:
            answer = translated(doing, verb)
        except ExecutorError as error:
            if error.code == LOG_IN:
                self.breaker.succeeded()  # it has answered
            else:
                self.breaker.heard(error)
            raise
        self.breaker.succeeded()
        return answer

    def ask_inside(self, doing: str, verb: Callable[[], T]) -> T:
        """The same around one that a sandbox answers: a sandbox that hangs must not open the breaker for all others."""
        self.breaker.check()
        try:
            return translated(doing, verb)
        except BackendUnavailableError as error:
            if error.code != LOG_IN:
                self.breaker.look()
            raise

    def ping(self) -> None:
        """Raises BackendUnavailableError when it does not answer soon, or not to us."""
        options = {**self.options, "request_timeout": PROBE_TIMEOUT_S, "retries": 0}
        try:
            translated("asking whether it is there", lambda: Sandbox.list(limit=1, **options).next_items())
        except BackendUnavailableError:
            raise
        except ExecutorError as error:
            raise BackendUnavailableError(str(error), error.code) from None

    def sandbox(self, e2b_id: str) -> Sandbox:
        """What can be done in one that runs; a paused one is resumed by that. Raises SandboxLostError when it is gone."""
        known = self._known.get(e2b_id)
        if known is None:
            known = self.ask(f"connecting to its sandbox {e2b_id}", lambda: Sandbox.connect(e2b_id, KEEP_S, **self.options))
            self.remember(known)
        return known

    def remember(self, sandbox: Sandbox) -> None:
        """Its secret for the way into it, which E2B tells to whoever makes it or connects to it."""
        _keep(self._known, sandbox.sandbox_id, sandbox)

    def expect_end(self, e2b_id: str, in_s: float) -> None:
        """E2B was asked to end it then. Afterwards it does not say why a sandbox is gone."""
        _keep(self._ends, e2b_id, self._clock() + in_s)

    def is_due(self, e2b_id: str) -> bool:
        """Whether its end, as far as this process knows of it, is past."""
        return self._clock() >= self._ends.get(e2b_id, inf) - _END_SKEW_S

    def forget(self, e2b_id: str) -> None:
        """It is gone."""
        self._known.pop(e2b_id, None)

    def pages(self, doing: str, metadata: dict[str, str]) -> Iterator[list[SandboxInfo]]:
        """What bears ``metadata``, running or paused, page by page."""
        found = Sandbox.list(query=SandboxQuery(metadata=metadata), limit=_PAGE, **self.options)
        while found.has_next:
            yield self.ask(doing, found.next_items)


def translated(doing: str, verb: Callable[[], T]) -> T:
    """``verb``'s result; only errors of this package come out."""
    try:
        return verb()
    except Exception as error:
        if not is_vendors(error):
            raise
        raise translate(error, doing) from None


def _keep(known: dict[str, T], e2b_id: str, value: T) -> None:
    """The oldest gives way."""
    while len(known) >= _MOST_KNOWN:
        known.pop(next(iter(known)), None)
    known[e2b_id] = value


def _check_process() -> None:
    if not _used_by:
        _used_by.append(os.getpid())
    if _used_by[0] != os.getpid():
        mend = "start workers with --pool threads, or use E2B in one process only"
        raise BackendUnavailableError(f"the e2b package was used before this process was forked, and cannot be used in it: {mend}", mend)


@cache
def account_with(access: Access) -> Account:
    """The one of this process."""
    return Account(access)
