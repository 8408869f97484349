"""An HTTP server of the test that answers each request as it is told to, also as no good server would."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Reply:
    """``document`` as JSON, else ``text``; or ``pieces``, one after the other. ``cut``: the connection goes before the end was told."""

    status: int = 200
    document: Any = None
    text: bytes = b""
    pieces: tuple[bytes, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    #: Called when everything is sent and the end is not told yet.
    hold: Callable[[], object] = lambda: None


@dataclass
class ScriptedServer:
    """``answer`` is called in threads. ``asked``: all requests so far."""

    url: str
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def scripted_server(answer: Callable[[Asked], Reply]) -> Iterator[ScriptedServer]:
    """On a loopback port, during the ``with`` block."""
    found = ScriptedServer("")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            split = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = Asked(method=self.command, path=split.path, query=dict(parse_qsl(split.query)), headers=dict(self.headers), body=body)
            found.asked.append(asked)
            self._reply(answer(asked))

        do_GET = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815  # the names are http.server's

        def _reply(self, reply: Reply) -> None:
            text = reply.text if reply.document is None else json.dumps(reply.document).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.pieces:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(len(text) + (10 if reply.cut else 0)))
            self.end_headers()
            for piece in reply.pieces:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
            self.wfile.write(text)
            self.wfile.flush()
            reply.hold()
            if reply.cut:
                self.close_connection = True
            elif reply.pieces:
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False  # idle connections are kept until their clients go

        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def refusal(code: int, reason: str = "", message: str = "no", **headers: str) -> Reply:
    """As API servers refuse: with a Status. ``headers``: their names with ``_`` for ``-``."""
    document = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason, "code": code}
    return Reply(status=code, document=document, headers={name.replace("_", "-"): value for name, value in headers.items()})
