"""What the chaos tests share: workers that come and go, the journal as it stands, and commands that keep a ledger of their runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis
from celery import Celery
from kombu import Exchange, Queue

from cifixer_exec import AppConfig, ExecResult, SandboxEnvironment, create_sandbox
from cifixer_exec.backends.base import Backend
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.errors import BackendError
from cifixer_exec.model import SandboxHandle
from cifixer_exec.queues import MAINTENANCE, placement_queue
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import OpRecord, SandboxRecord
from cifixer_exec.wiring import make_journal
from tests.support.contract_probes import wait_until
from tests.support.contract_stack import WorkerProcess, workers
from tests.support.docker_daemon import left_on_daemon
from tests.support.e2b_service import left_in_service, machines_of
from tests.support.kubernetes_cluster import left_in_cluster

T = TypeVar("T")
#: Short, so that a dead owner costs a test little; tests/chaos/test_partitions.py has the default.
LEASE_S = 3.0
#: For tests of what is between Redis, workers and callers alone: what their sandboxes are makes no difference.
ONE_BACKEND = pytest.mark.parametrize("backend", ["local"], indirect=True)


class Crew:
    """Starts real workers of one placement. :meth:`end` kills all and leaves no sandbox."""

    def __init__(self, config: AppConfig, directory: Path) -> None:
        self.config = config
        self._directory = directory
        #: All that were started, in that order.
        self.started: list[WorkerProcess] = []
        self._used: list[SandboxEnvironment] = []

    def __call__(self, **changes: Any) -> WorkerProcess:
        """One more worker, ready. ``changes`` are fields of its configuration."""
        directory = self._directory / f"worker{len(self.started)}"
        directory.mkdir(parents=True)
        worker = WorkerProcess(self.config.with_(**changes), directory)
        self.started.append(worker)
        give_up = time.monotonic() + 40
        while self.name_of(worker) == "":
            assert worker.process.poll() is None, worker.log()
            assert time.monotonic() < give_up, worker.log()
            time.sleep(0.05)
        return worker

    def unmade(self, **options: Any) -> SandboxEnvironment:
        """A sandbox that is not made yet. Its connections are closed at the end; a test need not tear it down."""
        self._used.append(create_sandbox(self.config, **options))
        return self._used[-1]

    def sandbox(self, **options: Any) -> SandboxEnvironment:
        """A new one."""
        size = options.pop("memory_bytes", None) if self.config.execution_backend == "e2b" else None
        made = self.unmade(**options)
        with machines_of(size):
            made.init()
        return made

    def name_of(self, worker: WorkerProcess) -> str:
        """Its id in the journal, '' when it holds no lease."""
        return next((r.worker_id for r in workers(self.config) if r.info["pid"] == worker.process.pid), "")

    def owner_of(self, sandbox: SandboxEnvironment) -> WorkerProcess:
        """The worker that owns a sandbox by the registry."""
        name = registered(self.config, sandbox.sandbox_id).owner
        return next(w for w in self.started if w.process.poll() is None and self.name_of(w) == name)

    def said(self, worker: WorkerProcess) -> str:
        """All that a worker logged."""
        return next((self._directory / f"worker{self.started.index(worker)}").glob("*.log")).read_text(errors="replace")

    def end(self) -> None:
        for sandbox in self._used:
            sandbox.close()
        for worker in self.started:
            kill(worker)
        backend = make_backend(self.config)
        for owned in backend.list_owned():
            destroy(backend, owned.handle)
        if backend.name == "docker_local":
            assert left_on_daemon(self.config.namespace, self.config.docker_host) == []
        if backend.name == "kubernetes":
            assert left_in_cluster(self.config.namespace) == []
        if backend.name == "e2b":
            assert left_in_service(self.config.namespace) == []


def destroy(backend: Backend, handle: SandboxHandle, patience_s: float = 15.0) -> None:
    """As who is told to call again does it: what a killed worker was just ending may take a moment."""
    give_up = time.monotonic() + patience_s
    while True:
        try:
            return backend.destroy(handle)
        except BackendError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)


def kill(worker: WorkerProcess) -> None:
    """SIGKILL, and it is gone."""
    worker.process.kill()
    worker.process.wait()


def pause(worker: WorkerProcess) -> None:
    os.kill(worker.process.pid, signal.SIGSTOP)


def resume(worker: WorkerProcess) -> None:
    os.kill(worker.process.pid, signal.SIGCONT)


def one_sandbox_each(start: Crew, first: WorkerProcess, second: WorkerProcess) -> tuple[SandboxEnvironment, SandboxEnvironment]:
    """Two sandboxes, each with an owner of its own. Which worker takes a creation is chance, so it may need some tries."""
    found: dict[int, SandboxEnvironment] = {}
    for _ in range(20):
        sandbox = start.sandbox()
        pid = start.owner_of(sandbox).process.pid
        if pid in found:
            sandbox.teardown()
        else:
            found[pid] = sandbox
        if len(found) == 2:
            return found[first.process.pid], found[second.process.pid]
    raise AssertionError("one worker takes every creation")


# ------------------------------------------------------------------------------------------- the journal as it stands


def ask(config: AppConfig, question: Callable[[Journal], Awaitable[T]]) -> T:
    """The answer of a journal that is opened for this one question."""

    async def go() -> T:
        journal = make_journal(config)
        try:
            return await question(journal)
        finally:
            await journal.redis.aclose()

    return asyncio.run(go())


def op(config: AppConfig, op_id: str) -> OpRecord:
    found = ask(config, lambda journal: journal.op(op_id))
    assert found is not None, f"op {op_id} is not in the journal"
    return found


def registered(config: AppConfig, sandbox_id: str) -> SandboxRecord:
    found = ask(config, lambda journal: journal.sandbox(sandbox_id))
    assert found is not None, f"sandbox {sandbox_id} is not registered"
    return found


def ended_by(config: AppConfig, op_id: str) -> str:
    """``<worker id> <epoch>`` of who wrote the end of an op."""
    with raw_redis(config) as client:
        answer: Any = client.hget(f"{config.namespace}:op:{op_id}", "ended_by")
    return str(answer.decode())


def raw_redis(config: AppConfig) -> redis.Redis:
    return redis.Redis.from_url(config.redis_url)


def queue_here(config: AppConfig) -> str:
    """The queue of this host's placement."""
    backend = make_backend(config)
    return placement_queue(backend.name, backend.placement)


