"""The local backend: each sandbox is a bubblewrap namespace with the runner as PID 1.

Its whole state is one directory per sandbox::

    <root>/sandboxes/<sandbox id>/spec.json     intent, written before anything starts
                                  launch.json   pid and start time of bubblewrap, written by `runner launch` itself
                                  init.json     the same of the sandbox's PID 1, which can outlive bubblewrap
                                  runner.sock   the channel; the listening socket is handed to the runner, so nothing
                                                inside the sandbox can see, replace or redirect this path
                                  log           what bubblewrap and the runner said
                                  etc/          the sandbox's passwd, group and hosts
                                  disk/         empty; inside the sandbox's mount namespace its memory is mounted here
                                  workspace/    only without isolation
    <root>/locks/<sandbox id>                   there while somebody makes or destroys it

Everything else (workspace, /tmp, spool) is memory of the namespace and goes with it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.backends.limits import max_processes
from cifixer_exec.backends.local import cgroups, isolation, locks, trouble
from cifixer_exec.backends.local.processes import descendants, is_alive, kill_and_wait, kill_tree, start_time_of
from cifixer_exec.channel.frames import FrameParser, FrameType, encode_document, encode_frame
from cifixer_exec.channel.transport import Dial, Transport, dial_unix
from cifixer_exec.errors import (
    BackendError,
    BackendUnavailableError,
    ExecutorError,
    InvalidRequestError,
    SandboxLostError,
    SandboxStartError,
)
from cifixer_exec.model import MIB, Capabilities, Health, Inspection, SandboxHandle, SandboxSpec, check_id

DEFAULT_MEMORY_BYTES = 2048 * MIB
#: The most that the runner and its supervisors can need of the pids controller, which counts threads; the exact limit on
#: what *commands* may have is the runner's (RLIMIT_NPROC), this one stops whoever gets around it.
RUNNER_THREADS = 1024
START_TIMEOUT_S = 20.0
#: For whoever is at work on the same sandbox: a start and the removal of what did not start.
LOCK_TIMEOUT_S = 3 * START_TIMEOUT_S
#: What nobody owns any more is removed by whoever makes the next sandbox: so long after its end, looking at so many, for so long.
LITTER_AGE_S = 60.0
LITTER_LOOKS = 50
LITTER_TIME_S = 0.5


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
        details["limits_remedy"] = "run the worker as root, or give it a delegated control group"
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
        handle = SandboxHandle(backend=self.name, sandbox_id=check_id(spec.sandbox_id, "sandbox id"), placement=self.placement, data={})
        self._make_root()
        self._remove_litter()
        with self._locked(self._root / "locks" / spec.sandbox_id):
            if not self._adopt(handle):
                self._destroy(handle)
                self._make(handle, spec)
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
        if not self._root.is_dir():
            self._destroy(handle)
            return
        self._make_root()
        with self._locked(self._root / "locks" / check_id(handle.sandbox_id, "sandbox id")):
            self._destroy(handle)

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
            return [self._owned(path) for path in sorted((self._root / "sandboxes").iterdir()) if path.name[0] != "." and path.is_dir()]
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
        isolation.memory_for(spec, limited=self.capabilities.memory)
        return spec

    def _make_root(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._root.chmod(0o711 if os.geteuid() == 0 else 0o700)
            for name in ("sandboxes", "locks"):
                (self._root / name).mkdir(exist_ok=True)
        except OSError as error:
            raise BackendUnavailableError(f"the state directory cannot be used: {error}: choose another one") from None

    @contextmanager
    def _locked(self, path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """Alone of all processes and threads.

        Raises:
            BackendUnavailableError: another is still at it.
        """
        try:
            lock = locks.take(path, timeout_s=timeout_s)
        except OSError as error:
            raise BackendUnavailableError(f"the lock {path} cannot be taken: {error}") from None
        if lock is None:
            raise BackendUnavailableError(f"the lock {path} is held by another that makes or destroys a sandbox: try again")
        try:
            yield
        finally:
            locks.release(path, lock)

    def _adopt(self, handle: SandboxHandle) -> bool:
        """Whether it lives. One whose maker died before it was whole is completed, if it can be."""
        if not self.inspect(handle).alive:
            return False
        directory = self._directory(handle.sandbox_id)
        if self._unsafe or (directory / "init.json").exists():
            return True
        with suppress(OSError):
            _greet(directory, START_TIMEOUT_S)
            _remember_init(directory)
            return True
        return False

    def _make(self, handle: SandboxHandle, spec: SandboxSpec) -> None:
        directory = self._directory(spec.sandbox_id)
        try:
            identity = self._prepare(directory, spec)
            self._launch(directory, spec, identity)
            _greet(directory, START_TIMEOUT_S)
            if not self._unsafe:
                _remember_init(directory)
        except (OSError, subprocess.SubprocessError) as error:
            said = _tail(directory / "log") or str(error)
            self._destroy(handle)
            raise SandboxStartError(f"the local sandbox {spec.sandbox_id!r} did not start: {said}", trouble.remedy(said)) from None
        except BaseException:
            self._destroy(handle)
            raise

    def _destroy(self, handle: SandboxHandle) -> None:
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

    def _remove_litter(self) -> None:
        """Remove what crashed clients left here: their sandboxes ended by themselves, but directories and control groups stay.

        Only what is dead, past its end for a while, and not being made or destroyed by anyone. Never raises.
        """
        give_up = time.monotonic() + LITTER_TIME_S
        for place, remove in (("sandboxes", self._remove_if_litter), ("locks", self._remove_lock_if_litter)):
            with suppress(OSError):
                names = os.listdir(self._root / place)
                for name in random.sample(names, min(LITTER_LOOKS, len(names))):  # a sample: none is overlooked for ever
                    if time.monotonic() < give_up:
                        with suppress(OSError, ExecutorError):
                            remove(self._root / place / name)

    def _remove_if_litter(self, directory: Path) -> None:
        if directory.name.startswith("."):
            if self._clock() - os.lstat(directory).st_ctime > LITTER_AGE_S:
                shutil.rmtree(directory, ignore_errors=True)
            return
        if not self._is_litter(directory):
            return
        with self._locked(self._root / "locks" / directory.name, timeout_s=0):
            if self._is_litter(directory):
                self._destroy(self._owned(directory).handle)

    def _is_litter(self, directory: Path) -> bool:
        owned = self._owned(directory)
        ended = self._clock() - max(owned.expires_at_s, owned.created_at_s, _mtime(directory)) > LITTER_AGE_S
        return ended and not self.inspect(owned.handle).alive

    def _remove_lock_if_litter(self, lock: Path) -> None:
        if self._clock() - os.stat(lock).st_mtime > LITTER_AGE_S:
            with self._locked(lock, timeout_s=0):
                """Releasing removes it."""

    def _prepare(self, directory: Path, spec: SandboxSpec) -> isolation.Identity:
        now = self._clock()
        record = {"created_at_s": now, "expires_at_s": now + spec.lifetime_s, "labels": dict(spec.labels)}
        identity = isolation.Identity(host_uid=None)
        if self._unsafe or os.geteuid() != 0:
            _begin(directory, record)
        else:
            with self._locked(self._root.parent / ".uids.lock"):
                taken = _host_uids_in(self._root.parent)
                identity = isolation.identity_for(spec.sandbox_id, euid=0, uid_map=Path("/proc/self/uid_map").read_text(), taken=taken)
                _begin(directory, {**record, "host_uid": identity.host_uid})
        for name in ("etc", "workspace" if self._unsafe else "disk"):
            (directory / name).mkdir()
        for name, content in isolation.ETC_FILES.items():
            (directory / "etc" / name).write_text(content)
        return identity

    def _launch(self, directory: Path, spec: SandboxSpec, identity: isolation.Identity) -> None:
        groups = self._make_groups(spec)
        memory = None
        if self._unsafe:
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
            group = self._groups.group("memory", spec.sandbox_id) if self._groups else None
            memory = isolation.memory_for(spec, limited=group is not None)
            program = isolation.bwrap_arguments(self._bwrap, self._runner, directory, spec, identity, memory, group)
            environment = {}
        launch = [str(self._runner), *isolation.launch_arguments(directory, identity, groups, memory), "--", *program]
        with open(directory / "launch.json", "wb") as out:
            done = subprocess.run(
                launch, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, env=environment, timeout=START_TIMEOUT_S, check=False
            )
        if done.returncode != 0:
            raise OSError(done.stderr.decode("utf-8", "replace").strip() or f"runner launch ended with {done.returncode}")

    def _make_groups(self, spec: SandboxSpec) -> list[Path]:
        if self._groups is None:
            return []
        processes = max_processes(spec) + RUNNER_THREADS
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
        return _last_words(_tail(directory / "log", 65_536)) or "its processes were killed from outside"

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


def _begin(directory: Path, record: dict[str, Any]) -> None:
    directory.mkdir(mode=0o700)
    _write_json(directory / "spec.json", record)


def _host_uids_in(state: Path) -> frozenset[int]:
    """Those of all sandboxes that have a directory: one that is removed frees its uid, a crash takes none away."""
    found = (_read_json(path) for path in state.glob("*/sandboxes/*/spec.json"))
    return frozenset(uid for data in found if data is not None and isinstance(uid := data.get("host_uid"), int))


def _last_words(log: str) -> str:
    """What a log says of a death: of a runner that crashed the line before Go's stack traces, else its end."""
    before, trace, _ = log.partition("\ngoroutine ")
    return (before.strip().splitlines() or [""])[-1] if trace else log[-1500:]


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
