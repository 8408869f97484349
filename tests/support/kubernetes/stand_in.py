"""A Kubernetes cluster of one machine for tests: an API server on a loopback port whose Pods are real local processes."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
_STOP_S = 30.0


class NotHereError(Exception):
    """It cannot run on this machine; the text says why."""


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


class OwnStandIn:
    """``with OwnStandIn() as stand_in``: one of our own, gone with all its processes, mounts and control groups at the end.

    It also ends when this process does, however that ends.
    """

    def __init__(self, *, tls: bool = False) -> None:
        self._tls = tls
        self._directory = Path(tempfile.mkdtemp(prefix="ks-"))  # short: a socket's path has at most 107 bytes
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> StandIn:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> StandIn:
        """Raises NotHereError."""
        self._directory.chmod(0o711)
        root = str(Path(__file__).parents[3])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
        command = [sys.executable, "-m", "tests.support.kubernetes", str(self._directory), *(["tls"] if self._tls else [])]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told = json.loads(line) if line else {"error": (self._directory / "log").read_text()[-2000:]}
        if "error" in told:
            self.close()
            raise NotHereError(told["error"])
        url = f"{'https' if self._tls else 'http'}://127.0.0.1:{told['port']}"
        about = {"url": url, "one_user": told["one_user"], "limited": told["limited"], "tls": self._tls}
        (self._directory / "about.json").write_text(json.dumps(about))
        return StandIn.at(self._directory)

    @property
    def log(self) -> str:
        """What its process has written."""
        return (self._directory / "log").read_text()

    def close(self) -> None:
        """Raises RuntimeError when it does not end by itself."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"the stand-in did not end: {self.log[-2000:]}") from None
        finally:
            process.stdout.close()
            remove_groups(f"stand-in-{self._directory.name}")
        shutil.rmtree(self._directory, ignore_errors=True)


def remove_groups(name: str) -> None:
    """Those of a stand-in that could not do it itself: ``name`` is ``stand-in-`` and its directory's."""
    from cifixer_exec.backends.local.cgroups import detect, kill_all, remove

    cgroups = detect()
    groups = [] if cgroups is None else [p for base in set(cgroups.bases.values()) for p in base.glob(f"cifixer-exec/{name}-*")]
    kill_all(groups)
    remove(groups)