def send_reap(config: AppConfig) -> None:
    """The message that beat sends."""
    with Celery("beat", broker=config.redis_url.replace("unix://", "redis+socket://", 1), set_as_current=False) as app:
        app.conf.broker_transport_options = {"global_keyprefix": f"{config.namespace}:", "priority_steps": [0]}
        queue: Any = Queue(MAINTENANCE, Exchange("sbx", type="direct"), routing_key=MAINTENANCE)
        app.send_task("cifixer_exec.reap", queue=queue, expires=27, ignore_result=True)


# ------------------------------------------------------------------------------------------------ commands and callers


def counting(lines: int = 40) -> tuple[str, bytes]:
    """A command that writes a line each 0.1 s, exits with 7 and keeps a ledger of its runs; and its whole output."""
    loop = f"i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i + 1)); sleep 0.1; done"
    return f"echo started >> ran; {loop}; exit 7", b"".join(b"line %d\n" % i for i in range(lines))


COUNT, EXPECTED = counting()
SHORT, SHORT_OUTPUT = counting(lines=20)


def runs(sandbox: SandboxEnvironment) -> int:
    """How often the sandbox's ledger says that a command was started."""
    return sandbox.read_file("ran").count(b"started\n") if sandbox.exists("ran") else 0


def run_in_background(
    threads: ThreadPoolExecutor, sandbox: SandboxEnvironment, command: str, op_id: str | None = None, timeout_s: float = 60
) -> Future[ExecResult]:
    """The future result of a command that has begun (and has written so into the ledger)."""
    future = threads.submit(sandbox.run_command, command, timeout_s=timeout_s, op_id=op_id)
    wait_until(lambda: runs(sandbox) > 0, "the command begins")
    return future


def check_once(sandbox: SandboxEnvironment, result: ExecResult, expected: bytes = EXPECTED) -> None:
    """The result of :func:`counting`, whole, of one run."""
    assert (result.status, result.exit_code) == ("exited", 7), result
    assert result.stdout == expected
    assert sandbox.read_file("ran") == b"started\n"


def handle_of(config: AppConfig, sandbox_id: str) -> SandboxHandle:
    """How the platform knows a sandbox of this host."""
    backend = make_backend(config)
    return SandboxHandle(backend=backend.name, sandbox_id=sandbox_id, placement=backend.placement)


def alive(config: AppConfig, sandbox_id: str) -> bool:
    """Whether the platform says so."""
    return make_backend(config).inspect(handle_of(config, sandbox_id)).alive


def platform_ids(config: AppConfig) -> set[str]:
    """The sandboxes that the platform lists."""
    return {owned.handle.sandbox_id for owned in make_backend(config).list_owned()}


CLIENT = """
import json, sys
from cifixer_exec import AppConfig, ExecutorError, attach, create_sandbox
what, sandbox_id, *rest = sys.argv[1:]
config = AppConfig.from_env()
print("ready", flush=True)
sys.stdin.readline()
if what == "create":
    create_sandbox(config, sandbox_id=sandbox_id).init()
    sys.exit()
sandbox = attach(sandbox_id, config)
try:
    result = sandbox.command(rest[0]).wait() if what == "wait" else sandbox.run_command(rest[1], op_id=rest[0], timeout_s=60)
    print(json.dumps([result.status, result.exit_code, result.text, result.stderr_text, result.duration_s, result.op_id]))
except ExecutorError as error:
    print(json.dumps([type(error).__name__, str(error)]))
sandbox.close()
"""


class Client:
    """Another process that is to ``run`` a command, ``wait`` for one or ``create`` a sandbox, as soon as :meth:`go` is called."""

    def __init__(self, config: AppConfig, *arguments: str) -> None:
        environ = {**{k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")}, **config.to_env()}
        command = [sys.executable, "-c", CLIENT, *arguments]
        self.process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self, timeout_s: float = 40) -> list[Any]:
        """What it printed: the members of its result, or the class and text of its error."""
        said, _ = self.process.communicate(timeout=timeout_s)
        return list(json.loads(said))
