"""``/metrics``, ``/healthz`` and ``/livez`` over HTTP, served by a thread of the process that they tell of."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from cifixer_exec.errors import InvalidRequestError

log = logging.getLogger(__name__)
#: Of one request: whoever says nothing for so long is not listened to.
REQUEST_TIMEOUT_S = 5.0
#: The text format's version that every Prometheus reads.
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TEXT_TYPE = "text/plain; charset=utf-8"


class _Server(ThreadingMixIn, TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    #: Of connections that nobody has accepted yet.
    request_queue_size = 16

    def __init__(self, family: socket.AddressFamily, address: tuple[Any, ...], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = family
        super().__init__(address[:2], handler)

    def handle_error(self, *_: Any) -> None:
        log.debug("a request to the metrics address failed", exc_info=True)


class Exposure:
    """Listens from the moment that it is made. Nothing is asked of the caller: whoever reaches the address may read."""

    def __init__(
        self, host: str, port: int, *, metrics: Callable[[], bytes], trouble: Callable[[], str], stuck: Callable[[], str] = lambda: ""
    ) -> None:
        """``trouble`` says in a sentence why the process is of no use just now, and nothing when all is well; ``stuck`` says only what a
        restart would mend, so nothing of a Redis that is away.

        Raises:
            InvalidRequestError: the address cannot be listened on.
        """
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._server = _Server(family, address, _handler(metrics, {"/healthz": trouble, "/livez": stuck}))
        except OSError as error:
            raise InvalidRequestError(
                f"metrics_address: {host}:{port} cannot be listened on ({error.strerror or error}): "
                "give another host:port in CIFIXER_METRICS_ADDRESS, or leave it out"
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="cifixer-metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The one listened on; of use when 0 was asked for."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(REQUEST_TIMEOUT_S)


def _handler(metrics: Callable[[], bytes], checks: Mapping[str, Callable[[], str]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(200, _METRICS_TYPE, metrics())
            elif path in checks:
                said = checks[path]()
                self._answer(503 if said else 200, _TEXT_TYPE, f"{said or 'ok'}\n".encode())
            else:
                self._answer(404, _TEXT_TYPE, b"there are /metrics, /healthz and /livez here\n")

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # http.server's name
            """A scrape each few seconds is no news."""

    return Handler
