"""An E2B service of one machine for tests: its API and its sandboxes' envd on loopback ports, sandboxes as real local processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.kubernetes.stand_in import ordered
from tests.support.own_process import OwnProcess

Json = dict[str, Any]


@dataclass(frozen=True)
class Service:
    """A running one; several processes may have it, by :meth:`at`. ``limited``: memory and processes of sandboxes are limited."""

    directory: Path
    api_url: str
    sandbox_url: str
    api_key: str
    limited: bool

    @classmethod
    def at(cls, directory: Path) -> Service:
        """The one that another process has started."""
        return cls(directory, **json.loads((directory / "about.json").read_text()))

    @property
    def connection(self) -> dict[str, str]:
        """For the SDK: ``Sandbox.create(template, **service.connection)``."""
        return {"api_url": self.api_url, "sandbox_url": self.sandbox_url, "api_key": self.api_key}

    @property
    def environment(self) -> dict[str, str]:
        """For a process that uses the SDK."""
        return {"E2B_API_URL": self.api_url, "E2B_SANDBOX_URL": self.sandbox_url, "E2B_API_KEY": self.api_key}

    def order(self, verb: str, /, **arguments: Any) -> Any:
        """See Control for the verbs. Raises RuntimeError."""
        return ordered(self.directory / "control", verb, arguments)

    def set(self, **knobs: Any) -> None:
        """See Knobs."""
        self.order("set", **knobs)

    def fault(self, *, path: str = "", method: str = "", **what: Any) -> None:
        """See Fault: times, skip, status, drop, after, delay_s, message, headers."""
        self.order("fault", path=path, method=method, **what)

    def key(self, team: str) -> str:
        """A further API key."""
        return str(self.order("add_key", team=team))

    def asked(self) -> Json:
        """``requests`` by kind, ``faults`` that were met, ``creates`` (``body``, ``headers`` in lower case, ``team``) and ``networks``."""
        found: Json = self.order("asked")
        return found

    def left(self) -> dict[str, list[Any]]:
        """``sandboxes``, ``processes``, ``mounts`` and ``groups`` that are there."""
        found: dict[str, list[Any]] = self.order("left")
        return found


class StandIn(OwnProcess):
    """``with StandIn() as service``: one of our own, gone with all its processes, mounts and control groups at the end.

    It also ends when this process does, however that ends.
    """

    def __init__(self) -> None:
        super().__init__("tests.support.e2b", prefix="es-")

    def __enter__(self) -> Service:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Service:
        """Raises NotHereError."""
        told = self.begin()
        about = {f"{name}_url": f"http://127.0.0.1:{port}" for name, port in told["ports"].items()}
        (self.directory / "about.json").write_text(json.dumps({**about, "api_key": told["key"], "limited": told["limited"]}))
        return Service.at(self.directory)
