"""The containers of sandboxes, for who does something to them behind everyone's back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from cifixer_exec import AppConfig


@contextmanager
def api_of(config: AppConfig) -> Iterator[Any]:
    """A client of ``config``'s daemon for the ``with`` block."""
    client = docker.APIClient(base_url=config.docker_host, version="auto", timeout=60)
    try:
        yield client
    finally:
        client.close()


def container_of(api: Any, config: AppConfig, sandbox_id: str) -> str:
    """The id of a sandbox's container. Sandboxes that were made directly have a namespace below the configured one."""
    found = api.containers(all=True, filters={"label": f"cifixer.sandbox_id={sandbox_id}"})
    (ours,) = [c for c in found if c["Labels"].get("cifixer.namespace", "").partition("/")[0] == config.namespace]
    return str(ours["Id"])


def kill_container(config: AppConfig, sandbox_id: str) -> None:
    """``docker kill``; returns when it is dead."""
    with api_of(config) as api:
        container = container_of(api, config, sandbox_id)
        api.kill(container)
        _wait_for_death(api, container)


def stop_container(config: AppConfig, sandbox_id: str) -> None:
    """``docker stop``: SIGTERM, and SIGKILL a second later."""
    with api_of(config) as api:
        api.stop(container_of(api, config, sandbox_id), timeout=1)


def remove_container(config: AppConfig, sandbox_id: str) -> None:
    """``docker rm -f``."""
    with api_of(config) as api:
        api.remove_container(container_of(api, config, sandbox_id), force=True)


def take_all_memory(config: AppConfig, sandbox_id: str) -> None:
    """Let the kernel run out of the container's memory and choose its PID 1, as it may. Returns when it is dead."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a container's PID 1 the kernel's first choice")
    with api_of(config) as api:
        container = container_of(api, config, sandbox_id)
        pid = api.inspect_container(container)["State"]["Pid"]
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
        api.exec_start(api.exec_create(container, ["tail", "/dev/zero"], user="0:0")["Id"])
        _wait_for_death(api, container)


@contextmanager
def paused_container(config: AppConfig, sandbox_id: str) -> Iterator[None]:
    """``docker pause`` for the ``with`` block."""
    with api_of(config) as api:
        container = container_of(api, config, sandbox_id)
        api.pause(container)
        try:
            yield
        finally:
            api.unpause(container)


def _wait_for_death(api: Any, container: str) -> None:
    give_up = time.monotonic() + 20
    while api.inspect_container(container)["State"]["Running"]:
        assert time.monotonic() < give_up, "it does not die"
        time.sleep(0.02)
