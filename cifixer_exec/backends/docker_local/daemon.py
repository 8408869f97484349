"""The way to one Docker daemon: docker-py for the lifecycle, and where our own byte streams connect to.

docker-py's client is a requests session, whose pool is safe for threads as long as each call is one request, and never
across a fork: so there is one client per process and daemon.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import docker
from docker.tls import TLSConfig

from cifixer_exec.backends.breaker import Breaker
from cifixer_exec.backends.docker_local.ssh import SshRelay
from cifixer_exec.backends.docker_local.stream import Endpoint, TcpEndpoint, UnixEndpoint
from cifixer_exec.backends.docker_local.vendor_errors import translated
from cifixer_exec.errors import InvalidRequestError

DEFAULT_SOCKET = "/var/run/docker.sock"
#: Of one request; a pull is many small answers.
REQUEST_TIMEOUT_S = 60.0
#: Of the one that finds out whether the daemon answers at all.
PROBE_TIMEOUT_S = 5.0
#: Kept open for the next request; more than these at once are made and closed again.
POOL_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a daemon listens: ``unix:///path``, ``tcp://host:port`` or ``ssh://user@host``; empty: the usual socket.

    ``cert_path``: a directory with ``ca.pem``, ``cert.pem`` and ``key.pem``; empty: TCP without TLS.
    """

    host: str = ""
    cert_path: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a daemon says of itself once and for all."""

    placement: str
    api_version: str
    server: str
    memory: bool
    cpus: bool
    max_processes: bool
    #: Whether it can make networks of its own.
    bridges: bool
    runtimes: tuple[str, ...]
    #: Podman: it speaks Docker's interface, with differences.
    podman: bool
    #: Only 65,536 user ids exist in its containers.
    few_ids: bool


class _Client(docker.APIClient):  # type: ignore[misc]  # the package has no types
    """Trusts the certificates it was given, also where REQUESTS_CA_BUNDLE is set: requests would let that win over a session's own."""

    def merge_environment_settings(self, url: str, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        return super().merge_environment_settings(url, proxies, stream, self.verify if verify is None else verify, cert)


class Daemon:
    """One daemon as this process sees it. Nothing is contacted before first use, and a failure is not remembered."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.breaker = Breaker(f"the Docker daemon at {address.host or DEFAULT_SOCKET}", self.ping)
        self._making = threading.Lock()
        self._known: Facts | None = None
        #: Prepared images that were there when this process last looked, with the places where they want volumes.
        self.images: dict[str, tuple[str, ...]] = {}

    @contextmanager
    def asked(self, doing: str) -> Iterator[None]:
        """Around requests: only errors of this package come out, and the breaker learns from them. ``doing`` completes "while …".

        Raises:
            CircuitOpenError: the daemon has not answered for a while, so it is not asked.
        """
        with self.breaker.guarded(), translated(doing):
            yield

    def ping(self) -> None:
        """Raises BackendUnavailableError when the daemon does not answer soon."""
        # "auto" asks for it, and a client that gets no answer leaves its socket open.
        version = self._known.api_version if self._known is not None else "auto"
        with translated("asking whether it is there"), closing(self._client(PROBE_TIMEOUT_S, version)) as client:
            client.ping()

    @cached_property
    def endpoint(self) -> Endpoint:
        """Where a stream of our own connects to. Raises InvalidRequestError for an address that is none."""
        host = self.address.host or f"unix://{DEFAULT_SOCKET}"
        parts = urlsplit(host if "://" in host else f"tcp://{host}")
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme in ("unix", "http+unix"):
            return UnixEndpoint((parts.netloc and f"/{parts.netloc}") + parts.path or DEFAULT_SOCKET)
        if parts.scheme in ("tcp", "http", "https") and parts.hostname and port:
            return TcpEndpoint(parts.hostname, port, self._ssl_context(secure=parts.scheme == "https"))
        if parts.scheme == "ssh" and parts.hostname:
            return UnixEndpoint(SshRelay(f"{parts.username}@{parts.hostname}" if parts.username else parts.hostname, port).path)
        raise InvalidRequestError(f"docker_host={host!r} is not usable: give unix:///path, tcp://host:port or ssh://user@host")

    @property
    def api(self) -> Any:
        """docker-py's client. Raises BackendUnavailableError when the daemon does not answer."""
        with self._making:
            return self._api

    @cached_property
    def _api(self) -> Any:
        with translated("connecting"):
            return self._client(REQUEST_TIMEOUT_S)

    def _client(self, timeout_s: float, version: str = "auto") -> Any:
        endpoint = self.endpoint
        return _Client(
            base_url=f"unix://{endpoint.path}" if isinstance(endpoint, UnixEndpoint) else self.address.host,
            version=version,
            timeout=timeout_s,
            tls=self._tls_config() if isinstance(endpoint, TcpEndpoint) and self.address.cert_path else False,
            max_pool_size=POOL_SIZE,
        )

    @property
    def facts(self) -> Facts:
        """Raises BackendUnavailableError when the daemon does not answer."""
        if (known := self._known) is not None:
            return known
        with self.asked("asking for its facts"):
            api = self.api
            with self._making:
                self._known = self._known or _facts(api)
            return self._known

    def _tls_config(self) -> TLSConfig:
        with translated("reading its certificates"):
            ca, cert, key = self._certificates()
            return TLSConfig(client_cert=(cert, key), ca_cert=ca, verify=True)

    def _ssl_context(self, *, secure: bool) -> ssl.SSLContext | None:
        if not self.address.cert_path:
            return ssl.create_default_context() if secure else None
        ca, cert, key = self._certificates()
        try:
            context = ssl.create_default_context(cafile=ca)
            context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequestError(f"the certificates in {self.address.cert_path!r} cannot be used: {error}") from None
        return context

    def _certificates(self) -> tuple[str, str, str]:
        ca, cert, key = (os.path.join(self.address.cert_path, name) for name in ("ca.pem", "cert.pem", "key.pem"))
        return ca, cert, key


_known: dict[tuple[int, Address], Daemon] = {}
_knowing = threading.Lock()


def daemon_at(address: Address) -> Daemon:
    """The one of this process."""
    with _knowing:
        return _known.setdefault((os.getpid(), address), Daemon(address))


def _facts(api: Any) -> Facts:
    info = api.info()
    security = " ".join(info.get("SecurityOptions") or [])
    podman = any("podman" in str(c.get("Name", "")).lower() for c in api.version().get("Components") or [])
    name = "".join(c for c in str(info.get("Name", "")).split(".")[0] if c.isalnum() or c == "-")[:40] or "docker"
    return Facts(
        placement=f"{name}-{sha256(_identity(info, podman=podman).encode()).hexdigest()[:12]}",
        api_version=str(api.api_version),
        server=str(info.get("ServerVersion", "")),
        memory=bool(info.get("MemoryLimit")),
        cpus=bool(info.get("CpuCfsQuota")),
        max_processes=bool(info.get("PidsLimit")),
        bridges="bridge" in ((info.get("Plugins") or {}).get("Network") or ()),
        runtimes=tuple(info.get("Runtimes") or ()),
        podman=podman,
        few_ids="name=userns" in security or "name=rootless" in security,
    )


def _identity(info: dict[str, Any], *, podman: bool) -> str:
    """The daemon's own id is not enough: two daemons of one host share it (/etc/docker/key.json has it), as cloned machines do.
    The name and the place of the store tell them apart. Podman's id is a new one each time it is asked for.
    """
    own = "podman" if podman else str(info.get("ID"))
    return f"{own}:{info.get('Name')}:{info.get('DockerRootDir')}"
