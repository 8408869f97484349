"""Owners that are away for 30 s at the default lease, one cut off from Redis and one stopped, while a third worker is there."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from cifixer_exec import AppConfig, SandboxEnvironment
from tests.support.chaos_stack import (
    COUNT,
    Crew,
    check_once,
    counting,
    ended_by,
    one_sandbox_each,
    pause,
    registered,
    resume,
    run_in_background,
)
from tests.support.contract_probes import wait_until
from tests.support.contract_stack import WorkerProcess, on_present_backend, workers
from tests.support.redis_proxy import RedisProxy
from tests.support.redis_server import RedisServer

AWAY_S = 30.0
COMMAND, OUTPUT = counting(lines=100)


@pytest.fixture
def config(server: RedisServer, namespace: str, tmp_path: Path) -> AppConfig:
    """With the default lease. On one backend: what is cut or stopped is on the other side of the worker."""
    made = AppConfig(redis_url=server.url, namespace=namespace, state_dir=tmp_path / "state", drain_s=1.0)
    return on_present_backend("local", made)


@pytest.mark.timeout(180)
def test_owners_that_are_cut_off_or_stopped_for_half_a_minute_are_replaced_and_fenced(
    config: AppConfig, server: RedisServer, start: Crew, threads: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(RedisProxy(server.port)) as proxy:
        port = proxy.port()
        cut_off = start(redis_url=proxy.url(port))
        idle = start.sandbox()  # nothing runs in it, so nothing but its lease tells the owner that it lost it
        stopped = start()
        pair = one_sandbox_each(start, cut_off, stopped)
        old_names = {start.name_of(cut_off), start.name_of(stopped)}
        peer = start()
        peer_name = start.name_of(peer)
        op_ids = ["of-the-cut-off", "of-the-stopped"]
        futures = [run_in_background(threads, s, COMMAND, op_id) for s, op_id in zip(pair, op_ids, strict=True)]
        proxy.at_once(port.cut)
        pause(stopped)
        away_since = time.monotonic()
        for sandbox, future in zip(pair, futures, strict=True):
            check_once(sandbox, future.result(timeout=25), OUTPUT)  # a sandbox works on while its old owner is away
        have_results_s = time.monotonic() - away_since
        assert have_results_s < AWAY_S - 2
        assert {w.worker_id for w in workers(config)} == {peer_name}
        time.sleep(AWAY_S - have_results_s)
        proxy.at_once(port.mend)
        resume(stopped)
        back_since = time.monotonic()
        for worker in (cut_off, stopped):
            wait_until(lambda worker=worker: start.name_of(worker) != "", "an old owner has a lease again", 15)  # type: ignore[misc]
        back_s = time.monotonic() - back_since
        fenced: list[str] = []
        for sandbox, op_id in zip(pair, op_ids, strict=True):
            check_owned_by_peer(config, sandbox, op_id, peer_name)
        for worker in (cut_off, stopped):
            fenced += check_fenced(start, worker)
        assert idle.run_command("echo on").stdout == b"on\n"
        assert old_names == {start.name_of(cut_off), start.name_of(stopped)}
    with capsys.disabled():
        print(f" [results {have_results_s:.1f} s after the cut, leases {back_s:.1f} s after the return]", *fenced, sep="\n  ")


def check_owned_by_peer(config: AppConfig, sandbox: SandboxEnvironment, op_id: str, peer: str) -> None:
    record = registered(config, sandbox.sandbox_id)
    assert (record.owner, record.state) == (peer, "ready")
    assert ended_by(config, op_id) == f"{peer} {record.epoch}"
    assert record.epoch > 1
    assert sandbox.run_command("cat ran").stdout == b"started\n"
    again = sandbox.run_command(COMMAND, op_id=op_id, timeout_s=60)  # what came late changed nothing
    assert (again.exit_code, again.stdout) == (7, OUTPUT)


def check_fenced(start: Crew, worker: WorkerProcess) -> list[str]:
    """It noticed that it is no owner any more, by a refused write or by its lease, holds nothing, and did not end or lose anything.

    Gives the lines in which it says so.
    """

    def owned() -> int:
        return int(next(w.info["sandboxes"] for w in workers(start.config) if w.info["pid"] == worker.process.pid))

    wait_until(lambda: owned() == 0, "it holds no sandbox", 5)  # what it tells travels with its lease
    assert worker.process.poll() is None
    assert "Traceback" not in start.said(worker)
    lines = [line for line in start.said(worker).splitlines() if "fenced" in line or "lease had lapsed" in line]
    assert lines
    assert "reaped" not in start.said(worker)
    return lines


def test_a_worker_that_was_cut_off_without_a_peer_takes_its_sandboxes_up_again(
    config: AppConfig, server: RedisServer, start: Crew, threads: ThreadPoolExecutor
) -> None:
    with closing(RedisProxy(server.port)) as proxy:
        port = proxy.port()
        only = start(redis_url=proxy.url(port), lease_s=2.0)
        idle, busy = start.sandbox(), start.sandbox()
        future = run_in_background(threads, busy, COUNT)
        proxy.at_once(port.cut)
        queued = threads.submit(idle.run_command, "echo on")
        time.sleep(3.5)
        proxy.at_once(port.mend)
        assert queued.result(timeout=10).stdout == b"on\n"
        check_once(busy, future.result(timeout=20))
        for sandbox in (idle, busy):
            handle = sandbox.start_command("sleep 600")
            handle.kill()
            assert handle.wait().status == "killed"
            assert registered(config, sandbox.sandbox_id).owner == start.name_of(only)
