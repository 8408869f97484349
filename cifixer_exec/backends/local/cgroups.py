"""Limits for a whole sandbox by control groups, version 1 or 2, where this process may make them.

v1: https://docs.kernel.org/admin-guide/cgroup-v1/ · v2: https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cifixer_exec.backends.local.processes import kill

CONTROLLERS = ("memory", "pids", "cpu")
_CPU_PERIOD_US = 100_000
_GROUP = "cifixer-exec"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What to enforce; None leaves a controller alone."""

    memory_bytes: int | None = None
    max_processes: int | None = None
    cpus: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cgroups:
    """Where groups can be made: one directory per controller (all the same one on v2)."""

    version: int
    bases: Mapping[str, Path]

    def create(self, name: str, limits: Limits) -> list[Path]:
        """Make the sandbox's groups and set ``limits``; returns the distinct directories.

        Raises:
            OSError: the kernel refused; what was made is removed.
        """
        made: list[Path] = []
        try:
            for base in dict.fromkeys(self.bases.values()):
                group = base / _GROUP / name
                _make(group)
                made.append(group)
            for controller in self.bases:
                self._limit(controller, name, limits)
        except OSError:
            remove(made)
            raise
        return made

    def group(self, controller: str, name: str) -> Path | None:
        """The sandbox's directory of ``controller``."""
        base = self.bases.get(controller)
        return None if base is None else base / _GROUP / name

    def _limit(self, controller: str, name: str, limits: Limits) -> None:
        group = self.bases[controller] / _GROUP / name
        if controller == "memory" and limits.memory_bytes is not None:
            files = ("memory.max",) if self.version == 2 else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
            for file in files:
                # memsw is there only with swap accounting; without it swap is not limited, and not used either on most hosts.
                if (group / file).exists():
                    (group / file).write_text(str(limits.memory_bytes))
            if self.version == 2 and (group / "memory.swap.max").exists():
                (group / "memory.swap.max").write_text("0")
        elif controller == "pids" and limits.max_processes is not None:
            (group / "pids.max").write_text(str(limits.max_processes))
        elif controller == "cpu" and limits.cpus is not None:
            quota = int(limits.cpus * _CPU_PERIOD_US)
            if self.version == 2:
                (group / "cpu.max").write_text(f"{quota} {_CPU_PERIOD_US}")
            else:
                (group / "cpu.cfs_quota_us").write_text(str(quota))


def oom_kills(group: Path) -> int:
    """How many processes the kernel killed for memory in ``group`` (either version); 0 when it cannot be read."""
    for file in ("memory.events", "memory.oom_control"):
        with suppress(OSError, ValueError):
            for line in (group / file).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def kill_all(groups: list[Path], *, timeout_s: float = 5.0) -> bool:
    """SIGKILL every member until none is left; False when some are after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while members := {pid for group in groups for pid in _members(group)}:
        for pid in members:
            kill(pid)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def remove(groups: list[Path], *, timeout_s: float = 2.0) -> bool:
    """Remove empty groups; the kernel lets go of dead members a moment late. False when one is left."""
    deadline = time.monotonic() + timeout_s
    for group in groups:
        while group.exists():
            with suppress(OSError):
                group.rmdir()
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        _remove_parent(group.parent)
    return True


def _make(group: Path) -> None:
    """With its parent, which the removal of the last other group may take away in the same moment."""
    for _ in range(20):
        with suppress(FileNotFoundError):
            group.mkdir(parents=True, exist_ok=True)
            return
    group.mkdir(parents=True, exist_ok=True)


def _remove_parent(parent: Path) -> None:
    """The last group takes our empty directory along. (On v2 it stays: it holds the controllers that :func:`detect` switched on.)"""
    if not (parent / "cgroup.subtree_control").exists():
        with suppress(OSError):
            parent.rmdir()


def detect() -> Cgroups | None:
    """Where this process may make groups; None when nowhere."""
    v1, v2 = _mounts()
    own = _own_paths()
    bases = {c: base for c in CONTROLLERS if c in v1 and (base := _usable_v1(*v1[c], own.get(c, "/"))) is not None}
    if bases:
        return Cgroups(version=1, bases=bases)
    if v2 is not None and (base2 := _usable_v2(*v2, own.get("", "/"))) is not None:
        return Cgroups(version=2, bases=dict.fromkeys(CONTROLLERS, base2))
    return None


def _members(group: Path) -> list[int]:
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except (OSError, ValueError):
        return []


def _mounts() -> tuple[dict[str, tuple[Path, str]], tuple[Path, str] | None]:
    """v1 mounts by controller and the v2 mount, each as (mount point, root within the hierarchy); proc(5) mountinfo."""
    v1: dict[str, tuple[Path, str]] = {}
    v2 = None
    for line in _lines("/proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        words, tail = fields.split(), rest.split()
        if len(tail) < 3 or tail[0] not in ("cgroup", "cgroup2"):
            continue
        where = (Path(words[4]), words[3])
        if tail[0] == "cgroup2":
            v2 = where
        else:
            v1.update(dict.fromkeys(set(tail[2].split(",")) & set(CONTROLLERS), where))
    return v1, v2


def _own_paths() -> dict[str, str]:
    """This process's group by controller ("" is v2); cgroups(7)."""
    paths: dict[str, str] = {}
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _below_mount(mount: Path, root: str, path: str) -> Path:
    inside = os.path.relpath(path, root) if root != "/" else path.lstrip("/")
    candidate = mount / inside
    return candidate if not inside.startswith("..") and candidate.is_dir() else mount


def _usable_v1(mount: Path, root: str, path: str) -> Path | None:
    base = _below_mount(mount, root, path)
    return base if _can_make_groups(base) else None


def _usable_v2(mount: Path, root: str, path: str) -> Path | None:
    """v2 gives limits only below a group whose ``subtree_control`` has the controllers, and such a group may hold no processes."""
    base = _below_mount(mount, root, path)
    wanted = " ".join(f"+{c}" for c in CONTROLLERS)
    for group in (base, base / _GROUP):
        try:
            group.mkdir(exist_ok=True)
            (group / "cgroup.subtree_control").write_text(wanted)
        except OSError:
            return None
    return base if _can_make_groups(base) else None


def _can_make_groups(base: Path) -> bool:
    trial = base / _GROUP / f"probe-{os.getpid()}-{time.monotonic_ns()}"
    try:
        _make(trial)
        trial.rmdir()
    except OSError:
        return False
    _remove_parent(trial.parent)
    return True
