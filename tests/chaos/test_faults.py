"""Real faults on real processes: what a worker or Redis going away does to who waits. Bounded; each takes seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from cifixer_exec import AppConfig, ExecResult, SandboxEnvironment, create_sandbox
from cifixer_exec.backends.registry import make_backend
from tests.support.contract_stack import WorkerProcess, check_present, workers
from tests.support.redis_server import RedisServer, redis_server

LEASE_S = 3.0


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of the test's own, with an append-only file: it forgets nothing when it is killed."""
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as started:
        yield started


@pytest.fixture
def config(server: RedisServer, namespace: str, tmp_path: Path) -> AppConfig:
    state = tmp_path / "state"
    made = AppConfig(redis_url=server.url, namespace=namespace, state_dir=state, lease_s=LEASE_S, drain_s=1.0, worker_concurrency=8)
    check_present("local", made)
    return made


@pytest.fixture
def start(config: AppConfig, tmp_path: Path) -> Iterator[Callable[[], WorkerProcess]]:
    """Starts workers of one placement; at the end all are stopped and no sandbox is left."""
    started: list[WorkerProcess] = []

    def one_more() -> WorkerProcess:
        directory = tmp_path / f"worker{len(started)}"
        directory.mkdir()
        worker = WorkerProcess(config, directory)
        started.append(worker)
        before = len(workers(config))
        give_up = time.monotonic() + 40
        while len(workers(config)) <= before - 1 or not worker_ready(config, worker):
            assert worker.process.poll() is None, worker.log()
            assert time.monotonic() < give_up, worker.log()
            time.sleep(0.1)
        return worker

    yield one_more
    for worker in started:
        if worker.process.poll() is None:
            worker.process.send_signal(signal.SIGCONT)
            worker.stop()
    backend = make_backend(config)
    for owned in backend.list_owned():
        backend.destroy(owned.handle)


def worker_ready(config: AppConfig, worker: WorkerProcess) -> bool:
    return any(record.info["pid"] == worker.process.pid for record in workers(config))


def owner_of(config: AppConfig, candidates: list[WorkerProcess]) -> WorkerProcess:
    """The worker that made the only sandbox."""
    pids = {r.info["pid"]: r.info["sandboxes"] for r in workers(config)}
    time.sleep(LEASE_S / 3)  # the count travels with the lease
    pids = {r.info["pid"]: r.info["sandboxes"] for r in workers(config)}
    return next(w for w in candidates if pids[w.process.pid] > 0)


COUNT = "echo started >> ran; i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i + 1)); sleep 0.1; done; exit 7"
EXPECTED = b"".join(b"line %d\n" % i for i in range(40))


def run_in_background(threads: ThreadPoolExecutor, sandbox: SandboxEnvironment, command: str) -> Future[ExecResult]:
    future = threads.submit(sandbox.run_command, command, timeout_s=60)
    while b"started" not in (sandbox.read_file("ran") if sandbox.exists("ran") else b""):
        time.sleep(0.05)
    return future


def check_once(sandbox: SandboxEnvironment, result: ExecResult) -> None:
    assert (result.status, result.exit_code) == ("exited", 7), result
    assert result.stdout == EXPECTED
    assert sandbox.read_file("ran") == b"started\n"


def test_an_owner_that_is_killed_loses_nothing(config: AppConfig, start: Callable[[], WorkerProcess]) -> None:
    pair = [start(), start()]
    with create_sandbox(config) as sandbox, ThreadPoolExecutor(1) as threads:
        future = run_in_background(threads, sandbox, COUNT)
        owner = owner_of(config, pair)
        owner.process.kill()
        owner.process.wait()
        check_once(sandbox, future.result(timeout=40))


def test_an_owner_that_is_paused_is_fenced_and_harms_nothing(config: AppConfig, start: Callable[[], WorkerProcess]) -> None:
    pair = [start(), start()]
    with create_sandbox(config) as sandbox, ThreadPoolExecutor(1) as threads:
        future = run_in_background(threads, sandbox, COUNT)
        owner = owner_of(config, pair)
        os.kill(owner.process.pid, signal.SIGSTOP)
        time.sleep(2 * LEASE_S)
        os.kill(owner.process.pid, signal.SIGCONT)
        check_once(sandbox, future.result(timeout=40))
        assert sandbox.run_command("echo still here").stdout == b"still here\n"


