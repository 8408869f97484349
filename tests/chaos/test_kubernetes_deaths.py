"""What happens to Jobs, Pods and nodes behind everyone's back, by queue and directly: told soon, each cause by its own words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from cifixer_exec import AppConfig, SandboxEnvironment, create_sandbox
from cifixer_exec.model import MIB
from tests.support.chaos_losses import FOREVER, TOLD_S, check_lost, check_refused
from tests.support.chaos_stack import Crew, run_in_background
from tests.support.kubernetes_pods import delete_job, delete_pod, disrupt, end_first_process

Death = Callable[[AppConfig, str], None]
DEATHS: dict[str, tuple[Death, str]] = {
    "job deleted": (delete_job, "its Job was deleted"),
    "pod deleted": (delete_pod, "its Pod was deleted"),
    "killed": (partial(disrupt, what="kill"), "its container was killed from outside"),
    "stopped": (end_first_process, "its container was killed from outside"),
    "evicted": (partial(disrupt, what="evict"), "its Pod was evicted: The node was low on resource: memory"),
    "preempted": (partial(disrupt, what="preempt"), "its Pod was preempted by one of a higher priority"),
    "node lost": (partial(disrupt, what="lose_node"), "its node"),
}
EACH_DEATH = pytest.mark.parametrize("death", DEATHS)


@pytest.fixture(scope="module")
def backend() -> str:
    """Here alone."""
    return "kubernetes"


@pytest.fixture(params=["queue", "direct"])
def config(request: pytest.FixtureRequest, standing: Crew) -> AppConfig:
    """Through the queue, or without it."""
    return standing.config.with_(dispatch=request.param)


@pytest.fixture
def sandbox(config: AppConfig) -> Iterator[SandboxEnvironment]:
    made = create_sandbox(config, memory_bytes=256 * MIB)
    made.init()
    yield made
    made.teardown()


@EACH_DEATH
def test_the_death_of_a_sandbox_is_told_to_the_command_in_it(
    threads: ThreadPoolExecutor, config: AppConfig, sandbox: SandboxEnvironment, death: str
) -> None:
    die, said = DEATHS[death]
    future = run_in_background(threads, sandbox, FOREVER)
    die(config, sandbox.sandbox_id)
    check_lost(future.result(timeout=3 * TOLD_S), said)
    check_refused(sandbox, said if config.dispatch == "queue" else "")


@EACH_DEATH
def test_the_death_of_an_idle_sandbox_is_told_to_the_next_command(config: AppConfig, sandbox: SandboxEnvironment, death: str) -> None:
    die, said = DEATHS[death]
    sandbox.run_command("true")
    die(config, sandbox.sandbox_id)
    check_refused(sandbox, said)
