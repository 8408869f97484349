"""Two Docker daemons under one Redis: each sandbox stays beside its daemon, and each daemon is reaped by its own workers."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest

from cifixer_exec import AppConfig, BackendError, SandboxEnvironment
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.model import SandboxSpec
from tests.support.chaos_stack import Crew, kill, one_sandbox_each, registered, send_reap
from tests.support.contract_probes import wait_until
from tests.support.contract_stack import absent
from tests.support.docker_daemon import NoDaemonError, PrivateDaemon, image_for_tests, left_on_daemon

#: docker-py leaves the socket that it could not connect to the garbage collector.
pytestmark = [
    pytest.mark.parametrize("backend", ["docker_local"], indirect=True),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def second() -> Iterator[PrivateDaemon]:
    try:
        daemon = PrivateDaemon()
    except NoDaemonError as error:
        absent("docker_local", str(error))
    try:
        daemon.start()
        image_for_tests(daemon.host)
        yield daemon
    finally:
        daemon.end()
        gc.collect()


@pytest.fixture
def config(config: AppConfig) -> AppConfig:
    return config.with_(creation_grace_s=1.0, memory_bytes=256 << 20)


@pytest.fixture
def there(config: AppConfig, second: PrivateDaemon) -> Iterator[AppConfig]:
    """The configuration of a worker beside the second daemon."""
    made = config.with_(docker_host=second.host)
    yield made
    backend = make_backend(made)
    for owned in backend.list_owned():
        backend.destroy(owned.handle)
    assert left_on_daemon(config.namespace, second.host) == []


@pytest.fixture
def pair(start: Crew, there: AppConfig) -> tuple[SandboxEnvironment, SandboxEnvironment]:
    """One sandbox on each daemon."""
    first, other = start(), start(docker_host=there.docker_host)
    return one_sandbox_each(start, first, other)


def on_daemon(config: AppConfig) -> set[str]:
    return {owned.handle.sandbox_id for owned in make_backend(config).list_owned()}


def test_each_sandbox_is_served_beside_its_own_daemon(
    config: AppConfig, there: AppConfig, pair: tuple[SandboxEnvironment, SandboxEnvironment]
) -> None:
    here, far = pair
    assert (on_daemon(config), on_daemon(there)) == ({here.sandbox_id}, {far.sandbox_id})
    for sandbox in pair:
        sandbox.write_file("mine", sandbox.sandbox_id)
    assert [sandbox.run_command("cat mine").text for sandbox in pair] == [here.sandbox_id, far.sandbox_id]
    assert registered(config, here.sandbox_id).placement != registered(config, far.sandbox_id).placement


def test_nobody_takes_over_a_sandbox_whose_daemon_he_cannot_reach(
    start: Crew, there: AppConfig, pair: tuple[SandboxEnvironment, SandboxEnvironment]
) -> None:
    """It waits for a worker beside its daemon, and is as it was."""
    here, far = pair
    far.write_file("mine", "still here")
    kill(start.owner_of(far))
    assert here.run_command("echo on").ok
    waiting = far.start_command("cat mine")
    time.sleep(2 * start.config.lease_s)
    assert here.run_command("echo on").ok
    start(docker_host=there.docker_host)
    result = waiting.wait()
    assert result.text == "still here", result


def test_each_daemon_is_reaped_by_a_worker_beside_it(
    config: AppConfig, there: AppConfig, pair: tuple[SandboxEnvironment, SandboxEnvironment]
) -> None:
    here, far = pair
    for place in (config, there):
        make_backend(place).create(SandboxSpec(backend="docker_local", sandbox_id="orphan", memory_bytes=256 << 20))
    time.sleep(1.1)
    send_reap(config)
    wait_until(lambda: (on_daemon(config), on_daemon(there)) == ({here.sandbox_id}, {far.sandbox_id}), "both orphans are gone")
    assert all(sandbox.run_command("echo alive").ok for sandbox in pair)


def test_a_daemon_that_is_away_is_trouble_for_its_own_sandboxes_only(
    second: PrivateDaemon, pair: tuple[SandboxEnvironment, SandboxEnvironment]
) -> None:
    here, far = pair
    second.stop()
    try:
        with pytest.raises(BackendError):
            far.run_command("echo never")
        assert here.run_command("echo on").ok
    finally:
        second.start()
