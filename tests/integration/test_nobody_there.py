"""No Redis, or nobody who works: one clear error in time, never a hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cifixer_exec import AppConfig, QueueUnavailableError, attach, create_sandbox


def test_no_redis_is_told_at_once_with_the_address(tmp_path: Path) -> None:
    config = AppConfig(redis_url=f"unix://{tmp_path}/none.sock", redis_patience_s=20)
    begun = time.monotonic()
    with pytest.raises(QueueUnavailableError, match=r"none\.sock cannot be reached"), create_sandbox(config):
        pass
    with pytest.raises(QueueUnavailableError, match=r"none\.sock cannot be reached"):
        attach("some-id", config)
    assert time.monotonic() - begun < 15


def test_a_password_is_never_shown() -> None:
    config = AppConfig(redis_url="redis://:geheim@127.0.0.1:1/0")
    with pytest.raises(QueueUnavailableError) as caught, create_sandbox(config):
        pass
    assert "127.0.0.1:1" in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_without_a_worker_the_wait_ends_with_the_queue_in_the_error(redis_url: str, namespace: str) -> None:
    config = AppConfig(redis_url=redis_url, namespace=namespace, start_timeout_s=1.0)
    begun = time.monotonic()
    with pytest.raises(QueueUnavailableError, match=r"sandbox\.local.*start a worker"), create_sandbox(config):
        pass
    assert time.monotonic() - begun < 15
