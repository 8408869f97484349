"""What the tests of the stand-in share: one of them for each module, and the unmodified SDK."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.contract_stack import absent
from tests.support.e2b.stand_in import Service, StandIn
from tests.support.kubernetes.waiting import until
from tests.support.own_process import NotHereError


@pytest.fixture(scope="session")
def e2b() -> Any:
    """The SDK."""
    return pytest.importorskip("e2b", reason="the SDK is not installed")


@pytest.fixture(scope="module")
def running(e2b: Any) -> Iterator[Service]:
    own = StandIn()
    try:
        service = own.start()
    except NotHereError as error:
        absent("e2b", str(error))
    yield service
    log = own.log
    own.close()
    assert "Traceback" not in log, log


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """With nothing set and nothing recorded; all that a test has made is gone at its end."""
    yield running
    running.order("clear_faults")
    running.order("forget")
    running.order("reset")
    for sandbox in running.order("sandboxes"):
        running.order("vanish", sandbox=sandbox["sandboxID"])
    until(lambda: not any(running.left().values()))


@pytest.fixture
def create(service: Service, e2b: Any) -> Callable[..., Any]:
    """A sandbox for a minute, by the synchronous SDK."""

    def make(template: str = "base", **options: Any) -> Any:
        return e2b.Sandbox.create(template, **{"timeout": 60, **service.connection, **options})

    return make


@pytest.fixture
def sandbox(create: Callable[..., Any]) -> Any:
    return create()
