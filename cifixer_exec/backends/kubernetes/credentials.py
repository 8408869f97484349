"""Where the API server is, and who we are to it: from the Pod's service account, or from a kubeconfig as kubectl reads it.

The kubernetes package does the loading, with token files that are read anew, exec plugins and client certificates; REST and WebSocket
use what it has found.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kubernetes import config as loading
from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import should_bypass_proxies
from kubernetes.config.config_exception import ConfigException

from cifixer_exec.errors import BackendUnavailableError

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_MEND = "set CIFIXER_KUBERNETES_KUBECONFIG (and _CONTEXT), or run in a Pod with a service account"


@dataclass(frozen=True, kw_only=True)
class Address:
    """``kubeconfig`` empty: the service account of the Pod that this is, else the file that kubectl would take.
    ``context`` and ``namespace`` empty: as the kubeconfig, or the Pod, says.
    """

    kubeconfig: str = ""
    context: str = ""
    namespace: str = ""


class Credentials:
    """Loaded once. Used from any thread.

    Raises:
        BackendUnavailableError: there are none, or they cannot be read.
    """

    def __init__(self, address: Address, *, pool_size: int) -> None:
        self._refreshing = threading.Lock()
        self.configuration, namespace = _load(address)
        self.namespace = address.namespace or namespace or "default"
        self.configuration.retries = False  # who asks knows better what may be asked again
        self.configuration.connection_pool_maxsize = pool_size

    @property
    def host(self) -> str:
        return str(self.configuration.host).rstrip("/")

    @cached_property
    def fingerprint(self) -> str:
        """What tells this cluster from others: its certificate authority, else the address of its API server."""
        with suppress(OSError):
            if self.configuration.ssl_ca_cert:
                return hashlib.sha256(Path(self.configuration.ssl_ca_cert).read_bytes().strip()).hexdigest()[:12]
        return hashlib.sha256(self.host.encode()).hexdigest()[:12]

    @property
    def proxy(self) -> str | None:
        """For a connection of our own; None for none."""
        made = self.configuration
        return made.proxy if made.proxy and not should_bypass_proxies(self.host, made.no_proxy or "") else None

    def headers(self) -> dict[str, str]:
        """With a token that is renewed where it has an end. May start a program (exec plugins) or read a file."""
        with self._refreshing:
            try:
                found: dict[str, Any] = dict(self.configuration.auth_settings())
            except (ConfigException, OSError) as error:
                raise BackendUnavailableError(f"the credentials for the cluster cannot be renewed: {error}: {_MEND}", _MEND) from None
        value = found.get("BearerToken", {}).get("value")
        return {"Authorization": str(value)} if value else {}

    @cached_property
    def ssl_context(self) -> ssl.SSLContext | None:
        """For a connection of our own; None for plain HTTP."""
        if not self.host.startswith("https://"):
            return None
        made = self.configuration
        context = ssl.create_default_context(cafile=made.ssl_ca_cert or None)
        if not made.verify_ssl:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if made.cert_file:
            context.load_cert_chain(made.cert_file, made.key_file)
        return context


def _load(address: Address) -> tuple[Any, str]:
    """The configuration, and the namespace that it names."""
    configuration = Configuration()
    try:
        if not address.kubeconfig and not address.context:
            try:
                loading.load_incluster_config(client_configuration=configuration)
            except ConfigException:
                pass  # this is no Pod
            else:
                return configuration, _read(_ACCOUNT / "namespace")
        path = address.kubeconfig or None
        loading.load_kube_config(path, address.context or None, client_configuration=configuration, persist_config=False)
        return configuration, _namespace_of(path, address.context)
    except (ConfigException, OSError, ValueError) as error:
        raise BackendUnavailableError(f"there are no credentials for a Kubernetes cluster: {error}: {_MEND}", _MEND) from None


def _namespace_of(path: str | None, context: str) -> str:
    contexts, active = loading.list_kube_config_contexts(path) if path else loading.list_kube_config_contexts()
    chosen = next((c for c in contexts if c["name"] == context), active) if context else active
    return str(chosen["context"].get("namespace") or "")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
