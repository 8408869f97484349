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

import yaml
from kubernetes import config as loading
from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import should_bypass_proxies
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.exec_provider import ExecProvider
from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION, KubeConfigMerger

from cifixer_exec.errors import BackendUnavailableError

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: What comes of a file that is no kubeconfig; the kubernetes package foresees some of it.
_UNREADABLE = (ConfigException, OSError, ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError)
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
        # Files with a token often end with a new line, which no header may have.
        return {"Authorization": str(value).strip()} if value else {}

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
        path = address.kubeconfig or KUBE_CONFIG_DEFAULT_LOCATION
        loading.load_kube_config(path, address.context or None, client_configuration=configuration, persist_config=False)
        context = _context(path, address.context)
        if not str(configuration.host).startswith(("https://", "http://")):
            raise ConfigException(f"its cluster has no server with https:// (it has {configuration.host!r})")
        if not configuration.api_key and not configuration.cert_file:
            _check_plugin(path, str(context.get("user") or ""))
        return configuration, str(context.get("namespace") or "")
    except _UNREADABLE as error:
        where = f" in kubeconfig {address.kubeconfig!r}" if address.kubeconfig else ""
        said = " ".join(str(error).partition("{")[0].split())  # behind a brace it may show a whole entry, with its token
        raise BackendUnavailableError(f"there are no credentials for a Kubernetes cluster{where}: {said}: {_MEND}", _MEND) from None


def _context(path: str, name: str) -> dict[str, Any]:
    contexts, active = loading.list_kube_config_contexts(path)
    chosen = next((c for c in contexts if c["name"] == name), active) if name else active
    return dict(chosen["context"])


def _check_plugin(path: str, user: str) -> None:
    """One that fails is only logged by the kubernetes package, and whoever goes on without credentials is anonymous to the cluster.

    Raises:
        ConfigException, OSError: the user has a plugin, which gives nothing.
    """
    found = KubeConfigMerger(path).config["users"].get_with_name(user, safe=True)
    if found is not None and "exec" in found["user"]:
        ExecProvider(found["user"]["exec"], str(Path(found.path).absolute().parent)).run()
        raise ConfigException(f"the plugin of user {user!r} gives neither a token nor a certificate with its key")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
