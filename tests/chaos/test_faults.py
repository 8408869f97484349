"""Real faults on real processes: what a worker or Redis going away does to who waits. Bounded; each takes seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from cifixer_exec import AppConfig, create_sandbox
from tests.support.chaos_stack import COUNT, EXPECTED, LEASE_S, ONE_BACKEND, Crew, check_once, run_in_background
from tests.support.redis_server import RedisServer


def test_an_owner_that_is_killed_loses_nothing(config: AppConfig, start: Crew) -> None:
    start(), start()
    with create_sandbox(config) as sandbox, ThreadPoolExecutor(1) as threads:
        future = run_in_background(threads, sandbox, COUNT)
        owner = start.owner_of(sandbox)
        owner.process.kill()
        owner.process.wait()
        check_once(sandbox, future.result(timeout=40))


def test_an_owner_that_is_paused_is_fenced_and_harms_nothing(config: AppConfig, start: Crew) -> None:
    start(), start()
    with create_sandbox(config) as sandbox, ThreadPoolExecutor(1) as threads:
        future = run_in_background(threads, sandbox, COUNT)
        owner = start.owner_of(sandbox)
        os.kill(owner.process.pid, signal.SIGSTOP)
        time.sleep(2 * LEASE_S)
        os.kill(owner.process.pid, signal.SIGCONT)
        check_once(sandbox, future.result(timeout=40))
        assert sandbox.run_command("echo still here").stdout == b"still here\n"


@ONE_BACKEND
def test_a_paused_worker_without_a_peer_takes_its_sandbox_up_again(config: AppConfig, start: Crew) -> None:
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


@ONE_BACKEND
def test_a_redis_that_is_away_for_a_moment_leaves_nobody_waiting(config: AppConfig, server: RedisServer, start: Crew) -> None:
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


@ONE_BACKEND
def test_a_worker_that_is_told_to_end_hands_over_what_runs(config: AppConfig, start: Crew) -> None:
    start(), start()
    with create_sandbox(config) as sandbox, ThreadPoolExecutor(1) as threads:
        future = run_in_background(threads, sandbox, COUNT)
        owner = start.owner_of(sandbox)
        assert owner.stop() == 0, owner.log()
        check_once(sandbox, future.result(timeout=40))


@ONE_BACKEND
def test_a_worker_that_is_full_with_commands_still_feeds_and_ends_them(config: AppConfig, start: Crew) -> None:
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


@ONE_BACKEND
def test_the_result_of_a_raw_task_outlives_the_end_of_its_worker(config: AppConfig, start: Crew) -> None:
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
