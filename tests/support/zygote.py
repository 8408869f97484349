"""Workers by fork: one process has imported everything and forks a real Celery worker for each request.

A start by ``python -m celery`` takes most of its time for imports; a thousand of them would be most of a chaos run.
Nothing is connected and no thread lives in this process, so a child begins as a fresh interpreter does: it reads its own
environment, seeds its own random numbers and makes its own boot id.

``python -m tests.support.zygote`` reads one JSON line per worker from its standard input and writes one per event:
``{"spawned": <number>, "pid": <pid>}`` and ``{"pid": <pid>, "status": <wait status>}``. At the end of its input it kills what is left.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import sys
import threading
from pathlib import Path
from typing import Any

#: How soon a doorbell that a killed worker held is given back; a run cannot wait for the minute of production.
VISIBILITY_S = 5
#: What a worker imports, the most expensive of it.
_NEEDED = (
    "celery.apps.worker",
    "celery.backends.redis",
    "celery.bin.celery",
    "celery.concurrency.thread",
    "kombu.transport.redis",
    "cifixer_exec.backends.docker_local",
    "cifixer_exec.backends.e2b",
    "cifixer_exec.backends.kubernetes",
    "cifixer_exec.backends.local",
    "cifixer_exec.tasks",
)


def _preload() -> None:
    for name in _NEEDED:
        importlib.import_module(name)
    if threading.active_count() != 1:
        raise RuntimeError("an import has started a thread: a fork would not have it")


def _become_worker(request: dict[str, Any]) -> None:
    """Never returns."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [n for n in os.environ if n.startswith("CIFIXER_")]:
        del os.environ[name]
    os.environ.update(request["env"])
    _redirect(Path(request["log"]))

    from celery.bin.celery import celery

    from cifixer_exec.tasks import app
    from tests.support import failpoints

    arms = [failpoints.Arm.from_json(arm) for arm in request["arms"]]
    if arms:
        failpoints.install(arms, Path(request["report"]))
    quick = {"visibility_timeout": VISIBILITY_S, "unacked_restore_interval": 1}
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, **quick}
    options = ["--loglevel", "INFO", "--without-gossip", "--without-mingle", "-n", f"{request['name']}@chaos"]
    celery.main(args=["-A", "cifixer_exec.tasks", "worker", *options], prog_name="celery")


def _redirect(log: Path) -> None:
    """Standard input from nowhere, output to the log; every other descriptor of the zygote is closed."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor, target in ((nowhere, 0), (out, 1), (out, 2)):
        os.dup2(descriptor, target)
    os.closerange(3, 256)


class Zygote:
    """The loop of the process."""

    def __init__(self) -> None:
        self._children: set[int] = set()
        self._buffer = b""

    def serve(self) -> None:
        """Until the end of the standard input."""
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business: it ends the workers in order
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            open_ = True
            while open_:
                for key, _ in selector.select():
                    if key.fd == 0:
                        open_ = self._read()
                    else:
                        os.read(wake, 4096)
                self._reap()
        self._end()

    def _read(self) -> bool:
        data = os.read(0, 65536)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._spawn(json.loads(line))
        return bool(data)

    def _spawn(self, request: dict[str, Any]) -> None:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                _become_worker(request)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                _finish(code)
        self._children.add(pid)
        self._tell(spawned=request["number"], pid=pid)

    def _reap(self) -> None:
        for pid in list(self._children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._children.discard(pid)
                self._tell(pid=pid, status=status)

    def _end(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _tell(self, **event: int) -> None:
        os.write(1, json.dumps(event).encode() + b"\n")


def _finish(code: int) -> None:
    """End as an interpreter does: threads joined, exit handlers run; but never back into the zygote's loop."""
    try:
        import atexit

        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _preload()
    Zygote().serve()
