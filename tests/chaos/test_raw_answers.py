"""Raw Celery callers: `.get()` gives the whole answer though the worker that waited for it was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from cifixer_exec import AppConfig
from tests.support.chaos_stack import COUNT, EXPECTED, ONE_BACKEND, Crew, alive, kill, pause, runs
from tests.support.contract_probes import wait_until

pytestmark = ONE_BACKEND
RAW = """
import json, sys
from cifixer_exec import tasks
try:
    answer = getattr(tasks, sys.argv[1]).delay(*sys.argv[2:]).get(timeout=50)
except Exception as error:
    answer = [type(error).__name__, str(error)]
print(json.dumps(answer))
"""


def caller(config: AppConfig, task: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process that waits for a raw task."""
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")}, **config.to_env()}
    return subprocess.Popen([sys.executable, "-c", RAW, task, *arguments], env=environ, stdout=subprocess.PIPE)


def test_the_answer_to_a_raw_task_outlives_its_worker(config: AppConfig, start: Crew) -> None:
    first = start()
    sandbox = start.sandbox()
    waiting = caller(config, "run_command", sandbox.sandbox_id, COUNT)
    wait_until(lambda: runs(sandbox) > 0, "the command begins")
    start()
    kill(first)
    answer, _ = waiting.communicate(timeout=60)
    result = json.loads(answer)
    assert (result["status"], result["exit_code"], result["stdout"]) == ("exited", 7, EXPECTED.decode())
    assert runs(sandbox) == 1


def test_the_answer_to_a_raw_teardown_outlives_the_worker_that_was_to_do_it(config: AppConfig, start: Crew) -> None:
    first = start()
    sandbox = start.sandbox()
    pause(first)  # its queue is read by nobody
    waiting = caller(config, "teardown_sandbox", sandbox.sandbox_id)
    start()
    kill(first)
    answer, _ = waiting.communicate(timeout=60)
    assert json.loads(answer) == {"sandbox_id": sandbox.sandbox_id}
    assert not alive(config, sandbox.sandbox_id)


CHAIN = """
import sys
from celery import chain
from cifixer_exec.tasks import run_command, teardown_sandbox
last = chain(run_command.s(sys.argv[1], sys.argv[2]), teardown_sandbox.si(sys.argv[1])).apply_async()
print(last.get(timeout=50))
"""


def test_a_chain_goes_on_behind_a_rolling_update(config: AppConfig, start: Crew) -> None:
    first = start()
    sandbox = start.sandbox()
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")}, **config.to_env()}
    waiting = subprocess.Popen([sys.executable, "-c", CHAIN, sandbox.sandbox_id, COUNT], env=environ, stdout=subprocess.PIPE)
    wait_until(lambda: runs(sandbox) > 0, "the command begins")
    start()
    assert first.stop() == 0
    answer, _ = waiting.communicate(timeout=60)
    assert sandbox.sandbox_id in answer.decode()
    assert not alive(config, sandbox.sandbox_id)
