"""What looks like ours on a Docker daemon and is not: whoever removes, stops or restarts it has taken somebody else's."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import docker

from tests.support.docker_daemon import docker_host, image_for_tests

#: Long ago, so that everything that is late by its label would go.
_PAST_S = 86_400.0


@dataclass
class Bystanders:
    """Containers and volumes with names and labels like those of ``namespace``, each of which lacks one thing to be ours."""

    namespace: str
    placement: str
    _seen: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    _volumes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._api = docker.APIClient(base_url=docker_host(), version="auto", timeout=60)
        ours = {
            "cifixer.sandbox_id": f"{self.namespace}-1",
            "cifixer.namespace": self.namespace,
            "cifixer.placement": self.placement,
            "cifixer.expires_at": f"{time.time() - _PAST_S:.3f}",
            "cifixer.created_at": f"{time.time() - _PAST_S:.3f}",
        }
        # `leftovers` look for this namespace, so nothing of these may have exactly it.
        for labels in (
            ours | {"cifixer.namespace": f"{self.namespace}0"},
            ours | {"cifixer.namespace": f"x{self.namespace}"},
            {k: v for k, v in ours.items() if k != "cifixer.namespace"},
            {},
        ):
            self._container(labels)
            self._volume(labels | {"cifixer.set_at": "1"} if labels else {})

    def harmed(self) -> list[str]:
        """Those that are gone, or are not as they were made."""
        found = [f"bystander {name}: {was} became {now}" for name, was in self._seen.items() if (now := self._look(name)) != was]
        volumes = {v["Name"] for v in self._api.volumes().get("Volumes") or []}
        return found + [f"the bystander volume {name} is gone" for name in self._volumes if name not in volumes]

    def remove(self) -> None:
        """All of them; what is gone is no error."""
        for name in self._seen:
            self._quietly(self._api.remove_container, name, force=True, v=True)
        for name in self._volumes:
            self._quietly(self._api.remove_volume, name)
        self._api.close()

    def _container(self, labels: dict[str, str]) -> None:
        name = f"cifixer-{self.namespace}-1-{uuid4().hex[:16]}"
        host = self._api.create_host_config(network_mode="none")
        self._api.create_container(image_for_tests(docker_host()), command=["sleep", "86400"], name=name, labels=labels, host_config=host)
        self._api.start(name)
        self._seen[name] = self._look(name)

    def _volume(self, labels: dict[str, str]) -> None:
        name = f"cifixer-expiry-{uuid4().hex[:16]}-1"
        self._api.create_volume(name, labels=labels)
        self._volumes.append(name)

    def _look(self, name: str) -> tuple[Any, ...]:
        try:
            found = self._api.inspect_container(name)
        except docker.errors.NotFound:
            return ("gone",)
        return found["Id"], found["State"]["Status"], found["State"]["StartedAt"]

    def _quietly(self, verb: Any, *arguments: Any, **options: Any) -> None:
        try:
            verb(*arguments, **options)
        except docker.errors.NotFound:
            return
