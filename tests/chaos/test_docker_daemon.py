"""A daemon that is restarted, killed or gone, with commands running in its containers through the queue and directly.

It is one of the tests' own. What is not known is never told as success, and nobody waits for ever.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifixer_exec import AppConfig, BackendUnavailableError, SandboxEnvironment, Status
from tests.support.chaos_losses import FOREVER, check_lost, check_refused
from tests.support.chaos_outages import DEADLINE_S, FAST_S, GRACE_S, NOTICED_S, check_doctor_tells, eventually_works
from tests.support.chaos_stack import COUNT, Crew, check_once, run_in_background
from tests.support.contract_stack import absent
from tests.support.docker_daemon import NoDaemonError, PrivateDaemon, image_for_tests

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
def config(daemon: PrivateDaemon, bare_config: AppConfig) -> AppConfig:
    return bare_config.with_(execution_backend="docker_local", docker_host=daemon.host, image=image_for_tests(daemon.host))


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
