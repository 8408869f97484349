"""The raw doorbell message against what Celery itself would send, and against a real Celery worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery
from celery.utils.nodenames import worker_direct
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec.store import doorbell
from cifixer_exec.store.keys import direct_queue

SCRIPT = Path(__file__).parents[1] / "support" / "bell_worker.py"

ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)


def fill(template: str, queue: str, tag: str) -> str:
    """What ``journal.lua`` does with a template."""
    head, middle, tail = template.split("\n")
    return head + json.dumps(queue) + middle + json.dumps(tag) + tail


@given(ids, ids)
def test_template_filled_is_the_message(sandbox_id: str, op_id: str) -> None:
    text = fill(doorbell.template(sandbox_id, op_id), "pool", "tag.1")
    assert json.loads(text) == doorbell.message(sandbox_id, op_id, queue="pool", delivery_tag="tag.1")


def test_message_has_what_celery_would_send() -> None:
    app = Celery("contract", broker="memory://")
    theirs = app.amqp.as_task_v2("op-1", doorbell.TASK_NAME, args=("s-1", "op-1"), ignore_result=True)
    ours = doorbell.message("s-1", "op-1", queue="pool", delivery_tag="t")
    assert ours["headers"] == {**theirs.headers, "origin": ours["headers"]["origin"]}
    assert json.loads(ours["body"]) == json.loads(json.dumps(theirs.body))
    assert theirs.properties.items() <= ours["properties"].items()
    app.close()


def test_message_names_ids_only() -> None:
    message = doorbell.message("s-1", "op-1", queue="pool", delivery_tag="t")
    assert message["headers"]["argsrepr"] == "('s-1', 'op-1')"
    assert message["headers"]["ignore_result"] is True


def test_direct_queue_has_celerys_name() -> None:
    assert direct_queue("local-1@host") == worker_direct("local-1@host").name


@pytest.fixture
def worker(redis_url: str, namespace: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real Celery worker on the queues ``pool`` and ``w1@test.dq2``; its lines say what it was rung for."""
    command = [sys.executable, str(SCRIPT), redis_url.replace("unix://", "redis+socket://"), namespace]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    yield process
    process.kill()
    process.communicate()


def lines(process: subprocess.Popen[bytes], count: int) -> list[list[str]]:
    """The next lines of a worker."""
    assert process.stdout is not None
    return [json.loads(process.stdout.readline() or b"null") for _ in range(count)]


@pytest.mark.timeout(20)
def test_a_real_worker_takes_it_from_pool_and_direct_queue(worker: subprocess.Popen[bytes], redis_url: str, namespace: str) -> None:
    assert lines(worker, 1) == [["ready"]]
    with redis.Redis.from_url(redis_url) as client:
        for n, queue in enumerate(("pool", "w1@test.dq2")):
            client.lpush(f"{namespace}:{queue}", fill(doorbell.template("s-1", f"op-{n}"), "pool", f"op-{n}.1"))
        assert sorted(lines(worker, 2)) == [["s-1", f"op-{n}", f"op-{n}", f"op-{n}", "pool"] for n in range(2)]
        # What journal.lua removes when the worker is dead.
        binding = b"w1@test\x06\x16\x06\x16w1@test.dq2"
        assert client.sismember(f"{namespace}:_kombu.binding.C.dq2", binding)
        assert client.sismember(f"{namespace}:_kombu.binding_permanent.C.dq2", binding)
