"""The process of a cluster: its namespaces, its launcher, its listeners."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import sys
from contextlib import suppress
from pathlib import Path

from aiohttp import web

from tests.support.kubernetes import kernel
from tests.support.kubernetes.certificates import server_context
from tests.support.kubernetes.cluster import Cluster
from tests.support.kubernetes.control import Control
from tests.support.kubernetes.launcher import start_launcher
from tests.support.kubernetes.server import ApiServer

_ALL_IDS = 2**31


class Listener:
    """The API server's port, which can be closed with all its connections and opened again."""

    def __init__(self, server: ApiServer, context: ssl.SSLContext | None) -> None:
        self._server = server
        self._context = context
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def open(self) -> None:
        """On the port that it had, the first time on any."""
        runner = self._runner = web.AppRunner(self._server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=self._context, reuse_address=True)
        await site.start()
        self.port = runner.addresses[0][1]

    async def close(self) -> None:
        """At once: nobody is told."""
        runner, self._runner = self._runner, None
        if runner is not None:
            for transport in self._server.connections:
                transport.abort()
            self._server.connections.clear()
            await runner.cleanup()


def enter_namespaces() -> bool:
    """Mounts of this process and its children are seen by nobody else. True: one user is all it has, so it names it as it likes.

    Raises:
        OSError: neither is allowed.
    """
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        with suppress(OSError):
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.make_private()
            return _ids() < _ALL_IDS
    # Only in a pid namespace of its own may it go in and out of those of containers.
    kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    kernel.die_with_parent(signal.SIGKILL)
    kernel.make_private()
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NOEXEC | kernel.MS_NODEV)
    return True


def _ids() -> int:
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    return max(int(line.split()[0]) + int(line.split()[2]) for line in lines)


def main(directory: Path, *, tls: bool) -> None:
    """Tells on standard output where it is, or why it cannot be; ends when its standard input does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever started it ends it in order
    try:
        one_user = enter_namespaces()
        requests, _ = start_launcher()
    except OSError as error:
        say(error=f"Pods as local processes need root or unprivileged user namespaces, and this process may not make namespaces: {error}")
        return
    asyncio.run(_serve(directory, requests, one_user=one_user, tls=tls))


async def _serve(directory: Path, requests: socket.socket, *, one_user: bool, tls: bool) -> None:
    loop = asyncio.get_running_loop()
    cluster = Cluster(directory, requests, one_user=one_user)
    cluster.runtime.attach(loop)
    server = ApiServer(cluster)
    listener = Listener(server, server_context(directory) if tls else None)
    await listener.open()
    control = Control(cluster, server, listener)
    runner = web.AppRunner(control.application(), access_log=None)
    await runner.setup()
    await web.UnixSite(runner, str(directory / "control")).start()
    say(port=listener.port, one_user=one_user, limited=cluster.runtime.limited)
    await end_of_input(loop)
    await listener.close()
    await cluster.kubelet.close()
    await runner.cleanup()
    cluster.runtime.close()
    shutil.rmtree(directory, ignore_errors=True)


async def end_of_input(loop: asyncio.AbstractEventLoop) -> None:
    """Of this process's own: its starter has closed it, or is gone."""
    ended = asyncio.Event()

    def read() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            ended.set()

    loop.add_reader(0, read)
    await ended.wait()


def say(**what: object) -> None:
    """To the starter."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
