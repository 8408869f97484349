"""An API server that is restarted, cut off, slow or gone, with commands running through the queue and directly.

It is a stand-in of the module's own. What is not known is never told as success, and nobody waits for ever.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cifixer_exec import AppConfig, BackendUnavailableError, SandboxEnvironment, Status, create_sandbox
from tests.support.chaos_losses import FOREVER
from tests.support.chaos_outages import DEADLINE_S, FAST_S, GRACE_S, NOTICED_S, check_doctor_tells, eventually_works
from tests.support.chaos_stack import COUNT, Crew, check_once, run_in_background
from tests.support.contract_stack import absent
from tests.support.kubernetes.knobs import Knobs
from tests.support.kubernetes.stand_in import OwnStandIn, StandIn
from tests.support.kubernetes_cluster import WORKER, settings_on
from tests.support.own_process import NotHereError

AWAY_S = 2.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[StandIn]:
    own = OwnStandIn()
    try:
        started = own.__enter__()
    except NotHereError as error:
        absent("kubernetes", str(error))
    yield started
    own.close()


@pytest.fixture
def config(cluster: StandIn, bare_config: AppConfig) -> AppConfig:
    return bare_config.with_(execution_backend="kubernetes", **settings_on(cluster))


def test_a_command_outlives_a_restart_of_the_api_server(
    cluster: StandIn, pair: list[SandboxEnvironment], threads: ThreadPoolExecutor
) -> None:
    futures = [run_in_background(threads, sandbox, COUNT) for sandbox in pair]
    cluster.order("restart", down_s=AWAY_S)
    for future, sandbox in zip(futures, pair, strict=True):
        check_once(sandbox, future.result(timeout=NOTICED_S))
        assert sandbox.run_command("echo on").stdout == b"on\n"


def test_channels_that_are_cut_again_and_again_lose_and_double_nothing(
    cluster: StandIn, pair: list[SandboxEnvironment], threads: ThreadPoolExecutor
) -> None:
    futures = [run_in_background(threads, sandbox, COUNT) for sandbox in pair]
    cuts = 0
    while not all(future.done() for future in futures):
        cuts += cluster.order("cut_execs", pod="")
        time.sleep(0.2)
    assert cuts > len(pair)
    for future, sandbox in zip(futures, pair, strict=True):
        check_once(sandbox, future.result())


@pytest.mark.parametrize("after_frames", [1, 2, 3])
def test_a_channel_that_is_cut_behind_a_request_and_before_its_answer_does_it_once(
    cluster: StandIn, pair: list[SandboxEnvironment], after_frames: int
) -> None:
    for sandbox in pair:
        cluster.order("cut_execs", pod="")
        cluster.order("cut_next_exec", after_frames=after_frames)
        assert sandbox.run_command(f"echo {after_frames} >> once; echo out").stdout == b"out\n"
        assert sandbox.run_command("cat once").stdout == b"%d\n" % after_frames


def test_an_api_server_that_is_gone_is_told_fast_to_who_comes_and_as_unknown_to_who_waits(
    cluster: StandIn, start: Crew, pair: list[SandboxEnvironment], threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures = [run_in_background(threads, sandbox, FOREVER, timeout_s=DEADLINE_S) for sandbox in pair]
    cluster.order("stop_api")
    begun = time.monotonic()
    try:
        for sandbox in pair:
            check_unavailable(sandbox)
        check_doctor_tells(start.config, monkeypatch)
        for future in futures:
            result = future.result(timeout=begun + DEADLINE_S + GRACE_S - time.monotonic())
            assert (result.status, result.exit_code, result.stdout) == (Status.UNKNOWN, None, b"begun\n"), result
            assert re.search("the Kubernetes API.* does not answer", result.cause), result.cause
    finally:
        cluster.order("start_api")
    came_back = time.monotonic()
    for sandbox in pair:
        eventually_works(sandbox, came_back + NOTICED_S)
        assert sandbox.run_command("cat ran").stdout == b"started\n"


def check_unavailable(sandbox: SandboxEnvironment) -> None:
    """It is told, soon and as what it is: nothing was begun. The requests of an outage's first seconds are still tried again."""
    begun = time.monotonic()
    with pytest.raises(BackendUnavailableError, match=r"the Kubernetes API.* does not answer"):
        sandbox.run_command("echo never >> ran")
    assert time.monotonic() - begun < 2 * FAST_S


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "429", "verb": "create", "path": "/jobs", "times": 2, "seconds": 1},
        {"kind": "503", "verb": "create", "path": "/jobs", "times": 2},
        {"kind": "lost_reply", "verb": "create", "path": "/jobs", "times": 1},
        {"kind": "reset", "verb": "watch", "path": "/pods", "times": 3},
        {"kind": "500", "verb": "get", "path": "/exec", "times": 2},
        {"kind": "429", "verb": "get", "path": "/exec", "times": 2},
    ],
    ids=lambda f: f"{f['kind']}-{f['verb']}{f['path'].replace('/', '-')}",
)
def test_a_sandbox_starts_works_and_ends_all_the_same(cluster: StandIn, config: AppConfig, fault: dict[str, object]) -> None:
    cluster.order("fault", **fault)
    with create_sandbox(config.with_(dispatch="direct")) as sandbox:
        assert sandbox.run_command("echo on").stdout == b"on\n"
    assert cluster.order("asked")["faults"], "nothing has met the fault"
    cluster.order("clear_faults")


@pytest.mark.parametrize("verb", ["delete", "list"])
def test_an_end_is_asked_for_again_when_it_was_refused_for_now(cluster: StandIn, config: AppConfig, verb: str) -> None:
    sandbox = create_sandbox(config.with_(dispatch="direct"))
    sandbox.init()
    cluster.order("fault", kind="503", verb=verb, path="/(jobs|pods)", times=2)
    sandbox.teardown()
    assert cluster.order("left")["pods"] == []
    cluster.order("clear_faults")


@contextmanager
def starting(cluster: StandIn, config: AppConfig, threads: ThreadPoolExecutor) -> Iterator[SandboxEnvironment]:
    """One whose Pod has no room for the ``with`` block, and then starts and works."""
    cluster.order("set", cpu=0.01)
    sandbox = create_sandbox(config.with_(dispatch="direct"))
    made = threads.submit(sandbox.init)
    try:
        yield sandbox
    finally:
        cluster.order("set", cpu=Knobs().cpu)
    made.result(timeout=NOTICED_S)
    assert sandbox.run_command("echo on").stdout == b"on\n"
    sandbox.teardown()


def test_a_start_goes_on_over_lost_watches_and_a_compacted_history(
    cluster: StandIn, config: AppConfig, threads: ThreadPoolExecutor
) -> None:
    with starting(cluster, config, threads):
        for _ in range(10):
            cluster.order("drop_watches")
            cluster.order("compact")
            time.sleep(0.1)


def test_a_start_outlives_a_restart_of_the_api_server(cluster: StandIn, config: AppConfig, threads: ThreadPoolExecutor) -> None:
    with starting(cluster, config, threads):
        time.sleep(0.5)
        cluster.order("restart", down_s=AWAY_S)


def test_a_token_that_expires_is_replaced_by_the_newer_one(cluster: StandIn, config: AppConfig) -> None:
    with create_sandbox(config.with_(dispatch="direct")) as sandbox:
        cluster.renew(WORKER, namespace=config.kubernetes_namespace)
        cluster.order("cut_execs", pod="")
        assert sandbox.run_command("echo on").stdout == b"on\n"
