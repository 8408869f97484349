"""What happens to containers behind everyone's back, through the queue and directly: told soon, and each cause by its own words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifixer_exec import AppConfig, BackendUnavailableError, SandboxEnvironment, Status, create_sandbox
from cifixer_exec.channel import connection
from cifixer_exec.model import MIB
from tests.support.chaos_losses import FOREVER, TOLD_S, check_lost, check_refused
from tests.support.chaos_stack import SHORT, SHORT_OUTPUT, Crew, check_once, run_in_background
from tests.support.docker_containers import (
    api_of,
    container_of,
    kill_container,
    paused_container,
    remove_container,
    stop_container,
    take_all_memory,
)

PAUSE_S = 3.0
DEATHS: dict[str, tuple[Callable[[AppConfig, str], None], str]] = {
    "removed": (remove_container, "its container was removed"),
    "killed": (kill_container, "its container was killed from outside"),
    "stopped": (stop_container, "its container was killed from outside"),
    "memory": (take_all_memory, "out of memory: "),
}
EACH_DEATH = pytest.mark.parametrize("death", DEATHS)


@pytest.fixture(scope="module")
def backend() -> str:
    """Here alone."""
    return "docker_local"


@pytest.fixture(params=["queue", "direct"])
def config(request: pytest.FixtureRequest, standing: Crew) -> AppConfig:
    """Through the queue, or without it."""
    return standing.config.with_(dispatch=request.param)


@pytest.fixture
def sandbox(config: AppConfig) -> Iterator[SandboxEnvironment]:
    made = create_sandbox(config, memory_bytes=96 * MIB)
    made.init()
    yield made
    made.teardown()


@EACH_DEATH
def test_the_death_of_a_container_is_told_to_the_command_in_it(
    threads: ThreadPoolExecutor, config: AppConfig, sandbox: SandboxEnvironment, death: str
) -> None:
    die, said = DEATHS[death]
    future = run_in_background(threads, sandbox, FOREVER)
    die(config, sandbox.sandbox_id)
    check_lost(future.result(timeout=TOLD_S), said)
    check_refused(sandbox, said)


@EACH_DEATH
def test_the_death_of_an_idle_container_is_told_to_the_next_command(config: AppConfig, sandbox: SandboxEnvironment, death: str) -> None:
    die, said = DEATHS[death]
    sandbox.run_command("true")
    die(config, sandbox.sandbox_id)
    died = time.monotonic()
    check_refused(sandbox, said)
    assert time.monotonic() - died < TOLD_S


def test_a_command_that_takes_all_memory_is_told_and_its_container_lives(sandbox: SandboxEnvironment) -> None:
    result = sandbox.run_command("echo begun; tail /dev/zero", timeout_s=60)
    assert (result.status, result.exit_code, result.stdout) == (Status.OUT_OF_MEMORY, None, b"begun\n"), result
    assert "memory" in result.cause
    assert sandbox.run_command("exit 3").exit_code == 3


def test_what_a_command_took_earlier_is_not_the_cause_of_a_later_death(config: AppConfig, sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("tail /dev/zero", timeout_s=60).status is Status.OUT_OF_MEMORY
    kill_container(config, sandbox.sandbox_id)
    check_refused(sandbox, "its container was killed from outside")


def test_a_container_that_is_paused_for_a_while_goes_on_where_it_was(
    threads: ThreadPoolExecutor, config: AppConfig, sandbox: SandboxEnvironment
) -> None:
    future = run_in_background(threads, sandbox, SHORT)
    with paused_container(config, sandbox.sandbox_id):
        queued = threads.submit(sandbox.run_command, "echo on")
        time.sleep(PAUSE_S)
        assert not future.done()
        assert not queued.done()
    assert queued.result(timeout=10).stdout == b"on\n"
    check_once(sandbox, future.result(timeout=20), SHORT_OUTPUT)


def test_a_container_that_is_paused_for_long_is_not_lost_and_who_comes_is_told_to_unpause_it(
    threads: ThreadPoolExecutor, standing: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the silence behind which a connection is given up; directly, because only here can that be made short."""
    monkeypatch.setattr(connection, "PING_INTERVAL_S", 0.2)
    monkeypatch.setattr(connection, "SILENCE_S", 1.0)
    config = standing.config.with_(dispatch="direct")
    with create_sandbox(config) as sandbox:
        future = run_in_background(threads, sandbox, SHORT)
        with paused_container(config, sandbox.sandbox_id):
            time.sleep(PAUSE_S)
            with pytest.raises(BackendUnavailableError, match="docker unpause cifixer-"):
                sandbox.run_command("echo never >> ran")
            assert not future.done()
        check_once(sandbox, future.result(timeout=20), SHORT_OUTPUT)


def test_a_paused_container_can_be_torn_down(config: AppConfig, sandbox: SandboxEnvironment) -> None:
    with api_of(config) as api:
        container = container_of(api, config, sandbox.sandbox_id)
        api.pause(container)
        begun = time.monotonic()
        sandbox.teardown()
        assert time.monotonic() - begun < TOLD_S
        assert not api.containers(all=True, filters={"id": container})
