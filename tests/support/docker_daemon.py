"""A real Docker daemon for tests: the one that answers, else one of our own, where it can be started; and an image without a registry."""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import docker

#: Where the daemon is that a parent process of this one has started or found.
HOST = "CIFIXER_TEST_DOCKER_HOST"
_START_S = 30.0
_STOP_S = 30.0
#: What tests run in sandboxes, and what people expect to find there. Those that are missing here are missing there.
_PROGRAMS = (
    "bash sh awk base64 basename cat chmod chown cp cut date dd df dirname du echo env expr false find getent git grep gzip "
    "head hostname id ionice kill ln ls make md5sum mkdir mkfifo mktemp mount mv nice nproc od perl pgrep printenv printf ps "
    "pwd python3 readlink renice rm rmdir sed seq setsid sha256sum sleep sort split stat stdbuf stty sync tail tar taskset "
    "tee test timeout touch tr true truncate uname uniq unshare wc which whoami xargs yes "
)
_ETC = ("/etc/nsswitch.conf", "/etc/os-release", "/etc/services", "/etc/protocols")
_ACCOUNTS = {
    "etc/passwd": (0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
    "etc/group": (0o644, b"root:x:0:\nnogroup:x:65534:\n"),
    "etc/shadow": (0o640, b"root:*:19000:0:99999:7:::\n"),
}
_LAYOUT = "3"


class NoDaemonError(Exception):
    """There is no Docker daemon, and none can be started; the text says why."""


@cache
def docker_host() -> str:
    """Where a daemon listens; one that is started for it ends with this process.

    Raises:
        NoDaemonError: there is none.
    """
    for host in (os.environ.get(HOST, ""), os.environ.get("DOCKER_HOST", ""), "unix:///var/run/docker.sock"):
        if host and _answers(host):
            return host
    try:
        daemon = PrivateDaemon()
    except NoDaemonError as error:
        raise NoDaemonError(f"no Docker daemon answers, and {error}") from None
    atexit.register(_end, daemon, os.getpid())
    daemon.start()
    os.environ[HOST] = daemon.host  # for the processes that tests start
    return daemon.host


def _end(daemon: PrivateDaemon, owner: int) -> None:
    if os.getpid() == owner:
        daemon.end()


class PrivateDaemon:
    """A daemon with a data root, a socket and control groups of its own, to be stopped, killed and started again. Only root can."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise NoDaemonError("only root can start a Docker daemon")
        if shutil.which("dockerd") is None:
            raise NoDaemonError("dockerd is not installed (Debian: apt-get install docker.io)")
        self.directory = Path(tempfile.mkdtemp(prefix="dd-"))  # short: a socket's path has at most 107 bytes
        self.directory.chmod(0o711)
        self.host = f"unix://{self.directory / 'docker.sock'}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Returns when it answers. ``options`` are dockerd's. Raises NoDaemonError."""
        command = ["dockerd", "--host", self.host, "--data-root", str(self.directory / "data")]
        command += ["--exec-root", str(self.directory / "exec"), "--pidfile", str(self.directory / "pid")]
        command += ["--cgroup-parent", f"/{self.directory.name}", "--iptables=false", "--bridge=none", *options]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        give_up = time.monotonic() + _START_S
        while not _answers(self.host):
            if self._process.poll() is not None or time.monotonic() > give_up:
                said = (self.directory / "log").read_text(errors="replace")[-800:]
                raise NoDaemonError(f"dockerd did not start: {said}")
            time.sleep(0.1)

    def stop(self) -> None:
        """SIGTERM: its containers end, unless it has ``--live-restore``. Returns when it has ended."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        self.kill()

    def kill(self) -> None:
        """SIGKILL. The containers live on, each with its shim; containerd asked the kernel to end it with its parent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        give_up = time.monotonic() + _STOP_S
        while any("containerd --config" in command for command in self.processes().values()) and time.monotonic() < give_up:
            time.sleep(0.02)
        # Until somebody waits for it, the next dockerd would take its pid for that of a living one.
        (self.directory / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    def end(self) -> None:
        """Nothing is left: no process, mount, control group or file. Raises RuntimeError when something is."""
        self.stop()
        self._end_processes()
        self._unmount()
        self._remove_groups()
        shutil.rmtree(self.directory)

    def processes(self) -> dict[int, str]:
        """What runs for it, by pid: containerd, the shims, and what is in the containers."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    groups = (entry / "cgroup").read_text()
                    if f"{self.directory}/" in command or f"/{self.directory.name}/" in groups:
                        found[int(entry.name)] = command[:200]
        return found

    def _end_processes(self) -> None:
        give_up = time.monotonic() + _STOP_S
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > give_up:
                raise RuntimeError(f"these do not end: {left}")
            time.sleep(0.05)

    def _unmount(self) -> None:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        below = [line.split()[4] for line in lines if line.split()[4].startswith(f"{self.directory}/")]
        for point in reversed(below):
            subprocess.run(["umount", "--lazy", point], check=True)

    def _remove_groups(self) -> None:
        for top in [*Path("/sys/fs/cgroup").glob(f"*/{self.directory.name}"), *Path("/sys/fs/cgroup").glob(self.directory.name)]:
            for directory, _, _ in os.walk(top, topdown=False):
                os.rmdir(directory)


def _answers(host: str) -> bool:
    if host.startswith("unix://") and not _listens(host.removeprefix("unix://")):
        return False
    try:
        client = docker.APIClient(base_url=host, version="auto", timeout=5)
    except docker.errors.DockerException:
        return False
    client.close()
    return True


def _listens(path: str) -> bool:
    """Asked before docker-py is, which leaves a socket that it could not connect to the garbage collector."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


@cache
def image_for_tests(host: str) -> str:
    """An image of this machine's own shell, coreutils, Python and git, imported into the daemon if it is not there yet."""
    files = _files()
    seal = hashlib.sha256(
        "\n".join([_LAYOUT, *(f"{f}:{os.lstat(f).st_size}:{os.lstat(f).st_mtime_ns}" for f in files)]).encode()
    ).hexdigest()[:16]
    name = f"cifixer-test:{seal}"
    client = docker.APIClient(base_url=host, version="auto", timeout=120)
    try:
        if not client.images(name):
            _import(client, name, files)
    finally:
        client.close()
    return name


def left_on_daemon(namespace: str, host: str = "") -> list[str]:
    """What a test run's namespace still has on the daemon at ``host``, or on the one of the tests."""
    client = docker.APIClient(base_url=host or docker_host(), version="auto", timeout=30)
    try:
        wanted = {"label": "cifixer.namespace"}
        containers = [(f"container {c['Names']}", c["Labels"]) for c in client.containers(all=True, filters=wanted)]
        volumes = [(f"volume {v['Name']}", v["Labels"]) for v in client.volumes(filters=wanted).get("Volumes") or []]
        return [what for what, labels in containers + volumes if labels["cifixer.namespace"].partition("/")[0] == namespace]
    finally:
        client.close()


def _import(client: docker.APIClient, name: str, files: list[str]) -> None:
    with tempfile.TemporaryFile() as out:
        with tarfile.open(fileobj=out, mode="w") as archive:
            for directory in ("tmp", "root", "proc", "sys", "dev", "run", "home"):
                member = tarfile.TarInfo(directory)
                member.type, member.mode = tarfile.DIRTYPE, {"tmp": 0o1777, "root": 0o700}.get(directory, 0o755)
                archive.addfile(member)
            for path, (mode, content) in _ACCOUNTS.items():
                member = tarfile.TarInfo(path)
                member.mode, member.size = mode, len(content)
                archive.addfile(member, io.BytesIO(content))
            for path in _with_parents(files):
                archive.add(path, recursive=False)
        out.seek(0)
        repository, _, tag = name.partition(":")
        changes = ["ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"]
        answer = client.import_image_from_stream(iter(lambda: out.read(1 << 20), b""), repository=repository, tag=tag, changes=changes)
        if not client.images(name):  # Podman 4.3 does not heed the tag
            client.tag(json.loads(answer.splitlines()[-1])["status"].removesuffix("\n"), repository, tag)


def _with_parents(files: list[str]) -> Iterator[str]:
    """Each directory before what is in it: a rootless daemon (20.10) makes those that are missing for nobody else to enter."""
    told: set[str] = set()
    for path in files:
        for parent in [*reversed([str(p) for p in Path(path).parents]), path]:
            if parent != "/" and parent not in told:
                told.add(parent)
                yield parent


def _files() -> list[str]:
    """The programs with what they load, links as they are, each once and parents before children."""
    found: dict[str, None] = {}
    for top in ("/bin", "/sbin", "/lib", "/lib64", "/lib32"):
        if os.path.islink(top):
            found[top] = None
    programs = [path for name in _PROGRAMS.split() if (path := shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin"))]
    programs += [str(p) for p in Path("/usr/lib/git-core").glob("git*") if p.is_file() and not p.is_symlink()][:40]
    trees = _python_trees()
    libraries = [str(p) for tree in trees for p in Path(tree).rglob("*.so")]
    needed = _needed(programs + libraries)
    # glibc loads it only when a thread is cancelled
    unwinder = [os.path.join(os.path.dirname(path), "libgcc_s.so.1") for path in needed if "libc.so" in path]
    for path in [*_ETC, *programs, *needed, *unwinder]:
        _add(found, path)
    for tree in [*trees, "/usr/share/git-core", *_perl_trees()]:
        for directory, names, inside in os.walk(tree):
            names[:] = [n for n in names if n not in ("test", "__pycache__", "dist-packages", "site-packages", "idlelib", "tkinter")]
            _add(found, directory)
            for name in inside:
                _add(found, os.path.join(directory, name))
    return list(found)


def _add(found: dict[str, None], path: str) -> None:
    """``path`` and, through links, what it leads to."""
    for _ in range(10):
        if not os.path.lexists(path):
            return
        parent = os.path.realpath(os.path.dirname(path))
        path = os.path.join(parent, os.path.basename(path))
        found[path] = None
        if not os.path.islink(path):
            return
        path = os.path.join(parent, os.readlink(path))


def _needed(binaries: list[str]) -> list[str]:
    done = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False)
    words = (word for line in done.stdout.splitlines() for word in line.split() if not line.endswith(":"))
    return sorted({word for word in words if word.startswith("/")})


def _python_trees() -> list[str]:
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        return []
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()


def _perl_trees() -> list[str]:
    return [str(p) for p in Path("/usr/share").glob("perl-base")] + [str(p) for p in Path("/usr/lib").glob("*/perl-base")]
