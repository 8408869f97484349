"""The e2b SDK within a process: what of its environment counts, and what becomes of a process that is forked."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.backends.base import Backend
from cifixer_exec.backends.e2b import machines
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.errors import BackendUnavailableError, CapacityError
from cifixer_exec.model import SandboxHandle, SandboxSpec
from tests.support.redis_server import free_port


@pytest.fixture
def nobody_there(namespace: str) -> Backend:
    """A service whose port nobody listens on; another key each time, because the breaker is the account's."""
    url = f"http://127.0.0.1:{free_port()}"
    return make_backend(
        AppConfig(execution_backend="e2b", namespace=namespace, e2b_api_key=namespace, e2b_api_url=url, e2b_sandbox_url=url)
    )


def handle_of(backend: Backend) -> SandboxHandle:
    return SandboxHandle(backend="e2b", sandbox_id="one", placement=backend.placement, data={"e2b_id": "i0123"})


def test_e2b_debug_has_no_effect(nobody_there: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """By it the SDK would say of everything that it was done."""
    monkeypatch.setenv("E2B_DEBUG", "true")
    handle = handle_of(nobody_there)
    for verb in (
        lambda: nobody_there.destroy(handle),
        lambda: nobody_there.extend(handle, time.time() + 60),
        lambda: nobody_there.inspect(handle),
        lambda: nobody_there.create(SandboxSpec(backend="e2b", sandbox_id="one")),
    ):
        with pytest.raises(BackendUnavailableError, match="E2B does not answer"):
            verb()


def test_without_a_key_nothing_is_asked_and_the_variable_named() -> None:
    backend = make_backend(AppConfig(execution_backend="e2b", e2b_api_key="", e2b_api_url="http://127.0.0.1:1"))
    health = backend.probe()
    assert not health.ok
    assert "E2B_API_KEY" in health.summary
    assert "E2B_API_KEY" in health.remedy
    with pytest.raises(BackendUnavailableError, match="there is no key for E2B: set E2B_API_KEY"):
        backend.create(SandboxSpec(backend="e2b", sandbox_id="one"))


def test_who_has_no_turn_in_time_is_told_why(nobody_there: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def pace(_account: str, per_s: float, most_wait_s: float) -> None:
        asked.extend((per_s, most_wait_s))

    monkeypatch.setattr(nobody_there, "_pace", pace)
    monkeypatch.setattr(machines.Machines, "find", lambda *_: None)
    with pytest.raises(CapacityError, match=r"at 1 a second.*CIFIXER_E2B_CREATES_PER_S"):
        nobody_there.create(SandboxSpec(backend="e2b", sandbox_id="one"))
    assert asked == pytest.approx([1.0, 108.0], abs=1.0)


def test_the_breaker_is_the_accounts(nobody_there: Backend, namespace: str) -> None:
    """Of all backends of this process that use it, and not of another account."""
    handle, give_up = handle_of(nobody_there), time.monotonic() + 30
    while nobody_there.breaker_state == "closed":
        assert time.monotonic() < give_up, "it does not open"
        with ThreadPoolExecutor(5) as threads, pytest.raises(BackendUnavailableError):
            list(threads.map(nobody_there.inspect, [handle] * 5))
        time.sleep(0.2)
    config = AppConfig(execution_backend="e2b", namespace=f"{namespace}x", e2b_api_key=namespace)
    assert make_backend(config).breaker_state == "closed"


FORK = """
import os, sys
from cifixer_exec import AppConfig
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.errors import BackendUnavailableError
from cifixer_exec.model import SandboxHandle, SandboxSpec

backend = make_backend(AppConfig(execution_backend="e2b", e2b_api_key="k", e2b_api_url="http://127.0.0.1:1"))
if sys.argv[1] == "used":
    backend.probe()
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
handle = SandboxHandle(backend="e2b", sandbox_id="one", placement=backend.placement, data={"e2b_id": "i0"})
print(backend.probe().summary)
spec = SandboxSpec(backend="e2b", sandbox_id="one")
verbs = [lambda: backend.create(spec), lambda: backend.inspect(handle), lambda: backend.destroy(handle)]
for verb in [*verbs, lambda: list(backend.list_owned())]:
    try:
        verb()
    except BackendUnavailableError as error:
        print(error)
sys.stdout.flush()
os._exit(0)
"""


def forked(how: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", FORK, how], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def test_a_process_that_was_forked_after_the_first_use_is_told_and_does_not_hang() -> None:
    said = forked("used")
    assert len(said) == 5
    assert all("used before this process was forked" in line and "--pool threads" in line for line in said)


def test_a_process_that_was_forked_before_it_can_use_the_package() -> None:
    said = forked("unused")
    assert len(said) == 5
    assert all("E2B does not answer" in line for line in said)
