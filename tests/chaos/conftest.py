"""A Redis, a configuration and workers for each test; and ``standing``: one worker for the tests of a module that do it no harm.

All of it is there once per backend, because who dies, drains or reaps does it with sandboxes in hand. Tests of what is between
Redis and workers alone are marked :data:`tests.support.chaos_stack.ONE_BACKEND`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from cifixer_exec import AppConfig, SandboxEnvironment, create_sandbox
from cifixer_exec.backends.registry import backend_names
from tests.support.chaos_stack import LEASE_S, Crew
from tests.support.contract_stack import on_present_backend
from tests.support.redis_server import RedisServer, redis_server


@pytest.fixture(scope="module", params=backend_names())
def backend(request: pytest.FixtureRequest) -> str:
    """The backend of the test's sandboxes."""
    return str(request.param)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of the test's own, with an append-only file: it forgets nothing when it is killed."""
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as started:
        yield started


@pytest.fixture
def bare_config(server: RedisServer, namespace: str, tmp_path: Path) -> AppConfig:
    """Of no backend yet."""
    state = tmp_path / "state"
    return AppConfig(redis_url=server.url, namespace=namespace, state_dir=state, lease_s=LEASE_S, drain_s=1.0, worker_concurrency=8)


@pytest.fixture
def config(backend: str, bare_config: AppConfig) -> AppConfig:
    return on_present_backend(backend, bare_config)


@pytest.fixture
def start(config: AppConfig, tmp_path: Path) -> Iterator[Crew]:
    """Starts workers of one placement; at the end all are killed and no sandbox is left."""
    crew = Crew(config, tmp_path)
    yield crew
    crew.end()


@pytest.fixture
def pair(config: AppConfig, start: Crew) -> Iterator[list[SandboxEnvironment]]:
    """One behind a worker, one direct."""
    start()
    direct = create_sandbox(config.with_(dispatch="direct"))
    direct.init()
    yield [start.sandbox(), direct]
    direct.teardown()


@pytest.fixture(scope="module")
def standing(backend: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """One worker for a whole module, at the session's Redis. It reaps what is a second old."""
    directory = tmp_path_factory.mktemp("standing")
    config = AppConfig(
        redis_url=redis_url,
        namespace=f"t{uuid4().hex[:12]}",
        state_dir=directory / "state",
        lease_s=LEASE_S,
        drain_s=1.0,
        worker_concurrency=8,
        creation_grace_s=1.0,
    )
    crew = Crew(on_present_backend(backend, config), directory)
    crew()
    yield crew
    crew.end()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """For callers that wait at the same time."""
    with ThreadPoolExecutor(16) as pool:
        yield pool
