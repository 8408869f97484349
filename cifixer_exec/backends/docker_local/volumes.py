"""What a sandbox has on its daemon besides its container: the deadline that was moved, and a disk that is not memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any

from docker.errors import APIError, NotFound

from cifixer_exec.backends.docker_local.daemon import Daemon
from cifixer_exec.backends.docker_local.names import CREATED_AT, EXPIRES_AT, SANDBOX_ID, SET_AT, Names

#: Longer than making a container takes.
_YOUNG_S = 60.0


@dataclass(frozen=True)
class Volumes:
    """Of one namespace on one daemon. Raises BackendError and its kin."""

    daemon: Daemon
    names: Names

    def make_disk(self, sandbox_id: str) -> str:
        """Its name. What an earlier sandbox of this id left is not used again; a young one is whose who makes the same sandbox just now."""
        now = time.time()
        self.remove(sandbox_id, before_s=now - _YOUNG_S)
        name = self.names.disk(sandbox_id)
        labels = self._labels(sandbox_id) | {CREATED_AT: f"{now:.3f}"}  # its container is not there yet, and it is no orphan
        with self.daemon.asked(f"making the disk of sandbox {sandbox_id!r}"):
            self.daemon.api.create_volume(name, labels=labels)
        return name

    def set_deadline(self, sandbox_id: str, expires_at_s: float) -> None:
        """``expires_at_s``: Unix time."""
        now = time.time_ns()
        labels = self._labels(sandbox_id) | {EXPIRES_AT: f"{expires_at_s:.3f}", SET_AT: str(now)}
        with self.daemon.asked(f"moving the deadline of sandbox {sandbox_id!r}"):
            self.daemon.api.create_volume(self.names.deadline(sandbox_id, now), labels=labels)
        for volume in self._of(sandbox_id):
            if 0 < _set_at_ns(volume["Labels"]) < now:  # a deadline that this one replaces
                self._remove(volume["Name"])

    def remove(self, sandbox_id: str, *, before_s: float = inf) -> None:
        """Those that are older than the Unix time ``before_s``. What a container uses stays."""
        for volume in self._of(sandbox_id):
            if _made_at_s(volume["Labels"]) < before_s:
                self._remove(volume["Name"])

    def latest(self) -> dict[str, Mapping[str, str]]:
        """By sandbox id: the labels of its newest deadline, or else of what there is."""
        with self.daemon.asked("listing its volumes"):
            found = self.daemon.api.volumes(filters=self.names.filters()).get("Volumes") or []
        labels = sorted((volume["Labels"] for volume in found), key=lambda each: (EXPIRES_AT in each, _set_at_ns(each)))
        return {str(each[SANDBOX_ID]): each for each in labels}

    def _labels(self, sandbox_id: str) -> dict[str, str]:
        return self.names.labels(sandbox_id, self.daemon.facts.placement)

    def _of(self, sandbox_id: str) -> list[dict[str, Any]]:
        with self.daemon.asked(f"looking for the volumes of sandbox {sandbox_id!r}"):
            return self.daemon.api.volumes(filters=self.names.filters(sandbox_id)).get("Volumes") or []

    def _remove(self, name: str) -> None:
        with self.daemon.asked(f"removing the volume {name!r}"), suppress(NotFound):
            try:
                self.daemon.api.remove_volume(name)
            except APIError as error:
                if error.status_code != 409:  # another has just made a container with it: it is that one's
                    raise


def _set_at_ns(labels: Mapping[str, str]) -> int:
    with suppress(ValueError):
        return int(labels.get(SET_AT, "0"))
    return 0


def _made_at_s(labels: Mapping[str, str]) -> float:
    with suppress(ValueError):
        return float(labels[CREATED_AT]) if CREATED_AT in labels else _set_at_ns(labels) / 1e9
    return 0.0