def test_a_paused_worker_without_a_peer_takes_its_sandbox_up_again(config: AppConfig, start: Callable[[], WorkerProcess]) -> None:
    only = start()
    with create_sandbox(config) as sandbox, ThreadPoolExecutor(1) as threads:
        future = run_in_background(threads, sandbox, COUNT)
        os.kill(only.process.pid, signal.SIGSTOP)
        time.sleep(2 * LEASE_S)
        os.kill(only.process.pid, signal.SIGCONT)
        check_once(sandbox, future.result(timeout=40))
        handle = sandbox.start_command("sleep 600")
        handle.kill()
        assert handle.wait().status == "killed"


def test_a_redis_that_is_away_for_a_moment_leaves_nobody_waiting(
    config: AppConfig, server: RedisServer, start: Callable[[], WorkerProcess]
) -> None:
    start()
    with create_sandbox(config) as sandbox, ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(sandbox.run_command, f"sleep {n}; echo {n}", timeout_s=60) for n in (1, 1.5, 2, 4)]
        time.sleep(0.5)
        server.stop()
        time.sleep(2.0)
        server.start()
        results = [future.result(timeout=40) for future in futures]
        assert [(r.exit_code, r.text.strip()) for r in results] == [(0, "1"), (0, "1.5"), (0, "2"), (0, "4")]
        assert sandbox.run_command("echo on").stdout == b"on\n"


def test_a_worker_that_is_told_to_end_hands_over_what_runs(config: AppConfig, start: Callable[[], WorkerProcess]) -> None:
    pair = [start(), start()]
    with create_sandbox(config) as sandbox, ThreadPoolExecutor(1) as threads:
        future = run_in_background(threads, sandbox, COUNT)
        owner = owner_of(config, pair)
        assert owner.stop() == 0, owner.log()
        check_once(sandbox, future.result(timeout=40))


def test_a_worker_that_is_full_with_commands_still_feeds_and_ends_them(config: AppConfig, start: Callable[[], WorkerProcess]) -> None:
    start()
    with create_sandbox(config) as sandbox:
        first = [sandbox.start_command("read line; echo got $line", stdin_open=True) for _ in range(6)]
        killed = sandbox.start_command("sleep 600")
        for handle in first:  # each waits for its command to be there
            handle.send_stdin("")
        waiting = [sandbox.start_command(f"echo {n}") for n in range(4)]  # more than the worker takes at once
        sandbox.write_file("while", "full")
        for handle in first:
            handle.send_stdin("it\n")
        assert [handle.wait().text for handle in first] == ["got it\n"] * 6
        killed.kill()
        assert killed.wait().status == "killed"
        assert [handle.wait().text for handle in waiting] == [f"{n}\n" for n in range(4)]


RAW = """
import json, sys
from cifixer_exec.tasks import run_command
print(json.dumps(run_command.delay(sys.argv[1], sys.argv[2], timeout_s=60).get(timeout=50)))
"""


def test_the_result_of_a_raw_task_outlives_the_end_of_its_worker(config: AppConfig, start: Callable[[], WorkerProcess]) -> None:
    first = start()
    with create_sandbox(config) as sandbox:
        environ = {**{k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")}, **config.to_env()}
        client = subprocess.Popen([sys.executable, "-c", RAW, sandbox.sandbox_id, COUNT], env=environ, stdout=subprocess.PIPE)
        while not sandbox.exists("ran"):
            time.sleep(0.05)
        start()
        assert first.stop() == 0, first.log()
        answer, _ = client.communicate(timeout=60)
        result = json.loads(answer)
        assert (result["status"], result["exit_code"], result["stdout"]) == ("exited", 7, EXPECTED.decode())
        assert sandbox.read_file("ran") == b"started\n"
