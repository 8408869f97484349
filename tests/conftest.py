"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.support.redis_server import redis_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever runs on E2B is marked as that."""
    for item in items:
        chosen = getattr(getattr(item, "callspec", None), "params", {}).values()
        if "test_e2b_" in item.nodeid or any("e2b" in value for value in chosen if isinstance(value, str | tuple)):
            item.add_marker("e2b")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a real redis-server, one for all tests. Each test works in a ``namespace`` of its own."""
    with redis_server() as server:
        yield server.url


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"t{uuid4().hex[:12]}"
