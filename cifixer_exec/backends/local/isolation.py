"""The bubblewrap command line: what a sandbox can see and do.

Options: https://github.com/containers/bubblewrap/blob/main/bwrap.xml
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from cifixer_exec.backends.disk import disk_size_bytes, spool_size_bytes
from cifixer_exec.backends.limits import limit_arguments, root_arguments
from cifixer_exec.errors import CapacityError
from cifixer_exec.model import MIB, SandboxSpec

WORKSPACE = "/workspace"
HOME = "/home/sandbox"
RUNNER = "/run/cifixer/runner"
SPOOL = "/run/cifixer/spool"
SANDBOX_ID = 1000
#: Where `runner launch --seccomp` leaves the filter for bubblewrap.
_SECCOMP_FD = "4"

#: The part of /etc that programs need to start, resolve names and trust certificates; nothing that tells about this host's users.
_ETC = (
    "alternatives",
    "ca-certificates",
    "ca-certificates.conf",
    "java-11-openjdk",
    "java-17-openjdk",
    "java-21-openjdk",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "magic",
    "mime.types",
    "nsswitch.conf",
    "os-release",
    "perl",
    "pki",
    "profile",
    "protocols",
    "rpc",
    "services",
    "ssl",
    "terminfo",
    "timezone",
)
#: Places of keys below what is shown of /etc; empty in a sandbox even where their modes would let it read them.
_ETC_HIDDEN = ("ssl/private", "pki/tls/private", "pki/CA/private", "pki/consumer", "pki/entitlement", "pki/entitlement-host", "pki/nginx")
_ETC_WITH_NETWORK = ("hosts", "resolv.conf", "gai.conf")
_SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt")

#: Synthetic files: the sandbox's user is the only one besides root and nobody.
ETC_FILES = {
    "passwd": (
        "root:x:0:0:root:/root:/bin/sh\n"
        f"sandbox:x:{SANDBOX_ID}:{SANDBOX_ID}:sandbox:{HOME}:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/:/bin/false\n"
    ),
    "group": f"root:x:0:\nsandbox:x:{SANDBOX_ID}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who the sandbox is on the host. ``host_uid`` None: the worker's own, unprivileged user."""

    host_uid: int | None

    @property
    def mapped(self) -> bool:
        """Whether the worker is root and gives the sandbox a user of its own."""
        return self.host_uid is not None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a sandbox can write, all of it memory. ``disk`` is one size for workspace, home and /tmp together."""

    disk_bytes: int
    spool_bytes: int
    shm_bytes: int


def memory_for(spec: SandboxSpec, *, limited: bool) -> Memory:
    """``limited``: a control group counts this memory as the sandbox's. Without one these sizes are all that protects the host's.

    Raises:
        InvalidRequestError: the disk does not fit into the memory.
    """
    memory_bytes = spec.memory_bytes if limited else None
    disk_bytes = disk_size_bytes(spec.disk_bytes, memory_bytes=memory_bytes, most_bytes=(4096 if limited else 1024) * MIB)
    spool_bytes = spool_size_bytes(disk_bytes)
    return Memory(disk_bytes=disk_bytes, spool_bytes=spool_bytes, shm_bytes=(256 if limited else 64) * MIB)


def identity_for(sandbox_id: str, *, euid: int, uid_map: str, taken: Container[int] = ()) -> Identity:
    """As root each sandbox gets a host uid outside ``taken`` (so its process limit is its own and a break-out finds nothing to own).
    ``uid_map`` is the content of /proc/self/uid_map: inside a container few ids may exist.

    Raises:
        CapacityError: every one is taken.
    """
    if euid != 0:
        return Identity(host_uid=None)
    first, count = _host_uids(uid_map)
    if count == 0:
        return Identity(host_uid=None)
    start = int.from_bytes(hashlib.sha256(sandbox_id.encode()).digest()[:8], "big")
    for step in range(count):
        uid = first + (start + step) % count
        if uid not in taken:
            return Identity(host_uid=uid)
    raise CapacityError(f"all {count} user ids that sandboxes can have here are taken: destroy some, or give this container more ids")


def _host_uids(uid_map: str) -> tuple[int, int]:
    """The first and the number of the uids for sandboxes. On a whole machine those that systemd leaves to the host and nobody gives
    to users or containers (https://systemd.io/UIDS-GIDS/), in a container the upper ones of what it has.
    """
    size = max((int(line.split()[0]) + int(line.split()[2]) for line in uid_map.splitlines() if line.strip()), default=0)
    if size > 0x7F00_0000:
        return 0x7000_0000, 0x0F00_0000
    if size >= 2 * 65_536:
        return 65_536, size - 65_536
    return (60_000, 5_000) if size >= 65_536 else (0, 0)


def launch_arguments(directory: Path, identity: Identity, cgroups: list[Path], memory: Memory | None) -> list[str]:
    """Arguments of ``runner launch``, up to and without the ``--``. ``memory`` None: no isolation."""
    arguments = ["launch", "--socket", str(directory / "runner.sock"), "--log", str(directory / "log")]
    for group in cgroups:
        arguments += ["--cgroup", str(group)]
    if identity.mapped:
        arguments += ["--map-user", f"{SANDBOX_ID}:{identity.host_uid}", "--map-group", f"{SANDBOX_ID}:{identity.host_uid}"]
    if memory is not None:
        arguments += ["--seccomp", "--disk", f"{directory / 'disk'}:{memory.disk_bytes}"]
    return arguments


def serve_arguments(spec: SandboxSpec, *, runner: str, workspace: str, spool: str, roots: tuple[str, ...]) -> list[str]:
    """``runner serve …`` on the inherited socket, with the sandbox's lifetime as its own lease."""
    # The spool is memory of the sandbox: when the runner ends, it is gone too.
    arguments = [runner, "serve", "--listen-fd", "3", "--spool", spool, "--volatile-spool", "--workspace", workspace]
    return [*arguments, *root_arguments(*roots), *limit_arguments(spec)]


def bwrap_arguments(
    bwrap: Path, runner: Path, directory: Path, spec: SandboxSpec, identity: Identity, memory: Memory, memory_group: Path | None
) -> list[str]:
    """The whole command line of the sandbox, runner included. `runner launch` has made the disk before and holds the filter open."""
    arguments = [str(bwrap), "--seccomp", _SECCOMP_FD, *_namespaces(spec, identity)]
    arguments += _system()
    arguments += _etc(directory, spec)
    arguments += ["--proc", "/proc", "--dev", "/dev", *_tmpfs("/dev/shm", memory.shm_bytes, "1777"), "--remount-ro", "/dev"]  # noqa: S108
    for part, path in (("workspace", WORKSPACE), ("home", HOME), ("tmp", "/tmp")):  # noqa: S108
        arguments += [*_directory(path), "--bind", str(directory / "disk" / part), path]
    arguments += [*_directory("/run/cifixer"), *_tmpfs(SPOOL, memory.spool_bytes, "0777"), "--ro-bind", str(runner), RUNNER]
    if memory_group is not None:
        # The runner tells out-of-memory from other kills by the counter in here (docs/protocol.md).
        inside = "/sys/fs/cgroup" if (memory_group / "memory.events").exists() else "/sys/fs/cgroup/memory"
        arguments += [*_directory(inside), "--ro-bind", str(memory_group), inside]
    for path in spec.readonly_paths:
        arguments += [*_directory(os.path.dirname(path)), "--ro-bind", path, path]
    arguments += ["--remount-ro", "/", "--chdir", WORKSPACE]
    serve = serve_arguments(spec, runner=RUNNER, workspace=WORKSPACE, spool=SPOOL, roots=(WORKSPACE, "/tmp", HOME))  # noqa: S108
    if identity.mapped:
        serve += ["--user", f"{SANDBOX_ID}:{SANDBOX_ID}"]
    return [*arguments, "--", *serve]


def base_environment(readonly_paths: tuple[str, ...], home: str = HOME) -> dict[str, str]:
    """What every command sees of an environment before the spec's and its own. Tool directories that were shown come first in PATH."""
    shown = [f"{path}/bin" for path in readonly_paths if os.path.isdir(f"{path}/bin")]
    system = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    return {
        "PATH": ":".join([*shown, *system]),
        "HOME": home,
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "CI": "true",
    }


def _namespaces(spec: SandboxSpec, identity: Identity) -> list[str]:
    arguments = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    if spec.network != "host":
        arguments.append("--unshare-net")
    if identity.mapped:
        # The user namespace is made by `runner launch`; the two capabilities let the runner become the sandbox's user and are gone then.
        arguments += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_CHOWN"]
    else:
        arguments += ["--unshare-user", "--uid", str(SANDBOX_ID), "--gid", str(SANDBOX_ID), "--disable-userns", "--cap-drop", "ALL"]
    arguments += ["--as-pid-1", "--new-session", "--clearenv"]
    for name, value in base_environment(spec.readonly_paths).items():
        arguments += ["--setenv", name, value]
    return arguments


def _system() -> list[str]:
    arguments: list[str] = []
    for name in _SYSTEM:
        path = f"/{name}"
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    return arguments


def _etc(directory: Path, spec: SandboxSpec) -> list[str]:
    arguments = _directory("/etc")
    names = _ETC + (_ETC_WITH_NETWORK if spec.network == "host" else ())
    for name in names:
        if os.path.exists(f"/etc/{name}"):
            arguments += ["--ro-bind", os.path.realpath(f"/etc/{name}"), f"/etc/{name}"]
    for hidden in _ETC_HIDDEN:
        top, _, below = hidden.partition("/")
        path = os.path.join(os.path.realpath(f"/etc/{top}"), below)
        if os.path.isdir(path) and os.path.realpath(path) == path:  # a link leads to what is not shown
            arguments += ["--size", "4096", "--tmpfs", f"/etc/{hidden}", "--remount-ro", f"/etc/{hidden}"]
    for name in ETC_FILES:
        if name not in names:
            arguments += ["--ro-bind", str(directory / "etc" / name), f"/etc/{name}"]
    return arguments


def _directory(path: str) -> list[str]:
    """Make ``path`` and its parents, readable for all (bubblewrap's own default is closed to other users)."""
    arguments: list[str] = []
    parts = [p for p in path.split("/") if p]
    for depth in range(1, len(parts) + 1):
        arguments += ["--perms", "0755", "--dir", "/" + "/".join(parts[:depth])]
    return arguments


def _tmpfs(path: str, size_bytes: int, mode: str) -> list[str]:
    return [*_directory(os.path.dirname(path)), "--perms", mode, "--size", str(size_bytes), "--tmpfs", path]
