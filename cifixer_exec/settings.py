"""The configuration, and the only place that reads the environment.

Every field of :class:`AppConfig` can be given in code or by the variable beside it in :data:`VARIABLES`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any, Self

from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import MIB, check_env, check_timeout_s

DISPATCH_MODES = ("queue", "direct")
DOCKER_DISKS = ("memory", "volume")
#: Of a Pod that ends; more only keeps who tears down waiting, because the runner ends by SIGKILL alone.
MOST_GRACE_S = 300
KUBERNETES_DISKS = ("memory", "node")
_ACCOUNT = re.compile(r"[A-Za-z0-9._-]{0,63}\Z")


def default_state_dir() -> Path:
    """Where the local backend keeps sockets and records of its sandboxes: per user, on a file system that a reboot empties."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() == 0:
        return Path("/run/cifixer-exec") if os.access("/run", os.W_OK) else Path("/tmp/cifixer-exec-0")  # noqa: S108
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "cifixer-exec"
    return Path(f"/tmp/cifixer-exec-{os.geteuid()}")  # noqa: S108


def default_docker_cert_path() -> str:
    """Where the certificates for the daemon are, as the docker command understands its environment; empty: no TLS."""
    if os.environ.get("DOCKER_TLS_VERIFY", "") == "":
        return ""
    return os.environ.get("DOCKER_CERT_PATH", "") or str(Path.home() / ".docker")


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """All settings. ``None`` for a limit means the backend's default.

    Raises:
        InvalidRequestError: a value that cannot work, named with its remedy.
    """

    execution_backend: str = "local"
    dispatch: str = "queue"

    redis_url: str = "redis://127.0.0.1:6379/0"
    namespace: str = "cifixer"
    redis_patience_s: float = 30.0
    retention_s: float = 86_400.0
    collected_s: float = 600.0

    image: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cpus: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    max_processes: int | None = None
    network: str | None = None
    readonly_paths: tuple[str, ...] = ()
    lifetime_s: float = 3600.0
    start_timeout_s: float = 120.0

    command_timeout_s: float = 1800.0
    output_limit_bytes: int = 16 * MIB
    spool_limit_bytes: int = 128 * MIB
    read_limit_bytes: int = 256 * MIB

    worker_concurrency: int = 256
    lease_s: float = 6.0
    drain_s: float = 20.0
    reap_interval_s: float = 30.0
    creation_grace_s: float = 120.0

    state_dir: Path = field(default_factory=default_state_dir)
    bwrap: str = ""
    unsafe_no_isolation: bool = False

    metrics_address: str = ""

    docker_host: str = field(default_factory=lambda: os.environ.get("DOCKER_HOST", ""))
    docker_cert_path: str = field(default_factory=default_docker_cert_path)
    docker_runtime: str = ""
    docker_disk: str = "memory"
    docker_network: str = ""
    docker_writable_root: bool = False
    docker_commands_as_root: bool = False

    kubernetes_kubeconfig: str = ""
    kubernetes_context: str = ""
    kubernetes_namespace: str = ""
    kubernetes_cluster: str = ""
    kubernetes_service_account: str = "ci-fixer-sandbox"
    kubernetes_runner_image: str = ""
    kubernetes_cpu_request: float = 0.25
    kubernetes_memory_request_bytes: int = 512 * MIB
    kubernetes_disk: str = "memory"
    kubernetes_volume_claim: str = ""
    kubernetes_writable_root: bool = False
    kubernetes_runtime_class: str = ""
    kubernetes_priority_class: str = ""
    kubernetes_network_policies: bool = False
    kubernetes_grace_s: int = 1
    kubernetes_pod_template: str = ""

    e2b_api_key: str = field(default_factory=lambda: os.environ.get("E2B_API_KEY", ""), repr=False)
    e2b_domain: str = field(default_factory=lambda: os.environ.get("E2B_DOMAIN", ""))
    e2b_api_url: str = field(default_factory=lambda: os.environ.get("E2B_API_URL", ""))
    e2b_sandbox_url: str = field(default_factory=lambda: os.environ.get("E2B_SANDBOX_URL", ""))
    e2b_account: str = ""
    e2b_template: str = "base"
    e2b_user: str = "user"
    e2b_allow_out: tuple[str, ...] = ()
    e2b_deny_out: tuple[str, ...] = ()
    e2b_creates_per_s: float = 1.0

    def __post_init__(self) -> None:
        if self.dispatch not in DISPATCH_MODES:
            raise InvalidRequestError(f"dispatch={self.dispatch!r} is not known: take one of {', '.join(DISPATCH_MODES)}")
        if self.docker_disk not in DOCKER_DISKS:
            raise InvalidRequestError(f"docker_disk={self.docker_disk!r} is not known: take one of {', '.join(DOCKER_DISKS)}")
        self._check_kubernetes()
        self._check_e2b()
        if not self.redis_url.startswith(("redis://", "rediss://", "unix://", "redis+socket://")):
            raise InvalidRequestError("redis_url is not a Redis URL: give redis://…, rediss://… or unix://…")
        if not self.namespace or any(c in self.namespace for c in "*?[]\\/ "):
            raise InvalidRequestError(f"namespace={self.namespace!r} is not usable: give a word without * ? [ ] \\ / and spaces")
        for name in ("lifetime_s", "start_timeout_s", "command_timeout_s", "lease_s", "redis_patience_s", "drain_s", "reap_interval_s"):
            if check_timeout_s(getattr(self, name), name) is None:
                raise InvalidRequestError(f"{name}=None is not usable: give seconds")
        if self.metrics_address:
            host_and_port(self.metrics_address)
        object.__setattr__(self, "env", check_env(self.env))
        object.__setattr__(self, "readonly_paths", tuple(self.readonly_paths))
        object.__setattr__(self, "state_dir", Path(self.state_dir).absolute())

    def _check_kubernetes(self) -> None:
        if self.kubernetes_disk not in KUBERNETES_DISKS:
            raise InvalidRequestError(f"kubernetes_disk={self.kubernetes_disk!r} is not known: take one of {', '.join(KUBERNETES_DISKS)}")
        if not 0 <= self.kubernetes_grace_s <= MOST_GRACE_S:
            raise InvalidRequestError(f"kubernetes_grace_s={self.kubernetes_grace_s!r} is not usable: give 0 to {MOST_GRACE_S} seconds")
        if not (0 < self.kubernetes_cpu_request < inf and self.kubernetes_memory_request_bytes > 0):
            raise InvalidRequestError("kubernetes_cpu_request and kubernetes_memory_request_bytes must be more than 0")

    def _check_e2b(self) -> None:
        if not 0 < self.e2b_creates_per_s < inf:
            raise InvalidRequestError(f"e2b_creates_per_s={self.e2b_creates_per_s!r} is not usable: give more than 0, as your plan allows")
        if not _ACCOUNT.match(self.e2b_account):
            raise InvalidRequestError(f"e2b_account={self.e2b_account!r} is not usable: take up to 63 of the characters A-Z a-z 0-9 . _ -")
        for name in ("e2b_api_url", "e2b_sandbox_url"):
            if getattr(self, name) and not getattr(self, name).startswith(("http://", "https://")):
                raise InvalidRequestError(f"{name}={getattr(self, name)!r} is not a URL: give https://host, or leave it out")
        object.__setattr__(self, "e2b_allow_out", tuple(self.e2b_allow_out))
        object.__setattr__(self, "e2b_deny_out", tuple(self.e2b_deny_out))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """The configuration from the environment (``CIFIXER_…``, see :data:`VARIABLES`), then ``overrides``.

        Raises:
            InvalidRequestError: a variable that cannot be read as its type.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for variable, (name, parse) in VARIABLES.items():
            if environ.get(variable, "") == "":
                continue
            try:
                values[name] = parse(environ[variable])
            except ValueError as error:
                raise InvalidRequestError(f"{variable}={environ[variable]!r} cannot be read: {error}") from None
        return cls(**{**values, **overrides})

    def to_env(self) -> dict[str, str]:
        """The variables that make :meth:`from_env` in another process give this configuration."""
        defaults = type(self)()
        changed = {v: (getattr(self, n), parse) for v, (n, parse) in VARIABLES.items() if getattr(self, n) != getattr(defaults, n)}
        return {variable: " ".join(value) if parse is _words else _show(value) for variable, (value, parse) in changed.items()}

    def with_(self, **changes: Any) -> Self:
        """A copy with ``changes``."""
        return replace(self, **changes)


def host_and_port(address: str) -> tuple[str, int]:
    """The two of ``metrics_address``; an IPv6 address stands in brackets, and comes without them.

    Raises:
        InvalidRequestError: it is not ``host:port``.
    """
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    readable = colon and bare and not set(bare) & set("[]/ @") and (":" not in bare or bare != host)
    if not readable or not (port.isascii() and port.isdigit() and int(port) < 65_536):
        raise InvalidRequestError(f"metrics_address={address!r} is not usable: give host:port, such as 127.0.0.1:9808 or [::]:9808")
    return bare, int(port)


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        lines = "\n".join(f"{k}={v}" for k, v in value.items())
        plain = not any("\n" in text for pair in value.items() for text in pair) and not lines.startswith("{")
        return lines if plain else json.dumps(dict(value))
    if isinstance(value, tuple):
        return os.pathsep.join(value)
    return "" if value is None else str(value)


def _size(text: str) -> int:
    units = {"": 1, "k": 1024, "m": MIB, "g": 1024 * MIB}
    number = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = number[-1] if number[-1:].isalpha() else ""
    if unit not in units:
        raise ValueError("give a number of bytes, or one with K, M or G")
    return int(float(number.removesuffix(unit)) * units[unit])


def _flag(text: str) -> bool:
    if text.strip().lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("give true or false")
    return text.strip().lower() in ("1", "true", "yes", "on")


def _paths(text: str) -> tuple[str, ...]:
    return tuple(p for p in text.split(os.pathsep) if p)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _pairs(text: str) -> dict[str, str]:
    if text.startswith("{"):
        data = json.loads(text)
        if not all(isinstance(value, str) for value in data.values()):
            raise ValueError("give a JSON object of texts")
        return dict(data)
    lines = [line for line in text.split("\n") if line]
    if any("=" not in line for line in lines):
        raise ValueError("give NAME=VALUE lines, or a JSON object")
    return dict(line.split("=", 1) for line in lines)


#: variable → (field, how its text is read)
VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "CIFIXER_BACKEND": ("execution_backend", str),
    "CIFIXER_DISPATCH": ("dispatch", str),
    "CIFIXER_REDIS_URL": ("redis_url", str),
    "CIFIXER_NAMESPACE": ("namespace", str),
    "CIFIXER_REDIS_PATIENCE_S": ("redis_patience_s", float),
    "CIFIXER_RETENTION_S": ("retention_s", float),
    "CIFIXER_COLLECTED_S": ("collected_s", float),
    "CIFIXER_IMAGE": ("image", str),
    "CIFIXER_ENV": ("env", _pairs),
    "CIFIXER_CPUS": ("cpus", float),
    "CIFIXER_MEMORY": ("memory_bytes", _size),
    "CIFIXER_DISK": ("disk_bytes", _size),
    "CIFIXER_MAX_PROCESSES": ("max_processes", int),
    "CIFIXER_NETWORK": ("network", str),
    "CIFIXER_READONLY_PATHS": ("readonly_paths", _paths),
    "CIFIXER_LIFETIME_S": ("lifetime_s", float),
    "CIFIXER_START_TIMEOUT_S": ("start_timeout_s", float),
    "CIFIXER_COMMAND_TIMEOUT_S": ("command_timeout_s", float),
    "CIFIXER_OUTPUT_LIMIT": ("output_limit_bytes", _size),
    "CIFIXER_SPOOL_LIMIT": ("spool_limit_bytes", _size),
    "CIFIXER_READ_LIMIT": ("read_limit_bytes", _size),
    "CIFIXER_WORKER_CONCURRENCY": ("worker_concurrency", int),
    "CIFIXER_LEASE_S": ("lease_s", float),
    "CIFIXER_DRAIN_S": ("drain_s", float),
    "CIFIXER_REAP_INTERVAL_S": ("reap_interval_s", float),
    "CIFIXER_CREATION_GRACE_S": ("creation_grace_s", float),
    "CIFIXER_STATE_DIR": ("state_dir", Path),
    "CIFIXER_BWRAP": ("bwrap", str),
    "CIFIXER_UNSAFE_NO_ISOLATION": ("unsafe_no_isolation", _flag),
    "CIFIXER_METRICS_ADDRESS": ("metrics_address", str),
    "CIFIXER_DOCKER_HOST": ("docker_host", str),
    "CIFIXER_DOCKER_CERT_PATH": ("docker_cert_path", str),
    "CIFIXER_DOCKER_RUNTIME": ("docker_runtime", str),
    "CIFIXER_DOCKER_DISK": ("docker_disk", str),
    "CIFIXER_DOCKER_NETWORK": ("docker_network", str),
    "CIFIXER_DOCKER_WRITABLE_ROOT": ("docker_writable_root", _flag),
    "CIFIXER_DOCKER_COMMANDS_AS_ROOT": ("docker_commands_as_root", _flag),
    "CIFIXER_KUBERNETES_KUBECONFIG": ("kubernetes_kubeconfig", str),
    "CIFIXER_KUBERNETES_CONTEXT": ("kubernetes_context", str),
    "CIFIXER_KUBERNETES_NAMESPACE": ("kubernetes_namespace", str),
    "CIFIXER_KUBERNETES_CLUSTER": ("kubernetes_cluster", str),
    "CIFIXER_KUBERNETES_SERVICE_ACCOUNT": ("kubernetes_service_account", str),
    "CIFIXER_KUBERNETES_RUNNER_IMAGE": ("kubernetes_runner_image", str),
    "CIFIXER_KUBERNETES_CPU_REQUEST": ("kubernetes_cpu_request", float),
    "CIFIXER_KUBERNETES_MEMORY_REQUEST": ("kubernetes_memory_request_bytes", _size),
    "CIFIXER_KUBERNETES_DISK": ("kubernetes_disk", str),
    "CIFIXER_KUBERNETES_VOLUME_CLAIM": ("kubernetes_volume_claim", str),
    "CIFIXER_KUBERNETES_WRITABLE_ROOT": ("kubernetes_writable_root", _flag),
    "CIFIXER_KUBERNETES_RUNTIME_CLASS": ("kubernetes_runtime_class", str),
    "CIFIXER_KUBERNETES_PRIORITY_CLASS": ("kubernetes_priority_class", str),
    "CIFIXER_KUBERNETES_NETWORK_POLICIES": ("kubernetes_network_policies", _flag),
    "CIFIXER_KUBERNETES_GRACE_S": ("kubernetes_grace_s", int),
    "CIFIXER_KUBERNETES_POD_TEMPLATE": ("kubernetes_pod_template", str),
    "CIFIXER_E2B_API_KEY": ("e2b_api_key", str),
    "CIFIXER_E2B_DOMAIN": ("e2b_domain", str),
    "CIFIXER_E2B_API_URL": ("e2b_api_url", str),
    "CIFIXER_E2B_SANDBOX_URL": ("e2b_sandbox_url", str),
    "CIFIXER_E2B_ACCOUNT": ("e2b_account", str),
    "CIFIXER_E2B_TEMPLATE": ("e2b_template", str),
    "CIFIXER_E2B_USER": ("e2b_user", str),
    "CIFIXER_E2B_ALLOW_OUT": ("e2b_allow_out", _words),
    "CIFIXER_E2B_DENY_OUT": ("e2b_deny_out", _words),
    "CIFIXER_E2B_CREATES_PER_S": ("e2b_creates_per_s", float),
}

assert {name for name, _ in VARIABLES.values()} == {f.name for f in fields(AppConfig)}  # each field has its variable
