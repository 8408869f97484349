"""A Kubernetes cluster of one machine for tests: an API server on a loopback port whose Pods are real local processes."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.own_process import OwnProcess

Json = dict[str, Any]


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ordered(control: Path, verb: str, arguments: Json) -> Any:
    """What a control endpoint has done. Raises RuntimeError."""
    connection = _Connection(control)
    try:
        connection.request("POST", f"/{verb}", json.dumps(arguments))
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["result"]


@dataclass(frozen=True)
class StandIn:
    """A running one; several processes may have it, by :meth:`at`. ``one_user``: user ids within Pods are names for one user."""

    directory: Path
    url: str
    one_user: bool
    #: Whether memory and processes of containers are limited.
    limited: bool
    tls: bool

    @classmethod
    def at(cls, directory: Path) -> StandIn:
        """The one that another process has started."""
        about = json.loads((directory / "about.json").read_text())
        return cls(directory, about["url"], about["one_user"], about["limited"], about["tls"])

    def order(self, verb: str, /, **arguments: Any) -> Any:
        """See Control for the verbs. Raises RuntimeError."""
        return ordered(self.directory / "control", verb, arguments)

    def namespace(self, name: str, *, labels: dict[str, str] | None = None, accounts: tuple[str, ...] = ()) -> None:
        """A new one, with service accounts."""
        self.order("add_namespace", name=name, labels=labels or {}, accounts=list(accounts))

    def admin(self, *, namespace: str = "default") -> Path:
        """The kubeconfig of somebody who may everything."""
        return self._kubeconfig("kubernetes-admin", self.order("add_user", name="kubernetes-admin", is_admin=True, grants=[]), namespace)

    def user(self, name: str, rules: list[Json], *, namespace: str) -> Path:
        """The kubeconfig of somebody with exactly these rules of a Role in ``namespace``."""
        grants = [{"namespace": namespace, "rules": rules}]
        return self._kubeconfig(name, self.order("add_user", name=name, is_admin=False, grants=grants), namespace)

    def renew(self, name: str, *, namespace: str) -> Path:
        """The user's token expires, and the kubeconfig of that name has the new one."""
        return self._kubeconfig(name, self.order("rotate_token", name=name), namespace)

    def token(self, kubeconfig: Path) -> str:
        """The one in a kubeconfig of ours."""
        return str(json.loads(kubeconfig.read_text())["users"][0]["user"]["token"])

    def _kubeconfig(self, name: str, token: str, namespace: str) -> Path:
        path = self.directory / f"{name.replace(':', '-')}.kubeconfig"
        cluster: Json = {"server": self.url}
        if self.tls:
            cluster["certificate-authority"] = str(self.directory / "ca.pem")
        context = {"cluster": "stand-in", "user": name, "namespace": namespace}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stand-in",
            "clusters": [{"name": "stand-in", "cluster": cluster}],
            "contexts": [{"name": "stand-in", "context": context}],
            "users": [{"name": name, "user": {"token": token}}],
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        partial.chmod(0o600)
        partial.rename(path)
        return path


class OwnStandIn(OwnProcess):
    """``with OwnStandIn() as stand_in``: one of our own, gone with all its processes, mounts and control groups at the end.

    It also ends when this process does, however that ends.
    """

    def __init__(self, *, tls: bool = False) -> None:
        super().__init__("tests.support.kubernetes", *(["tls"] if tls else []), prefix="ks-")
        self._tls = tls

    def __enter__(self) -> StandIn:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> StandIn:
        """Raises NotHereError."""
        told = self.begin()
        url = f"{'https' if self._tls else 'http'}://127.0.0.1:{told['port']}"
        about = {"url": url, "one_user": told["one_user"], "limited": told["limited"], "tls": self._tls}
        (self.directory / "about.json").write_text(json.dumps(about))
        return StandIn.at(self.directory)
