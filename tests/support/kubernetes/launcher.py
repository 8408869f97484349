"""The process that starts containers and execs: single-threaded and small, so that a fork costs about a millisecond.

It reads one JSON message per packet from a socket, with the three standard descriptors of the new process beside it, and answers
``{"id", "pid"}`` or ``{"id", "error", "reason"}``, later ``{"id", "status"}`` with the wait status. It ends with its socket.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
from contextlib import suppress
from typing import Any

from tests.support.kubernetes import inside, kernel

MAX_MESSAGE_BYTES = 1 << 20
#: The user namespace is made last, and owns none of the others.
_NAMESPACES = (
    ("ipc", kernel.CLONE_NEWIPC),
    ("uts", kernel.CLONE_NEWUTS),
    ("net", kernel.CLONE_NEWNET),
    ("mnt", kernel.CLONE_NEWNS),
    ("user", kernel.CLONE_NEWUSER),
)


class Launcher:
    """The loop. ``containers`` are those that run: id → descriptors of their namespaces."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._own_user = os.stat("/proc/self/ns/user").st_ino
        self._containers: dict[str, dict[str, int]] = {}
        self._ids: dict[int, str] = {}
        self._starting: dict[int, tuple[str, int, bool]] = {}
        self._selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Until the other side is gone; then everything that it started is killed."""
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._requests, selectors.EVENT_READ)
        self._selector.register(wake, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fd == wake:
                    os.read(wake, 4096)
                elif key.fd == self._requests.fileno():
                    if not self._take():
                        self._end()
                        return
                else:
                    self._started(key.fd)
            self._reap()

    def _take(self) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self._requests, MAX_MESSAGE_BYTES, 8)
        if not message:
            return False
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # a copy besides the standard ones would hold a stream open
        request = json.loads(message)
        try:
            if request["verb"] == "kill":
                self._kill(request)
            else:
                self._start(request, descriptors)
        except OSError as error:
            self._tell(id=request["id"], error=str(error), reason="internal")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _kill(self, request: dict[str, Any]) -> None:
        for pid, started in self._ids.items():
            if started == request["id"]:
                os.kill(pid, request["signal"])

    def _start(self, request: dict[str, Any], descriptors: list[int]) -> None:
        is_container = request["verb"] == "run"
        namespaces = None if is_container else self._containers.get(request["container"])
        if not is_container and namespaces is None:
            self._tell(id=request["id"], error="cannot exec in a stopped container", reason="stopped")
            return
        told, teller = os.pipe2(os.O_CLOEXEC)
        try:
            pid = self._fork(namespaces)
            if pid == 0:
                self._become(request, descriptors, namespaces, teller)
        finally:
            kernel.setns(self._own_pids, kernel.CLONE_NEWPID)
            os.close(teller)
        self._ids[pid] = request["id"]
        self._starting[told] = (request["id"], pid, is_container)
        self._selector.register(told, selectors.EVENT_READ)

    def _fork(self, namespaces: dict[str, int] | None) -> int:
        """In a new pid namespace, or in that of a container; this process stays in its own."""
        if namespaces is None:
            kernel.unshare(kernel.CLONE_NEWPID)
        else:
            kernel.setns(namespaces["pid"], kernel.CLONE_NEWPID)
        return os.fork()

    def _become(self, request: dict[str, Any], descriptors: list[int], namespaces: dict[str, int] | None, teller: int) -> None:
        """Never returns. What goes wrong is told through ``teller``, which a successful exec closes."""
        reason = "internal"
        try:
            signal.set_wakeup_fd(-1)
            inside.join_groups(request["groups"])
            if namespaces is None:
                inside.build(request)
            else:
                for name, kind in _NAMESPACES:
                    if name in namespaces:
                        kernel.setns(namespaces[name], kind)
            reason = "start"
            self._enter(request, descriptors)
        except BaseException as error:
            text = error.args[0] if isinstance(error, inside.StartError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):
                os.write(teller, json.dumps({"error": text, "reason": reason}).encode())
        finally:
            os._exit(70)

    def _enter(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """In its namespaces and control groups already. Never returns, or raises."""
        inside.become(request, descriptors)

    def _started(self, told: int) -> None:
        name, pid, is_container = self._starting.pop(told)
        self._selector.unregister(told)
        failure = os.read(told, 65536)
        os.close(told)
        if failure:
            self._tell(id=name, **json.loads(failure))
            return
        if is_container:
            self._containers[name] = self._namespaces_of(pid)
        self._tell(id=name, pid=pid)

    def _namespaces_of(self, pid: int) -> dict[str, int]:
        found: dict[str, int] = {}
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended already
            for name, _ in (*_NAMESPACES, ("pid", 0)):
                path = f"/proc/{pid}/ns/{name}"
                if name != "user" or os.stat(path).st_ino != self._own_user:
                    found[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return found

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for told in [t for t, (_, starting, _) in self._starting.items() if starting == pid]:
                self._started(told)
            name = self._ids.pop(pid, "")
            for descriptor in self._containers.pop(name, {}).values():
                os.close(descriptor)
            self._tell(id=name, status=status)

    def _end(self) -> None:
        for pid in self._ids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self._ids:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _tell(self, **message: Any) -> None:
        with suppress(BrokenPipeError):
            self._requests.send(json.dumps(message).encode())


def start_launcher(kind: type[Launcher] = Launcher) -> tuple[socket.socket, int]:
    """Forks the launcher; to be called while this process has one thread. Returns the socket to it and its pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE_BYTES)
    pid = os.fork()
    if pid:
        theirs.close()
        return ours, pid
    try:
        ours.close()
        kernel.die_with_parent(signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        kind(theirs).serve()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(0)
