"""A daemon that is restarted, killed or gone, with commands running in its containers through the queue and directly.

It is one of the tests' own. What is not known is never told as success, and nobody waits for ever.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cifixer_exec import AppConfig, BackendUnavailableError, ExecutorError, SandboxEnvironment, Status, create_sandbox
from cifixer_exec.cli.doctor import Finding, examine
from cifixer_exec.cli.reach import Reach
from tests.support.chaos_losses import FOREVER, check_lost, check_refused
from tests.support.chaos_stack import COUNT, LEASE_S, Crew, check_once, run_in_background
from tests.support.contract_probes import wait_until
from tests.support.contract_stack import absent
from tests.support.docker_daemon import NoDaemonError, PrivateDaemon, image_for_tests
from tests.support.redis_server import RedisServer

#: Until whoever waits has noticed that the daemon is back, and what came of its containers.
NOTICED_S = 20.0
#: A new op may not wait for a daemon that is away.
FAST_S = 10.0
#: A running one waits until its own deadline, and a grace behind it.
DEADLINE_S = 3.0
GRACE_S = 30.0
LIVE = "--live-restore"
#: docker-py leaves the socket that it could not connect to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def private() -> Iterator[PrivateDaemon]:
    try:
        daemon = PrivateDaemon()
    except NoDaemonError as error:
        absent("docker_local", str(error))
    try:
        yield daemon
    finally:
        daemon.end()


@pytest.fixture
def daemon(private: PrivateDaemon, request: pytest.FixtureRequest) -> Iterator[PrivateDaemon]:
    """It answers. Containers outlive it, but for another ``indirect`` parameter."""
    private.start(*getattr(request, "param", (LIVE,)))
    image_for_tests(private.host)
    yield private
    private.stop()
    gc.collect()  # of what docker-py left


@pytest.fixture
def config(daemon: PrivateDaemon, server: RedisServer, namespace: str, tmp_path: Path) -> AppConfig:
    return AppConfig(
        execution_backend="docker_local",
        docker_host=daemon.host,
        image=image_for_tests(daemon.host),
        redis_url=server.url,
        namespace=namespace,
        state_dir=tmp_path / "state",
        lease_s=LEASE_S,
        drain_s=1.0,
        worker_concurrency=8,
    )


@pytest.fixture
def pair(config: AppConfig, start: Crew) -> Iterator[list[SandboxEnvironment]]:
    """One behind a worker, one direct."""
    start()
    direct = create_sandbox(config.with_(dispatch="direct"))
    direct.init()
    yield [start.sandbox(), direct]
    direct.teardown()


Restart = Callable[[PrivateDaemon], None]


def restart_in_order(daemon: PrivateDaemon) -> None:
    """SIGTERM, as an upgrade does it."""
    daemon.stop()
    daemon.start()


def kill_and_restart(daemon: PrivateDaemon) -> None:
    """Its containers are ended by the next one, which finds them without a master."""
    daemon.kill()
    daemon.start()


@pytest.mark.parametrize("daemon", [()], indirect=True, ids=["not-live"])
@pytest.mark.parametrize("restart", [restart_in_order, kill_and_restart])
def test_a_daemon_that_ends_its_containers_and_comes_back_is_told_as_that(
    daemon: PrivateDaemon, start: Crew, pair: list[SandboxEnvironment], threads: ThreadPoolExecutor, restart: Restart
) -> None:
    futures = [run_in_background(threads, sandbox, FOREVER) for sandbox in pair]
    restart(daemon)
    for future, sandbox in zip(futures, pair, strict=True):
        check_lost(future.result(timeout=NOTICED_S), "the Docker daemon was stopped or restarted")
        check_refused(sandbox)
    assert start.sandbox().run_command("echo on").stdout == b"on\n"


@pytest.mark.parametrize("end", [PrivateDaemon.stop, PrivateDaemon.kill], ids=["stopped", "killed"])
def test_a_command_outlives_a_daemon_that_lets_containers_live(
    daemon: PrivateDaemon, pair: list[SandboxEnvironment], threads: ThreadPoolExecutor, end: Callable[[PrivateDaemon], None]
) -> None:
    futures = [run_in_background(threads, sandbox, COUNT) for sandbox in pair]
    end(daemon)
    time.sleep(2)
    daemon.start(LIVE)
    for future, sandbox in zip(futures, pair, strict=True):
        check_once(sandbox, future.result(timeout=NOTICED_S))
        assert sandbox.run_command("echo on").stdout == b"on\n"


def test_a_daemon_that_is_gone_is_told_fast_to_who_comes_and_as_unknown_to_who_waits(
    daemon: PrivateDaemon,
    start: Crew,
    pair: list[SandboxEnvironment],
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    futures = [run_in_background(threads, sandbox, FOREVER, timeout_s=DEADLINE_S) for sandbox in pair]
    daemon.kill()
    begun = time.monotonic()
    try:
        for sandbox in pair:
            check_unavailable(lambda sandbox=sandbox: sandbox.run_command("echo never >> ran"))  # type: ignore[misc]
        check_unavailable(lambda: start.unmade().init())
        check_doctor_tells(start.config, monkeypatch)
        for future in futures:
            result = future.result(timeout=begun + DEADLINE_S + GRACE_S - time.monotonic())
            assert (result.status, result.exit_code, result.stdout) == (Status.UNKNOWN, None, b"begun\n"), result
            assert re.search("the Docker daemon.* does not answer", result.cause)
    finally:
        daemon.start(LIVE)
    came_back = time.monotonic()
    eventually_works(pair[0], came_back + NOTICED_S)
    eventually_works(pair[1], came_back + NOTICED_S)
    for sandbox in pair:
        assert sandbox.run_command("cat ran").stdout == b"started\n"


def check_unavailable(call: Callable[[], object]) -> None:
    """It is told, soon and as what it is: nothing was begun."""
    begun = time.monotonic()
    with pytest.raises(BackendUnavailableError, match=r"the Docker daemon.* does not answer"):
        call()
    assert time.monotonic() - begun < FAST_S


def check_doctor_tells(config: AppConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the worker has renewed its lease, with which it tells the state of its breaker."""
    monkeypatch.setenv("CIFIXER_NAMESPACE", config.namespace)

    def worker() -> Finding:
        return next(found for found in examine(Reach(redis_url=config.redis_url)) if found.name == "worker")

    wait_until(lambda: not worker().ok, "doctor finds the worker's breaker open")
    assert "breaker open" in worker().summary or "breaker half_open" in worker().summary


def eventually_works(sandbox: SandboxEnvironment, give_up: float) -> None:
    """The breaker closes by itself; until then it says so."""
    while True:
        try:
            assert sandbox.run_command("echo on").stdout == b"on\n"
            return
        except ExecutorError:
            if time.monotonic() > give_up:
                raise
        time.sleep(0.2)
