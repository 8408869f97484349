"""The variants (each backend, direct and queued) and their sandboxes: ``sandbox`` is shared by a module, ``make`` gives fresh ones."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from cifixer_exec import SandboxEnvironment
from cifixer_exec.backends.registry import backend_names
from tests.support.contract_stack import HOST_SECRET, ContractSession, Stack, WorkerProcess, check_daemon, check_present

Make = Callable[..., SandboxEnvironment]

VARIANTS = [(backend, dispatch) for backend in backend_names() for dispatch in ("direct", "queue")]


@pytest.fixture(scope="session")
def contract_session(redis_url: str) -> Iterator[ContractSession]:
    """Checked at the end: nothing of ours is left."""
    session = ContractSession(redis_url, f"ct{uuid4().hex[:8]}")
    os.environ["CONTRACT_SECRET"] = HOST_SECRET
    yield session
    del os.environ["CONTRACT_SECRET"]
    left = session.leftovers()
    session.remove()
    assert left == []


@pytest.fixture(scope="session")
def start_worker(contract_session: ContractSession) -> Iterator[Callable[[str], WorkerProcess]]:
    """The worker of a backend, started on first use; at the end each must end by SIGTERM alone."""
    started: dict[str, WorkerProcess] = {}

    def get(backend: str) -> WorkerProcess:
        if backend not in started:
            started[backend] = WorkerProcess(contract_session.config(backend, "queue"), contract_session.state_dir)
            started[backend].wait_ready()
        return started[backend]

    yield get
    ends = {backend: (worker.stop(), worker.log()) for backend, worker in started.items()}
    assert {backend: code for backend, (code, _) in ends.items()} == dict.fromkeys(ends, 0), ends


@pytest.fixture(scope="session", params=VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}")
def stack(request: pytest.FixtureRequest, contract_session: ContractSession, start_worker: Callable[[str], WorkerProcess]) -> Stack:
    """One variant; skipped with the reason when its backend does not work here."""
    backend, dispatch = request.param
    check_daemon(backend)
    config = contract_session.config(backend, dispatch)
    check_present(backend, config)
    return Stack(contract_session, config, start_worker(backend) if dispatch == "queue" else None)


@pytest.fixture(scope="module")
def sandbox(stack: Stack) -> Iterator[SandboxEnvironment]:
    """One sandbox for all tests of a module that do it no harm."""
    with stack.create() as made:
        yield made


@pytest.fixture
def make(stack: Stack) -> Iterator[Make]:
    """Makes fresh sandboxes, torn down behind the test."""
    made: list[SandboxEnvironment] = []

    def create(**overrides: Any) -> SandboxEnvironment:
        sandbox = stack.create(**overrides)
        made.append(sandbox)
        sandbox.init()
        return sandbox

    yield create
    for sandbox in made:
        sandbox.teardown()


@pytest.fixture
def fresh(make: Make) -> SandboxEnvironment:
    """A sandbox of the test's own."""
    return make()


@pytest.fixture
def marker() -> str:
    """An argument for ``sleep`` that no other process has."""
    return str(500_000_000 + secrets.randbelow(400_000_000))


@pytest.fixture
def name() -> str:
    """A path in the shared workspace that no other test uses."""
    return f"t-{secrets.token_hex(6)}"
