"""What a new process does between its fork and its program: its mounts, its identity, its descriptors."""

from __future__ import annotations

import os
import signal
import stat
from contextlib import suppress
from typing import Any, NoReturn

from tests.support.kubernetes import kernel

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"}
#: https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md: as the container runtimes set them.
_READONLY_PROC = ("bus", "fs", "irq", "sys", "sysrq-trigger")
_HIDDEN_PROC = ("acpi", "kcore", "keys", "latency_stats", "timer_list", "scsi")


class StartError(Exception):
    """The program cannot be started; the words are runc's."""


def join_groups(groups: list[str]) -> None:
    """Control groups, by their directories."""
    for group in groups:
        with open(os.path.join(group, "cgroup.procs"), "w") as members:
            members.write("0")


def build(request: dict[str, Any]) -> None:
    """New namespaces and the container's view of the file system; this process is PID 1 in its namespace already."""
    network = 0 if request["host_network"] else kernel.CLONE_NEWNET
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | network)
    kernel.make_private()
    root = request["mount_point"]
    kernel.mount("image", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size={request.get('root_size', '64m')},mode=755")
    _image(root, request["image"])
    if not request["readonly_root"] and os.path.isdir(f"{root}/var/tmp"):
        kernel.mount("var-tmp", f"{root}/var/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=64m,mode=1777")
    kernel_views(root, request)
    for volume in request["mounts"]:
        _volume(root, volume)
    if network:
        kernel.loopback_up()
    kernel.set_hostname(request["hostname"][:63])
    kernel.pivot_root(root)
    with suppress(OSError):
        os.makedirs(request["directory"], exist_ok=True)
    if request["readonly_root"]:
        kernel.make_readonly("/")


def _image(root: str, image: dict[str, Any]) -> None:
    for name, source in image["binds"].items():
        target = f"{root}/{name}"
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
            continue
        _mount_point(target, os.path.isdir(source))
        kernel.bind(source, target, readonly=True)
    for name in image["directories"]:
        os.makedirs(f"{root}/{name}", exist_ok=True)
        os.chmod(f"{root}/{name}", 0o1777 if name.endswith("tmp") else 0o755)
    for name, text in image.get("files", {}).items():
        _write(f"{root}/{name}", text)
    for name, owner in image.get("owners", {}).items():
        os.chown(f"{root}/{name}", owner, owner)


def kernel_views(root: str, request: dict[str, Any]) -> None:
    """/proc, /sys and /dev."""
    for name in ("proc", "sys", "dev"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    plain = kernel.MS_NOSUID | kernel.MS_NOEXEC
    kernel.mount("proc", f"{root}/proc", "proc", plain | kernel.MS_NODEV)
    for name in _READONLY_PROC:
        with suppress(FileNotFoundError):
            kernel.bind(f"{root}/proc/{name}", f"{root}/proc/{name}", readonly=True)
    for name in _HIDDEN_PROC:
        path = f"{root}/proc/{name}"
        if os.path.isdir(path):
            kernel.mount("tmpfs", path, "tmpfs", kernel.MS_RDONLY, "size=0")
        elif os.path.exists(path):
            kernel.bind("/dev/null", path)
    _groups_view(f"{root}/sys", request["group_views"])
    _devices(f"{root}/dev", plain, request["shm"])


def _groups_view(sys: str, views: dict[str, str]) -> None:
    kernel.mount("sys", sys, "tmpfs", kernel.MS_NOSUID, "size=1m,mode=755")
    for name, source in views.items():
        target = f"{sys}/fs/cgroup/{name}".rstrip("/")
        os.makedirs(target)
        kernel.bind(source, target, readonly=True)
    kernel.make_readonly(sys)


def _devices(dev: str, plain: int, shm: str) -> None:
    kernel.mount("dev", dev, "tmpfs", plain, "size=64k,mode=755")
    for name in _DEVICES:
        _mount_point(f"{dev}/{name}", False)
        kernel.bind(f"/dev/{name}", f"{dev}/{name}")
    for name, target in _LINKS.items():
        os.symlink(target, f"{dev}/{name}")
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"{dev}/{name}")
    kernel.mount("devpts", f"{dev}/pts", "devpts", plain, "newinstance,ptmxmode=0666,mode=0620")
    if shm:
        kernel.bind(shm, f"{dev}/shm")
    else:
        kernel.mount("shm", f"{dev}/shm", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")


def _volume(root: str, volume: dict[str, Any]) -> None:
    """``source`` (a directory or a file of a volume) at ``target``."""
    target = root + volume["target"]
    try:
        _mount_point(target, os.path.isdir(volume["source"]))
        kernel.bind(volume["source"], target, readonly=volume["readonly"])
    except OSError as error:
        words = f'error mounting "{volume["source"]}" to rootfs at "{volume["target"]}": {error.strerror}'
        raise StartError(f"failed to create containerd task: OCI runtime create failed: {words}") from None


def _mount_point(path: str, is_directory: bool) -> None:
    if os.path.lexists(path):
        return
    os.makedirs(path if is_directory else os.path.dirname(path), exist_ok=True)
    if not is_directory:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))


def become(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """A session leader with the container's identity, descriptors and environment; then its program.

    Raises:
        StartError: there is no such program, or it may not be executed.
    """
    os.setsid()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    _identity(request)
    try:
        os.chdir(request["directory"])
    except OSError as error:
        raise StartError(f'chdir to cwd ("{request["directory"]}") set in config.json failed: {_words(error)}') from None
    environment = dict(request["environment"])
    environment.setdefault("HOME", _home(request["user"]))
    os.umask(0o022)
    kernel.die_with_parent(signal.SIGKILL)
    _default_signals()
    program = _program(request["command"][0], environment.get("PATH", ""))
    os.execve(program, request["command"], environment)


def _identity(request: dict[str, Any]) -> None:
    """``one_user``: this process may have one user only, so the container's id is a name for it in a user namespace."""
    user, group = request["user"], request["group"]
    if request["one_user"]:
        if request["verb"] == "run":
            kernel.unshare(kernel.CLONE_NEWUSER)
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{user} 0 1")
            _write("/proc/self/gid_map", f"{group} 0 1")
    else:
        os.setgroups(request["supplementary_groups"])
    if request["drop_capabilities"]:
        kernel.drop_bounding_set()
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    if request["drop_capabilities"]:
        kernel.clear_capabilities()
    if request["no_new_privileges"]:
        kernel.no_new_privileges()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _default_signals() -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _home(user: int) -> str:
    """As the container's own /etc/passwd says."""
    with suppress(OSError), open("/etc/passwd", encoding="utf-8", errors="replace") as accounts:
        for line in accounts:
            fields = line.rstrip("\n").split(":")
            if len(fields) >= 6 and fields[2] == str(user):
                return fields[5]
    return "/"


def _program(name: str, path: str) -> str:
    if "/" in name:
        return _executable(name, name)
    for directory in path.split(":"):
        with suppress(StartError):
            return _executable(name, os.path.join(directory, name))
    raise StartError(f'exec: "{name}": executable file not found in $PATH')


def _executable(name: str, candidate: str) -> str:
    try:
        mode = os.stat(candidate).st_mode
    except OSError as error:
        raise StartError(f'exec: "{name}": stat {candidate}: {_words(error)}') from None
    if stat.S_ISDIR(mode):
        raise StartError(f'exec: "{name}": is a directory')
    if not os.access(candidate, os.X_OK):
        raise StartError(f'exec: "{name}": permission denied')
    return candidate


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
