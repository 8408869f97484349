"""What the Docker tests share: the daemon, a client of its own, and sandboxes that are made directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest

from cifixer_exec import AppConfig
from tests.support.contract_stack import check_daemon
from tests.support.docker_daemon import docker_host, image_for_tests

Direct = Callable[..., AppConfig]


@pytest.fixture(scope="module")
def host() -> str:
    """Where the Docker daemon is."""
    check_daemon("docker_local")
    return docker_host()


@pytest.fixture(scope="module")
def api(host: str) -> Iterator[Any]:
    """A client of it."""
    client = docker.APIClient(base_url=host, version="auto", timeout=60)
    yield client
    client.close()


@pytest.fixture
def direct(host: str, namespace: str) -> Direct:
    """The configuration of a sandbox without a queue; other settings as they are given."""
    image = image_for_tests(host)

    def config(**settings: Any) -> AppConfig:
        base = AppConfig(execution_backend="docker_local", dispatch="direct", docker_host=host, image=image, namespace=namespace)
        return base.with_(**settings)

    return config
