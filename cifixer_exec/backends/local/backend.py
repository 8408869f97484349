"""The local backend: each sandbox is a bubblewrap namespace with the runner as PID 1.

Its whole state is one directory per sandbox::

    <root>/sandboxes/<sandbox id>/spec.json     intent, written before anything starts
                                  launch.json   pid and start time of bubblewrap, written by `runner launch` itself
                                  init.json     the same of the sandbox's PID 1, which can outlive bubblewrap
                                  runner.sock   the channel; the listening socket is handed to the runner, so nothing
                                                inside the sandbox can see, replace or redirect this path
                                  log           what bubblewrap and the runner said
                                  etc/          the sandbox's passwd, group and hosts
                                  workspace/    only without isolation

Everything else (workspace, /tmp, spool) is memory of the namespace and goes with it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.backends.local import cgroups, isolation, trouble
from cifixer_exec.backends.local.processes import descendants, is_alive, kill_and_wait, kill_tree, start_time_of
from cifixer_exec.channel.frames import FrameParser, FrameType, encode_document, encode_frame
from cifixer_exec.channel.transport import Dial, Transport, dial_unix
from cifixer_exec.errors import BackendError, InvalidRequestError, SandboxLostError, SandboxStartError
from cifixer_exec.model import MIB, Capabilities, Health, Inspection, SandboxHandle, SandboxSpec, check_id

DEFAULT_MEMORY_BYTES = 2048 * MIB
#: The most that the runner and its supervisors can need of the pids controller, which counts threads; the exact limit on
#: what *commands* may have is the runner's (RLIMIT_NPROC), this one stops whoever gets around it.
RUNNER_THREADS = 1024
START_TIMEOUT_S = 20.0


class LocalBackend(Backend):
    """See the module. ``root`` must be private to one namespace of one stack: what is found in it is ours to reap."""

    name = "local"

    def __init__(
        self,
        *,
        root: Path,
        runner: Path,
        bwrap: Path | None,
        unsafe_no_isolation: bool = False,
        groups: cgroups.Cgroups | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self._runner = runner
        self._bwrap = bwrap
        self._unsafe = unsafe_no_isolation
        self._groups = groups
        self._clock = clock

    @property
    def placement(self) -> str:
        """This host and state directory: ``<host name>-<hash>``."""
        machine = f"{_first_line('/etc/machine-id')}:{_first_line('/proc/sys/kernel/random/boot_id')}:{self._root}"
        host = "".join(c for c in socket.gethostname().split(".")[0] if c.isalnum() or c == "-")[:40] or "host"
        return f"{host}-{zlib.crc32(machine.encode()):08x}"

    @property
    def capabilities(self) -> Capabilities:
        bases = self._groups.bases if self._groups else {}
        isolated = not self._unsafe
        return Capabilities(
            images=False,
            memory="memory" in bases,
            cpus="cpu" in bases,
            disk=isolated,
            max_processes=isolated or "pids" in bases,
            networks=("none", "host") if isolated else ("host",),
            readonly_paths=isolated,
        )

    def remedy_for(self, name: str) -> str:
        if name == "image":
            return "the local backend runs on this host's own system; leave image out or choose a container backend"
        if self._unsafe and name in ("disk_bytes", "readonly_paths"):
            return "without isolation nothing is hidden or limited; remove --unsafe-no-isolation"
        return "no writable control groups here (run the worker as root, or give it a delegated cgroup), or leave it out"

    def probe(self) -> Health:
        """Makes a real sandbox and removes it."""
        details = {"placement": self.placement, "state": str(self._root), "limits": self._limits_text()}
        if self._unsafe:
            return Health(ok=True, summary="NO ISOLATION: commands run as this user on this host", details=details)
        if self._bwrap is None:
            return Health(ok=False, summary="bubblewrap (bwrap) was not found", remedy=trouble.INSTALL_BWRAP, details=details)
        spec = SandboxSpec(backend=self.name, sandbox_id=f"probe-{uuid.uuid4().hex[:12]}", lifetime_s=60)
        try:
            self.destroy(self.create(spec))
        except BackendError as error:
            return Health(ok=False, summary=str(error), remedy=error.code or trouble.remedy(str(error)), details=details)
        return Health(ok=True, summary="bubblewrap sandboxes work", details={**details, "bwrap": str(self._bwrap)})

    def create(self, spec: SandboxSpec) -> SandboxHandle:
        self.check(spec)
        spec = self._with_defaults(spec)
        directory = self._directory(spec.sandbox_id)
        handle = SandboxHandle(backend=self.name, sandbox_id=spec.sandbox_id, placement=self.placement, data={})
        if self.inspect(handle).alive:
            return handle
        self._remove(directory)
        try:
            self._prepare(directory, spec)
            self._launch(directory, spec)
            _greet(directory, START_TIMEOUT_S)
            if not self._unsafe:
                _remember_init(directory)
        except (OSError, subprocess.SubprocessError) as error:
            said = _tail(directory / "log") or str(error)
            self.destroy(handle)
            raise SandboxStartError(f"the local sandbox {spec.sandbox_id!r} did not start: {said}", trouble.remedy(said)) from None
        except BaseException:
            self.destroy(handle)
            raise
        return handle

    def dial(self, handle: SandboxHandle) -> Dial:
        directory = self._directory(handle.sandbox_id)

        async def dial() -> Transport:
            # A socket path holds only 108 bytes (unix(7)); through the directory's descriptor it is always short.
            descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
            try:
                return await dial_unix(f"/proc/self/fd/{descriptor}/runner.sock")
            finally:
                os.close(descriptor)

        return dial

    def destroy(self, handle: SandboxHandle) -> None:
        directory = self._directory(handle.sandbox_id)
        groups = self._existing_groups(handle.sandbox_id)
        init, launched = _read_json(directory / "init.json"), _read_json(directory / "launch.json")
        dead = init is None or kill_and_wait(int(init["pid"]), int(init["start_time"]))
        dead = (launched is None or kill_tree(int(launched["pid"]), int(launched["start_time"]))) and dead
        if not (cgroups.kill_all(groups) and dead):
            raise BackendError(f"processes of the local sandbox {handle.sandbox_id!r} survived SIGKILL: destroy it again")
        if not cgroups.remove(groups):
            raise BackendError(f"the control group of the local sandbox {handle.sandbox_id!r} is still in use: destroy it again")
        self._remove(directory)

    def inspect(self, handle: SandboxHandle) -> Inspection:
        directory = self._directory(handle.sandbox_id)
        launched = _read_json(directory / "init.json") or _read_json(directory / "launch.json")
        if launched is None:
            cause = "it was torn down" if not directory.exists() else "it was never started"
            return Inspection(alive=False, cause=cause)
        if is_alive(int(launched["pid"]), int(launched["start_time"])):
            return Inspection(alive=True)
        return Inspection(alive=False, cause=self._cause_of_death(handle.sandbox_id, directory))

    def extend(self, handle: SandboxHandle, expires_at_s: float) -> None:
        directory = self._directory(handle.sandbox_id)
        data = _read_json(directory / "spec.json")
        if data is None:
            raise SandboxLostError(f"the local sandbox {handle.sandbox_id!r} is gone, so its lifetime cannot be moved")
        _write_json(directory / "spec.json", {**data, "expires_at_s": expires_at_s})

    def list_owned(self) -> Sequence[Owned]:
        with suppress(FileNotFoundError):
            return [self._owned(path) for path in sorted((self._root / "sandboxes").iterdir()) if path.is_dir()]
        return []

    def _owned(self, directory: Path) -> Owned:
        data = _read_json(directory / "spec.json") or {}
        created = float(data.get("created_at_s", _mtime(directory)))
        handle = SandboxHandle(backend=self.name, sandbox_id=directory.name, placement=self.placement, data={})
        return Owned(handle=handle, created_at_s=created, expires_at_s=float(data.get("expires_at_s", created)))

    def _directory(self, sandbox_id: str) -> Path:
        return self._root / "sandboxes" / check_id(sandbox_id, "sandbox id")

    def _with_defaults(self, spec: SandboxSpec) -> SandboxSpec:
        for path in spec.readonly_paths:
            if not os.path.isabs(path) or not os.path.isdir(path):
                raise InvalidRequestError(f"readonly_paths has {path!r}, which is no absolute path of a directory here")
        if spec.memory_bytes is None and self.capabilities.memory:
            spec = replace(spec, memory_bytes=DEFAULT_MEMORY_BYTES)
        return spec

    def _prepare(self, directory: Path, spec: SandboxSpec) -> None:
        directory.mkdir(parents=True, mode=0o700)
        self._root.chmod(0o711 if os.geteuid() == 0 else 0o700)
        now = self._clock()
        record = {"created_at_s": now, "expires_at_s": now + spec.lifetime_s, "labels": dict(spec.labels)}
        _write_json(directory / "spec.json", record)
        (directory / "etc").mkdir()
        for name, content in isolation.ETC_FILES.items():
            (directory / "etc" / name).write_text(content)
        if self._unsafe:
            (directory / "workspace").mkdir()

    def _launch(self, directory: Path, spec: SandboxSpec) -> None:
        identity = isolation.identity_for(spec.sandbox_id, euid=os.geteuid(), uid_map=Path("/proc/self/uid_map").read_text())
        groups = self._make_groups(spec)
        if self._unsafe:
            identity = isolation.Identity(host_uid=None)
            workspace = str(directory / "workspace")
            program = isolation.serve_arguments(
                spec,
                runner=str(self._runner),
                workspace=workspace,
                spool=str(directory / "spool"),
                roots=(workspace, "/tmp"),  # noqa: S108
            )
            environment = isolation.base_environment((), home=workspace)
        else:
            assert self._bwrap is not None  # probe and wiring refuse to come here without it
            memory = self._groups.group("memory", spec.sandbox_id) if self._groups else None
            program = isolation.bwrap_arguments(self._bwrap, self._runner, directory, spec, identity, memory)
            environment = {}
        launch = [str(self._runner), *isolation.launch_arguments(directory, identity, groups), "--", *program]
        with open(directory / "launch.json", "wb") as out:
            done = subprocess.run(
                launch, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, env=environment, timeout=START_TIMEOUT_S, check=False
            )
        if done.returncode != 0:
            raise OSError(done.stderr.decode("utf-8", "replace").strip() or f"runner launch ended with {done.returncode}")

    def _make_groups(self, spec: SandboxSpec) -> list[Path]:
        if self._groups is None:
            return []
        processes = (spec.max_processes or isolation.DEFAULT_MAX_PROCESSES) + RUNNER_THREADS
        limits = cgroups.Limits(memory_bytes=spec.memory_bytes, max_processes=processes, cpus=spec.cpus)
        return self._groups.create(spec.sandbox_id, limits)

    def _existing_groups(self, sandbox_id: str) -> list[Path]:
        if self._groups is None:
            return []
        found = (self._groups.group(controller, sandbox_id) for controller in self._groups.bases)
        return [g for g in dict.fromkeys(found) if g is not None and g.is_dir()]

    def _cause_of_death(self, sandbox_id: str, directory: Path) -> str:
        for group in self._existing_groups(sandbox_id):
            if (kills := cgroups.oom_kills(group)) > 0:
                return f"out of memory: the kernel killed {kills} of its processes"
        data = _read_json(directory / "spec.json") or {}
        if float(data.get("expires_at_s", float("inf"))) <= self._clock():
            return "its lifetime ended"
        return _tail(directory / "log") or "its processes were killed from outside"

    def _remove(self, directory: Path) -> None:
        """By rename first, so that a half-removed sandbox is never taken for a living one."""
        trash = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
        with suppress(FileNotFoundError):
            os.rename(directory, trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _limits_text(self) -> str:
        if self._groups is None:
            return "processes and disk; memory and cpus are NOT limited (no writable control groups)"
        return f"processes, disk, {', '.join(sorted(self._groups.bases))} (cgroup v{self._groups.version})"


def _greet(directory: Path, timeout_s: float) -> None:
    """Wait until the runner says HELLO. Raises OSError when the sandbox ends before."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.connect(f"/proc/self/fd/{descriptor}/runner.sock")
            client.sendall(encode_frame(FrameType.HELLO, 0, encode_document({"protocol": 1, "epoch": 0, "client": "create", "token": ""})))
            parser = FrameParser()
            while data := client.recv(65536):
                if any(True for _ in parser.feed(data)):
                    return
            raise OSError("the sandbox ended before its runner answered")
    finally:
        os.close(descriptor)


def _remember_init(directory: Path) -> None:
    """Bubblewrap's only child is the sandbox's PID 1: the sandbox lives as long as that does, with or without bubblewrap.

    Raises:
        OSError: it has ended already.
    """
    launched = _read_json(directory / "launch.json") or {}
    children = descendants(int(launched["pid"])) if launched else []
    started = start_time_of(children[0]) if children else None
    if started is None:
        raise OSError("the sandbox ended right after its runner answered")
    _write_json(directory / "init.json", {"pid": children[0], "start_time": started})


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data), encoding="utf-8")
    os.rename(new, path)


def _tail(path: Path, size: int = 1500) -> str:
    try:
        return path.read_bytes()[-size:].decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").split("\n", 1)[0].strip()
    except OSError:
        return ""


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
