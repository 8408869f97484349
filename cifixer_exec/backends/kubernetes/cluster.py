"""The way to one cluster's API: requests with time-outs, retries and a circuit breaker, listings by pages, watches.

Objects are plain dicts as they come: models that refuse unknown fields would break with the next Kubernetes version.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlencode

from kubernetes.client.rest import RESTClientObject

from cifixer_exec.backends.breaker import Breaker
from cifixer_exec.backends.kubernetes.credentials import Address, Credentials
from cifixer_exec.backends.kubernetes.refusals import LATER, NO_ANSWER, RefusedError, refusal, translate
from cifixer_exec.backends.threads import MOST_CALLS, MOST_CREATIONS

#: Of one request: to connect, and between two pieces of its answer.
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 3.05, 20.0
PROBE_TIMEOUT_S = 5.0
#: A request that finds no answer, or "not now", is sent again so often, after pauses of up to these lengths.
PAUSES_S = (0.2, 0.5, 1.0, 2.0)
#: With all of that, nobody is kept waiting for longer than this and one more time-out.
PATIENCE_S = 30.0
#: Longer than this no Retry-After is waited for.
MOST_PAUSE_S = 10.0
PAGE_SIZE = 500
#: The connection is given up so long after the API server should have ended a watch.
WATCH_SLACK_S = 5.0
#: As many as there are threads that ask, so that none is opened only to be thrown away.
POOL_SIZE = MOST_CALLS + MOST_CREATIONS

JSON, MERGE_PATCH = "application/json", "application/merge-patch+json"
#: https://kubernetes.io/docs/reference/using-api/api-concepts/#metadata-only-fetches
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """``at_s``: the API server's own time, in Unix seconds, as far as it told."""

    document: dict[str, Any]
    at_s: float


