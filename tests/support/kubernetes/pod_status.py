"""The status of a Pod, from what the kubelet knows of its containers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.support.kubernetes.runtime import Process
from tests.support.kubernetes.store import stamp

Json = dict[str, Any]


@dataclass
class ContainerState:
    """One container. ``waiting`` and ``ended`` are as in the API; ``process`` is its last one."""

    name: str
    image: str
    waiting: Json | None = None
    started_at: str = ""
    ended: Json | None = None
    process: Process | None = None

    @property
    def running(self) -> bool:
        """Whether its PID 1 lives, as far as the kubelet knows."""
        return bool(self.started_at) and self.ended is None

    def end(self, now: datetime, exit_code: int, *, out_of_memory: bool = False, reason: str = "", message: str = "") -> None:
        """Its PID 1 has ended, or could not be started."""
        reason = reason or ("OOMKilled" if out_of_memory else "Completed" if exit_code == 0 else "Error")
        started = self.started_at or (None if reason != "StartError" else "1970-01-01T00:00:00Z")
        self.ended = {"exitCode": exit_code, "reason": reason, "startedAt": started, "finishedAt": stamp(now)}
        self.ended |= {"containerID": self._id()} | ({"message": message} if message else {})
        self.waiting = None

    def _id(self) -> str:
        return f"containerd://{self.process.name}" if self.process else "containerd://none"

    def shown(self) -> Json:
        """As in ``containerStatuses``."""
        if self.ended is not None:
            state: Json = {"terminated": self.ended}
        elif self.started_at:
            state = {"running": {"startedAt": self.started_at}}
        else:
            state = {"waiting": self.waiting or {"reason": "PodInitializing"}}
        known = self.process is not None
        return {
            "name": self.name,
            "state": state,
            "lastState": {},
            "ready": self.running,
            "restartCount": 0,
            "image": self.image,
            "imageID": f"docker.io/{self.image}@sha256:{'0' * 64}" if known else "",
            "started": self.running,
            **({"containerID": self._id()} if known else {}),
        }


def phase_of(init: list[ContainerState], main: list[ContainerState]) -> str:
    """For restartPolicy Never."""
    if any(c.ended is not None and c.ended["exitCode"] != 0 for c in init):
        return "Failed"
    if any(c.ended is None and not c.started_at for c in main):
        return "Pending"
    if any(c.running for c in main):
        return "Running"
    if main:
        return "Failed" if any(c.ended is not None and c.ended["exitCode"] != 0 for c in main) else "Succeeded"
    return "Pending"


def conditions(had: list[Json], now: datetime, init: list[ContainerState], main: list[ContainerState], phase: str) -> list[Json]:
    """In the order of the API; a condition that does not change keeps its time."""
    initialized = all(c.ended is not None and c.ended["exitCode"] == 0 for c in init)
    ready = bool(main) and all(c.running for c in main)
    over = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase, "")
    names = " ".join(c.name for c in main if not c.running)
    unready = {"reason": over} if over else {"reason": "ContainersNotReady", "message": f"containers with unready status: [{names}]"}
    incomplete = " ".join(c.name for c in init if c.ended is None or c.ended["exitCode"] != 0)
    uninitialized = {"reason": "ContainersNotInitialized", "message": f"containers with incomplete status: [{incomplete}]"}
    if over == "PodCompleted":
        uninitialized = {"reason": over}
    states = [
        ("PodReadyToStartContainers", not over, {}),
        ("Initialized", initialized, {} if initialized else uninitialized),
        ("Ready", ready, {} if ready else unready),
        ("ContainersReady", ready, {} if ready else unready),
    ]
    others = [c for c in had if c["type"] not in {name for name, _, _ in states}]
    told: list[Json] = []
    for name, holds, why in states:
        new = {"type": name, "status": "True" if holds else "False", "lastProbeTime": None, **why}
        old = next((c for c in had if c["type"] == name), None)
        same = old is not None and old["status"] == new["status"]
        told.append({**new, "lastTransitionTime": old["lastTransitionTime"] if same and old else stamp(now)})
    return told + others
