"""What is where in a sandbox, and the limits of its container.

One memory file system is the whole disk: workspace, home and /tmp are links into it, so that one size holds for all of
them together, on any storage driver. The links, like the runner, are in the prepared image (images.py).
"""

from __future__ import annotations

from typing import Any

from cifixer_exec.backends.disk import disk_size_bytes, spool_size_bytes
from cifixer_exec.backends.docker_local.daemon import Facts
from cifixer_exec.backends.limits import limit_arguments, max_processes, root_arguments
from cifixer_exec.model import MIB, SandboxSpec

RUNNER = "/run/cifixer/runner"
SPOOL = "/run/cifixer/spool"
#: Root's alone: no command can reach, replace or redirect the socket in it.
CHANNEL = "/run/cifixer/channel"
SOCKET = f"{CHANNEL}/socket"
DISK = "/sandbox"
WORKSPACE, HOME, TMP = "/workspace", "/home/sandbox", "/tmp"  # noqa: S108
#: The image's own users, and where they and the sandbox's are seen from /etc/passwd.
IMAGE_PASSWD, ETC, PASSWD = "/run/cifixer/passwd", "/run/cifixer/etc", "/run/cifixer/etc/passwd"
LINKS = {WORKSPACE: f"{DISK}/workspace", HOME: f"{DISK}/home", TMP: f"{DISK}/tmp", "/var/tmp": f"{DISK}/tmp", "/etc/passwd": PASSWD}  # noqa: S108

DEFAULT_CPUS = 1.0
DEFAULT_MEMORY_BYTES = 2048 * MIB
MOST_DISK_BYTES = 4096 * MIB
#: The most that the runner and its supervisors can need of the pids controller, which counts threads; the exact limit on
#: what *commands* may have is the runner's (RLIMIT_NPROC), this one stops whoever gets around it.
RUNNER_THREADS = 1024
#: The same where commands are root: there the kernel counts nobody's processes, so this limit is the only one and may not be that wide.
ROOT_RUNNER_THREADS = 128
_SHM_BYTES = 256 * MIB
#: To become the sandbox's user and give it its directories; the runner has none of them left when it starts a command.
CAPABILITIES = ["CHOWN", "SETGID", "SETUID"]
#: What apt, dnf, apk, pip and npm need as root: files of any owner, their own unprivileged user, and for the runner to end such processes.
ROOT_CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"]
#: The variable that the runner takes its secret from (and out of its environment) where commands can reach its socket.
TOKEN = "CIFIXER_TOKEN"  # noqa: S105  # its name
ROOT = 0

BRIDGE = [RUNNER, "bridge", "--socket", SOCKET]
#: Who runs the bridge: not the sandbox's user, whose processes could stop, trace or kill it.
BRIDGE_USER = "0:0"


def serve_command(spec: SandboxSpec, *, uid: int) -> list[str]:
    """The arguments of the runner as PID 1. ``uid`` :data:`ROOT`: commands keep what the container may do."""
    command = ["serve", "--socket", SOCKET, "--keep-socket", "--spool", SPOOL, "--volatile-spool", "--disk", DISK]
    command += ["--workspace", WORKSPACE, "--user", f"{uid}:{uid}", "--account", f"{IMAGE_PASSWD}:{PASSWD}"]
    command += root_arguments(WORKSPACE, TMP, HOME)
    if uid == ROOT:
        command += ["--keep-capabilities", "--token-env", TOKEN]
    return [*command, *limit_arguments(spec)]


def environment(of_image: list[str]) -> dict[str, str]:
    """What every command sees before the spec's variables and its own, besides what the image says."""
    ours = {"USER": "sandbox", "LOGNAME": "sandbox", "HOME": HOME}
    defaults = {"SHELL": "/bin/sh", "LANG": "C.UTF-8", "TERM": "dumb", "CI": "true"}
    named = {line.partition("=")[0] for line in of_image}
    return {**{name: value for name, value in defaults.items() if name not in named}, **ours}


def tmpfs(spec: SandboxSpec, *, memory_bytes: int | None, disk: bool, limit_inodes: bool, of_image: tuple[str, ...]) -> dict[str, str]:
    """All that a sandbox can write; it counts as the container's memory. An empty file costs about 1 KiB, so inodes are limited, too."""
    size = disk_size_bytes(spec.disk_bytes, memory_bytes=memory_bytes, most_bytes=MOST_DISK_BYTES)
    spool = spool_size_bytes(size)
    writable = f"rw,exec,nosuid,nodev,size={size}" + (f",nr_inodes={size // 4096 + 16384}" if limit_inodes else "")
    return {
        **dict.fromkeys(of_image, writable),
        **({DISK: f"{writable},mode=0755"} if disk else {}),
        SPOOL: f"rw,noexec,nosuid,nodev,mode=0755,size={spool}",
        ETC: "rw,noexec,nosuid,nodev,mode=0755,size=1048576",
        CHANNEL: "rw,noexec,nosuid,nodev,mode=0700,size=65536",
    }


def host_config(
    spec: SandboxSpec,
    *,
    facts: Facts,
    network_mode: str,
    volume: str = "",
    of_image: tuple[str, ...] = (),
    runtime: str = "",
    read_only: bool = True,
    as_root: bool = False,
) -> dict[str, Any]:
    """Arguments of docker-py's ``create_host_config``; what the daemon cannot limit is left out.

    ``volume``: the name of the one that is the disk, instead of memory. ``of_image``: where the image wants volumes and gets memory.
    """
    limits: dict[str, Any] = {}
    memory_bytes = int(spec.memory_bytes or DEFAULT_MEMORY_BYTES) if facts.memory else None
    if memory_bytes is not None:
        limits |= {"mem_limit": memory_bytes, "memswap_limit": memory_bytes}
    if facts.cpus:
        limits["nano_cpus"] = int((spec.cpus or DEFAULT_CPUS) * 1e9)
    if facts.max_processes:
        own = ROOT_RUNNER_THREADS if as_root else RUNNER_THREADS
        limits["pids_limit"] = max_processes(spec) + own
    return {
        **limits,
        "auto_remove": False,  # it would take the cause of death along
        "cap_drop": ["ALL"],
        "cap_add": ROOT_CAPABILITIES if as_root else CAPABILITIES,
        "init": False,  # an init such as tini would die of a hostile `kill -9 -1`, and the container with it
        "ipc_mode": "private",
        "log_config": {"type": "json-file", "config": {"max-size": "64k", "max-file": "1"}},
        "network_mode": network_mode,
        "read_only": read_only,
        "restart_policy": {"Name": "no"},
        "runtime": runtime or None,
        "security_opt": ["no-new-privileges:true"],
        "shm_size": _SHM_BYTES,
        # Podman refuses the mount option that limits the number of files.
        "tmpfs": tmpfs(spec, memory_bytes=memory_bytes, disk=not volume, limit_inodes=not facts.podman, of_image=of_image),
        "binds": {volume: {"bind": DISK, "mode": "rw"}} if volume else None,
        # Open files are limited by the runner: more than the daemon itself may have would be refused, in words about rlimits.
        "ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
    }