class Cluster:
    """One API server as this process sees it. Nothing is contacted before first use, and a failure is not remembered."""

    def __init__(
        self, address: Address, *, sleep: Callable[[float], None] = time.sleep, jitter: Callable[[], float] = random.random
    ) -> None:
        self.address = address
        self.breaker = Breaker("the Kubernetes API", self.ping)
        self._sleep = sleep
        self._jitter = jitter
        self._making = threading.Lock()
        self._credentials: Credentials | None = None
        self._rest: Any = None

    @property
    def credentials(self) -> Credentials:
        """Raises BackendUnavailableError when there are none."""
        return self._connected()[0]

    @property
    def known_credentials(self) -> Credentials | None:
        """Those in use, for :meth:`log_in_again`; nothing is loaded."""
        return self._credentials

    @property
    def namespace(self) -> str:
        """Where its sandboxes are. Raises BackendUnavailableError without credentials."""
        return self.credentials.namespace

    def path(self, resource: str, *parts: str) -> str:
        """Of ``resource`` (jobs, pods, events) in :attr:`namespace`, or of one object and its parts."""
        return path_in(self.namespace, resource, *parts)

    def ping(self) -> None:
        """Raises BackendUnavailableError when the API server does not answer soon, or says that it is not ready."""
        try:
            self._send("GET", "/readyz", timeout_s=(PROBE_TIMEOUT_S, PROBE_TIMEOUT_S)).read()
        except RefusedError as error:
            if error.code >= 500:
                raise translate(error, "asking whether it is ready") from None
        except NO_ANSWER as error:
            raise translate(error, "asking whether it is there") from None

    def get(self, path: str, doing: str, **query: str) -> Answer | None:
        """None where there is nothing of this name. Raises ExecutorError: anything else."""
        return self._found(doing, lambda: self.ask("GET", path, doing, query=query))

    def delete(self, path: str, doing: str, options: Mapping[str, Any]) -> bool:
        """False where there was nothing to delete, or another with its name (``preconditions``). ``options``: a DeleteOptions."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", **options}
        return self._found(doing, lambda: self.ask("DELETE", path, doing, body=body)) is not None

    def patch(self, path: str, doing: str, changes: Mapping[str, Any]) -> Answer | None:
        """As :meth:`get`. ``changes``: a JSON merge patch."""
        return self._found(doing, lambda: self.ask("PATCH", path, doing, body=changes, content_type=MERGE_PATCH))

    def ask(
        self,
        method: str,
        path: str,
        doing: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> Answer:
        """One request, sent again where that is safe: names are given by us, so that a repeated POST meets its own object.

        Raises:
            RefusedError: the API server's "no" for good.
            BackendUnavailableError: no answer, or "not now" again and again.
        """
        headers = {"Accept": accept} | ({"Content-Type": content_type} if body is not None else {})

        def send() -> Any:
            answer = self._send(method, path, query=query, body=body, headers=headers)
            answer.read()  # here, so that one that is cut is asked for again
            return answer

        response = self._patiently(doing, send)
        try:
            document = json.loads(response.read() or b"{}")
            if not isinstance(document, dict):
                raise ValueError(f"it answered with a {type(document).__name__}")  # noqa: TRY004  # as what cannot be read
        except ValueError as error:
            self.breaker.failed(str(error))
            raise translate(error, doing) from None
        return Answer(document=document, at_s=_time_of(response.headers.get("Date")))

    def pages(self, path: str, doing: str, *, selector: str, accept: str = JSON) -> Iterator[list[dict[str, Any]]]:
        """The objects that ``selector`` fits, some at a time. A listing whose snapshot has gone begins again: some come twice."""
        query, begun_again = {"labelSelector": selector, "limit": str(PAGE_SIZE)}, False
        while True:
            try:
                document = self.ask("GET", path, doing, query=query, accept=accept).document
            except RefusedError as error:
                if error.code != 410 or begun_again:
                    raise translate(error, doing) from None
                begun_again = True
                query.pop("continue", None)
                continue
            yield document.get("items") or []
            query["continue"] = (document.get("metadata") or {}).get("continue") or ""
            if not query["continue"]:
                return

    def watch(self, path: str, doing: str, *, selector: str, timeout_s: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """What there is as ``ADDED``, then what becomes of it, as ``(type, object)``.

        It ends after ``timeout_s`` at the latest, and whenever the connection does: watch again.
        """
        # Any state will do to begin with: what is too old is followed by what happened since.
        query = {"watch": "true", "labelSelector": selector, "resourceVersion": "0", "timeoutSeconds": str(timeout_s)}
        limits = (CONNECT_TIMEOUT_S, timeout_s + WATCH_SLACK_S)
        response = self._translated(doing, lambda: self._send("GET", path, query=query, headers={"Accept": JSON}, timeout_s=limits))
        try:
            for line in _lines(response.response):
                event = json.loads(line)
                if event.get("type") == "ERROR":
                    return
                yield str(event.get("type")), event.get("object") or {}
        except (*NO_ANSWER, ValueError):
            return  # cut within an event: the next watch tells it
        finally:
            response.response.close()

    def events(self, uid: str, doing: str) -> list[dict[str, Any]]:
        """About one object, the oldest first."""
        answer = self.get(self.path("events"), doing, fieldSelector=f"involvedObject.uid={uid}", limit="50")
        found: list[dict[str, Any]] = [] if answer is None else answer.document.get("items") or []
        return sorted(found, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""))

    def text(self, path: str, doing: str, **query: str) -> str:
        """What is no JSON, such as a log."""
        response = self._translated(doing, lambda: self._send("GET", path, query=query, headers={"Accept": "*/*"}))
        try:
            return bytes(response.read()).decode("utf-8", "replace")
        except NO_ANSWER as error:
            raise translate(error, doing) from None

    def log_in_again(self, refused: Credentials | None) -> None:
        """Load the credentials anew, unless somebody has: a token was refused, and a newer one may be there. Blocks."""
        with self._making:
            if self._credentials is refused:
                self._credentials, self._rest = None, None

    def _found(self, doing: str, asked: Callable[[], Answer]) -> Answer | None:
        try:
            return asked()
        except RefusedError as error:
            # That the namespace is not there is another matter; 409: there is another object of this name.
            if (error.code == 404 and not error.message.startswith("namespaces ")) or error.code == 409:
                return None
            raise translate(error, doing) from None

    def _translated(self, doing: str, send: Callable[[], Any]) -> Any:
        try:
            return self._patiently(doing, send)
        except RefusedError as error:
            raise translate(error, doing) from None

    def _patiently(self, doing: str, send: Callable[[], Any]) -> Any:
        logged_in_again, give_up_s = False, time.monotonic() + PATIENCE_S
        pauses = iter(PAUSES_S)
        while True:
            self.breaker.check()
            refused = self._credentials
            try:
                response = send()
            except RefusedError as error:
                if error.code == 401 and not logged_in_again:
                    logged_in_again = True
                    self.log_in_again(refused)
                    continue
                self._note(error)
                pause_s = next(pauses, None) if error.code in LATER and time.monotonic() < give_up_s else None
                if pause_s is None:
                    raise (translate(error, doing) if error.code in LATER else error) from None
                self._sleep(min(MOST_PAUSE_S, max(error.retry_after_s or 0.0, pause_s * self._jitter())))
            except NO_ANSWER as error:
                self.breaker.failed(str(error))
                if (pause_s := next(pauses, None)) is None or time.monotonic() > give_up_s:
                    raise translate(error, doing) from None
                self._sleep(pause_s * self._jitter())
            else:
                self.breaker.succeeded()
                return response

    def _note(self, error: RefusedError) -> None:
        """A refusal is an answer, also that of a broken webhook; only a server that cannot serve counts as none."""
        if error.is_answer:
            self.breaker.succeeded()
        else:
            self.breaker.failed(error.message)

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: tuple[float, float] = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
    ) -> Any:
        credentials, rest = self._connected()
        url = f"{credentials.host}{path}" + (f"?{urlencode(query)}" if query else "")
        sent = {**credentials.headers(), "User-Agent": "cifixer-exec", **(headers or {})}
        response = rest.request(method, url, headers=sent, body=body, _request_timeout=timeout_s)
        if response.status >= 300:  # an API server redirects nobody
            raise refusal(response.status, response.headers, bytes(response.read() or b""))
        return response

    def _connected(self) -> tuple[Credentials, Any]:
        with self._making:
            if self._credentials is None:
                self._credentials = Credentials(self.address, pool_size=POOL_SIZE)
                self._rest = RESTClientObject(self._credentials.configuration)
            return self._credentials, self._rest


_known: dict[tuple[int, Address], Cluster] = {}
_knowing = threading.Lock()


def cluster_at(address: Address) -> Cluster:
    """The one of this process: connections do not survive a fork."""
    with _knowing:
        return _known.setdefault((os.getpid(), address), Cluster(address))


def path_in(namespace: str, resource: str, *parts: str) -> str:
    """See :meth:`Cluster.path`."""
    base = "/apis/batch/v1" if resource == "jobs" else "/api/v1"
    return "/".join([f"{base}/namespaces/{quote(namespace)}/{resource}", *(quote(part) for part in parts)])


def _lines(response: Any) -> Iterator[bytes]:
    rest = b""
    for piece in response.stream(None, decode_content=True):
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line for line in lines if line)


def _time_of(date: str | None) -> float:
    with suppress(TypeError, ValueError):
        return parsedate_to_datetime(str(date)).timestamp()
    return time.time()
