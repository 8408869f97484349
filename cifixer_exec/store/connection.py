"""How to connect: the one place that knows which options the journal needs of redis-py."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.store.redis_errors import server_name

#: Longer than any blocking read (``Journal.read``), so that only a dead server trips it.
SOCKET_TIMEOUT_S = 8.0


def connect(url: str, *, socket_timeout_s: float = SOCKET_TIMEOUT_S, max_connections: int = 4096, **options: Any) -> Redis:
    """A client for ``redis://``, ``rediss://`` or ``unix://``; nothing is sent yet.

    Each follower of an op holds one connection while it waits. Retries are few and quick: every verb may be repeated.

    Raises:
        InvalidRequestError: the URL cannot be read.
    """
    settings: dict[str, Any] = {
        "socket_timeout": socket_timeout_s,
        "socket_connect_timeout": 3.0,
        "health_check_interval": 0,
        "max_connections": max_connections,
        "retry": Retry(ExponentialBackoff(cap=0.4, base=0.05), 2),
        "decode_responses": False,
    }
    if not url.startswith("unix:"):
        settings["socket_keepalive"] = True
    try:
        redis = Redis.from_url(url, **{**settings, **options})
        server_name(redis)
    except (ValueError, TypeError):
        raise InvalidRequestError("the Redis URL cannot be read: write redis://:password@host:6379/0, rediss://… or unix:///path") from None
    return redis
