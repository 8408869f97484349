"""Reaping by real workers, on the message that beat sends: orphans go, what is alive or not ours never does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cifixer_exec import AppConfig, attach
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.errors import SandboxLostError
from cifixer_exec.model import SandboxSpec
from cifixer_exec.wiring import make_reaper
from tests.support.chaos_deaths import kill_all
from tests.support.chaos_stack import (
    ONE_BACKEND,
    SHORT,
    SHORT_OUTPUT,
    Crew,
    alive,
    ask,
    check_once,
    handle_of,
    kill,
    platform_ids,
    registered,
    run_in_background,
    send_reap,
)
from tests.support.contract_probes import wait_until

GRACE_S = 1.0
#: How each backend says that somebody removed the sandbox.
REMOVED = {
    "local": "it was torn down",
    "docker_local": "its container was removed",
    "kubernetes": "its Job was deleted",
    "e2b": "its microVM is gone",
}


@pytest.fixture
def config(config: AppConfig) -> AppConfig:
    """Reaps what is a second old."""
    return config.with_(creation_grace_s=GRACE_S)


def plant(config: AppConfig, count: int = 1) -> set[str]:
    """Sandboxes that no registry knows, old enough to go."""
    backend = make_backend(config)
    planted = {f"orphan-{uuid.uuid4().hex[:8]}" for _ in range(count)}
    for sandbox_id in planted:
        backend.create(SandboxSpec(backend=config.execution_backend, sandbox_id=sandbox_id, lifetime_s=300))
    time.sleep(GRACE_S + 0.1)
    return planted


@pytest.fixture
def neighbour(standing: Crew) -> Iterator[AppConfig]:
    """Another installation that has its sandboxes below the same directory."""
    other = standing.config.with_(namespace=f"t{uuid.uuid4().hex[:12]}")
    yield other
    backend = make_backend(other)
    for owned in backend.list_owned():
        backend.destroy(owned.handle)


def test_orphans_go_by_the_message_of_beat_and_what_is_alive_or_not_ours_stays(
    standing: Crew, neighbour: AppConfig, threads: ThreadPoolExecutor
) -> None:
    config = standing.config
    idle, busy = standing.sandbox(), standing.sandbox()
    future = run_in_background(threads, busy, SHORT)
    theirs = plant(neighbour)
    stranger = config.state_dir / config.namespace / "notes"
    stranger.mkdir(parents=True)
    process = subprocess.Popen(["sleep", "600"], cwd=stranger)
    orphans = plant(config, 3)
    young = standing.sandbox()
    send_reap(config)
    wait_until(lambda: not orphans & platform_ids(config), "the orphans are gone", 10)
    check_once(busy, future.result(timeout=20), SHORT_OUTPUT)
    send_reap(config)
    time.sleep(1)
    assert platform_ids(config) == {idle.sandbox_id, busy.sandbox_id, young.sandbox_id}
    assert [sandbox.run_command("echo on").stdout for sandbox in (idle, busy, young)] == [b"on\n"] * 3
    assert all(alive(neighbour, sandbox_id) for sandbox_id in theirs)
    assert (stranger.is_dir(), process.poll()) == (True, None)
    process.kill()
    process.wait()
    for sandbox in (idle, busy, young):
        sandbox.teardown()


def test_a_dry_run_names_what_a_round_would_take_and_takes_nothing(standing: Crew) -> None:
    config = standing.config
    live, vanished = standing.sandbox(), standing.sandbox()
    orphans = plant(config, 2)
    kill_all(config, vanished.sandbox_id)
    before = platform_ids(config)
    dry = ask(config, lambda journal: make_reaper(config, journal).reap(dry_run=True))
    assert (set(dry.destroyed), dry.closed, dry.failed) == (orphans, (vanished.sandbox_id,), ())
    assert platform_ids(config) == before
    assert all(alive(config, sandbox_id) for sandbox_id in orphans)
    assert registered(config, vanished.sandbox_id).state == "ready"
    send_reap(config)
    wait_until(lambda: registered(config, vanished.sandbox_id).state == "lost", "the entry is closed", 10)
    wait_until(lambda: not orphans & platform_ids(config), "the orphans are gone", 10)
    assert alive(config, live.sandbox_id)
    live.teardown()


def test_the_entry_of_a_sandbox_that_vanished_is_closed_with_the_cause_and_nothing_of_it_stays(standing: Crew) -> None:
    config = standing.config
    killed, removed = standing.sandbox(), standing.sandbox()
    kill_all(config, killed.sandbox_id)
    make_backend(config).destroy(handle_of(config, removed.sandbox_id))
    send_reap(config)
    for sandbox, cause in ((killed, ""), (removed, REMOVED[config.execution_backend])):
        wait_until(lambda sandbox=sandbox: registered(config, sandbox.sandbox_id).state == "lost", "the entry is closed", 10)  # type: ignore[misc]
        record = registered(config, sandbox.sandbox_id)
        assert record.cause
        assert cause in record.cause
        with pytest.raises(SandboxLostError, match=r"is lost: ."):
            attach(sandbox.sandbox_id, config)
    time.sleep(GRACE_S)
    send_reap(config)  # the rests of a sandbox that is lost are unknown to the registry now
    wait_until(lambda: platform_ids(config) == set(), "no directory of it is left", 10)


def test_an_expired_sandbox_goes_by_its_entry_although_its_own_lock_failed(standing: Crew) -> None:
    """The first lock is broken on purpose: the sandbox itself believes that it may live for long."""
    config = standing.config
    sandbox = standing.sandbox(lifetime_s=300)
    record = registered(config, sandbox.sandbox_id)
    assert ask(config, lambda journal: journal.set_expiry(sandbox.sandbox_id, 0.1, wid=record.owner, epoch=record.epoch))
    make_backend(config).extend(handle_of(config, sandbox.sandbox_id), time.time() + 0.1)  # the label; its runner is told nothing
    time.sleep(GRACE_S + 0.2)
    send_reap(config)
    wait_until(lambda: sandbox.sandbox_id not in platform_ids(config), "it is gone", 10)
    record = registered(config, sandbox.sandbox_id)
    assert (record.state, record.cause) == ("lost", "its lifetime ended")


def test_many_reap_tasks_at_once_on_two_workers_do_no_harm(config: AppConfig, start: Crew, threads: ThreadPoolExecutor) -> None:
    pair = [start(), start()]
    sandbox = start.sandbox()
    orphans = plant(config, 4)
    future = run_in_background(threads, sandbox, SHORT)
    for _ in range(4):
        send_reap(config)
    wait_until(lambda: platform_ids(config) == {sandbox.sandbox_id}, "the orphans are gone, and they alone", 10)
    made = [threads.submit(start.sandbox) for _ in range(4)]  # and some that are being made meanwhile
    for _ in range(4):
        send_reap(config)
    check_once(sandbox, future.result(timeout=20), SHORT_OUTPUT)
    assert [m.result(timeout=10).run_command("echo on").stdout for m in made] == [b"on\n"] * 4
    said = "".join(map(start.said, pair))
    assert "Traceback" not in said
    assert {name for name in orphans if f"reaped: sandbox {name}" in said} == orphans


@ONE_BACKEND
def test_beat_itself_has_an_orphan_reaped(config: AppConfig, start: Crew) -> None:
    start()
    live = start.sandbox()
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")}, **config.with_(reap_interval_s=1.0).to_env()}
    command = [sys.executable, "-m", "celery", "-A", "cifixer_exec.tasks", "beat", "--pidfile="]
    with open(os.devnull, "wb") as nowhere:
        beat = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=nowhere, stderr=nowhere, cwd=Path.cwd())
    try:
        orphans = plant(config)
        wait_until(lambda: not orphans & platform_ids(config), "the orphan is gone", 10)
    finally:
        beat.send_signal(signal.SIGTERM)
        beat.wait(10)
    assert live.run_command("echo on").stdout == b"on\n"


def test_what_an_owner_that_was_killed_leaves_is_no_orphan(config: AppConfig, start: Crew) -> None:
    """It is registered and waits for the next worker."""
    first = start()
    sandbox = start.sandbox()
    kill(first)
    second = start()
    time.sleep(GRACE_S)
    for _ in range(3):
        send_reap(config)
    assert sandbox.run_command("echo on").stdout == b"on\n"
    assert start.owner_of(sandbox) is second
    assert "reaped" not in start.said(second)
