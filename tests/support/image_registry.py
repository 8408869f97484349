"""A registry with one image on a loopback port, which a daemon trusts without TLS: as much of the distribution protocol as a pull needs.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = "application/vnd.docker.container.image.v1+json"
_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


@dataclass
class Registry:
    """``address``/whatever:tag can be pulled. ``status``: what it answers instead. ``pause_s``: in the middle of a layer."""

    address: str = ""
    status: int = 0
    pause_s: float = 0.0
    asked: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifest: bytes = b""

    def fill(self, content: bytes) -> None:
        """One layer with one file."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            member = tarfile.TarInfo("etc/content")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        layer = gzip.compress(packed.getvalue(), 1)
        rootfs = {"type": "layers", "diff_ids": [_digest(packed.getvalue())]}
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode()
        self.blobs = {_digest(layer): layer, _digest(config): config}
        entry = {"mediaType": _LAYER, "size": len(layer), "digest": _digest(layer)}
        about = {"mediaType": _CONFIG, "size": len(config), "digest": _digest(config)}
        self.manifest = json.dumps({"schemaVersion": 2, "mediaType": _MANIFEST, "config": about, "layers": [entry]}).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: Registry

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        registry = self.registry
        registry.asked.append(self.path)
        if registry.status:
            self._send(registry.status, "application/json", b'{"errors":[{"code":"DENIED","message":"no such luck"}]}', body)
        elif self.path == "/v2/":
            self._send(200, "application/json", b"{}", body)
        elif "/manifests/" in self.path:
            self._send(200, _MANIFEST, registry.manifest, body)
        else:
            self._send(200, "application/octet-stream", registry.blobs[self.path.rpartition("/")[2]], body)

    def _send(self, status: int, kind: str, content: bytes, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Docker-Content-Digest", _digest(content))
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.end_headers()
        if body:
            half = len(content) // 2
            self.wfile.write(content[:half])
            if "/blobs/" in self.path and half > 10_000:
                time.sleep(self.registry.pause_s)
            self.wfile.write(content[half:])

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def image_registry() -> Iterator[Registry]:
    """One that lives as long as the block."""
    registry = Registry()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"registry": registry}))
    registry.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
