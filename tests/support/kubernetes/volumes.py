"""The volumes of one Pod, as the kubelet prepares them below a directory of its own."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.kubernetes import kernel
from tests.support.kubernetes.quantities import whole

Json = dict[str, Any]
_SHM_BYTES = 64 << 20
_NODE_BYTES = 8 << 30


class VolumeError(Exception):
    """A volume cannot be mounted; the words of a FailedMount event."""


class Volumes:
    """``root`` is the Pod's directory. ``set_group`` False: this process may have one user only."""

    def __init__(self, pod: Json, root: Path, claims: Path, *, set_group: bool) -> None:
        self._pod = pod
        self._root = root
        self._claims = claims
        self._group = pod["spec"]["securityContext"].get("fsGroup") if set_group else None
        self._mounted: list[Path] = []

    @property
    def shm(self) -> str:
        """The Pod's /dev/shm."""
        return str(self._root / "shm")

    def make(self) -> None:
        """All of them. Raises VolumeError."""
        self._root.mkdir(parents=True)
        self._tmpfs(self._root / "shm", _SHM_BYTES, "1777")
        for volume in self._pod["spec"].get("volumes") or []:
            self._make(volume, self._root / volume["name"])

    def _make(self, volume: Json, path: Path) -> None:
        name = volume["name"]
        if "emptyDir" in volume:
            self._empty(volume["emptyDir"], path)
        elif "downwardAPI" in volume:
            path.mkdir()
            for item in volume["downwardAPI"]["items"]:
                self._file(path, item, volume["downwardAPI"]["defaultMode"])
        elif "persistentVolumeClaim" in volume:
            self._claims.mkdir(parents=True, exist_ok=True)
            source = self._claims / self._pod["metadata"]["namespace"] / volume["persistentVolumeClaim"]["claimName"]
            source.mkdir(parents=True, exist_ok=True, mode=0o755)
            path.symlink_to(source)
            self._own(source)
        elif "projected" in volume:
            path.mkdir()
            (path / "token").write_text("a token of the API server")
        else:
            kind = next(k for k in volume if k != "name")
            raise VolumeError(f'MountVolume.SetUp failed for volume "{name}" : {kind} of this stand-in "{name}" not found')

    def _empty(self, source: Json, path: Path) -> None:
        limit = source.get("sizeLimit")
        if source.get("medium") == "Memory":
            self._tmpfs(path, min([_NODE_BYTES, *([whole(limit)] if limit else []), *self._memory()]), "0777")
        else:
            path.mkdir()
            path.chmod(0o777)
        self._own(path)

    def _memory(self) -> list[int]:
        """The Pod's memory limit, where each container has one: https://kubernetes.io/docs/concepts/storage/volumes/#emptydir"""
        limits = [c.get("resources", {}).get("limits", {}).get("memory") for c in self._pod["spec"]["containers"]]
        return [sum(whole(limit) for limit in limits)] if all(limits) else []

    def _tmpfs(self, path: Path, size_bytes: int, mode: str) -> None:
        path.mkdir()
        kernel.mount("tmpfs", str(path), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size={size_bytes},mode={mode}")
        self._mounted.append(path)

    def _file(self, path: Path, item: Json, mode: int) -> None:
        target = path / item["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self._field(item["fieldRef"]["fieldPath"]))
        target.chmod(item.get("mode", mode))
        self._own(target)

    def _field(self, path: str) -> str:
        """https://kubernetes.io/docs/concepts/workloads/pods/downward-api/"""
        metadata = self._pod["metadata"]
        for kind in ("annotations", "labels"):
            if path == f"metadata.{kind}":
                return "\n".join(f'{k}="{_escaped(v)}"' for k, v in sorted((metadata.get(kind) or {}).items()))
            if path.startswith(f"metadata.{kind}['"):
                return str((metadata.get(kind) or {}).get(path.partition("'")[2].rstrip("']"), ""))
        return str(metadata[path.removeprefix("metadata.")])

    def _own(self, path: Path) -> None:
        """The group of the Pod may write, and what is made there stays the group's."""
        if self._group is None:
            return
        for directory, _, names in os.walk(path):
            for entry in (directory, *(os.path.join(directory, n) for n in names)):
                self._own_one(entry)
        if path.is_file():
            self._own_one(str(path))

    def _own_one(self, path: str) -> None:
        assert self._group is not None
        os.chown(path, -1, self._group, follow_symlinks=False)
        mode = os.lstat(path).st_mode
        if not stat.S_ISLNK(mode):
            is_directory = stat.S_ISDIR(mode)
            os.chmod(path, stat.S_IMODE(mode) | (0o2770 if is_directory else 0o660))

    def mounts(self, container: Json) -> list[Json]:
        """As :func:`tests.support.kubernetes.inside.build` wants them, the ones above before the ones below. Raises VolumeError."""
        found: list[Json] = []
        for mount in container.get("volumeMounts") or []:
            base = (self._root / mount["name"]).resolve()
            source = base / mount["subPath"] if mount.get("subPath") else base
            if not source.exists():
                self._make_below(base, mount["subPath"])
            if not source.resolve().is_relative_to(base):
                words = f'failed to prepare subPath for volumeMount "{mount["name"]}" of container "{container["name"]}"'
                raise VolumeError(words)
            readonly = bool(mount.get("readOnly")) or self._is_api(mount["name"])
            found.append({"source": str(source), "target": os.path.normpath(mount["mountPath"]), "readonly": readonly})
        return sorted(found, key=lambda m: m["target"].count("/"))

    def _is_api(self, name: str) -> bool:
        """Downward API and projected volumes can be written by nobody."""
        return any(v["name"] == name and ("downwardAPI" in v or "projected" in v) for v in self._pod["spec"]["volumes"])

    def _make_below(self, base: Path, sub_path: str) -> None:
        """With the volume's own mode, set-group-ID bit and all."""
        mode = stat.S_IMODE(base.stat().st_mode)
        path = base
        for part in Path(sub_path).parts:
            path = path / part
            if not path.exists():
                path.mkdir()
                path.chmod(mode)

    @property
    def on_disk(self) -> list[Json]:
        """The empty directories without a medium that have a limit."""
        volumes: list[Json] = self._pod["spec"].get("volumes") or []
        return [v for v in volumes if v.get("emptyDir", {}).get("sizeLimit") and v["emptyDir"].get("medium") != "Memory"]

    def excess(self) -> str:
        """The kubelet's words about one that is over its limit, or ""."""
        for volume in self.on_disk:
            limit = volume["emptyDir"]["sizeLimit"]
            if _usage_bytes(self._root / volume["name"]) > whole(limit):
                return f'Usage of EmptyDir volume "{volume["name"]}" exceeds the limit "{limit}". '
        return ""

    def remove(self) -> None:
        """Claims stay."""
        for path in reversed(self._mounted):
            with suppress(OSError):
                kernel.unmount(str(path))
        shutil.rmtree(self._root, ignore_errors=True)


def _usage_bytes(path: Path) -> int:
    total = 0
    for directory, _, names in os.walk(path):
        for entry in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(directory, entry)).st_blocks * 512
    return total


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
