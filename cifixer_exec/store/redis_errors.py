"""Errors of redis-py end here: each becomes a :class:`QueueUnavailableError` that names the server and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import exceptions
from redis.asyncio import Redis

from cifixer_exec.errors import QueueUnavailableError

#: What the server's answer begins with or holds, and what to do. Inside a Lua call the server wraps its answer: hence "holds".
_BY_TEXT: tuple[tuple[str, str, str], ...] = (
    ("OOM", "has no memory left", "raise its maxmemory (with maxmemory-policy noeviction), or purge old ops"),
    ("NOAUTH", "asks for a password", "put it into the URL: redis://:password@host"),
    ("Authentication required", "asks for a password", "put it into the URL: redis://:password@host"),
    ("WRONGPASS", "refuses the password", "correct user and password in the URL"),
    (
        "NOPERM",
        "forbids a command to this user",
        "allow EVALSHA, EVAL and XREAD on the namespace's keys",
    ),
    ("LOADING", "is still loading its data", "wait a little and submit again"),
    ("READONLY", "is a replica and cannot be written", "name the primary in the URL"),
    ("MASTERDOWN", "is a replica that has lost its primary", "name the primary in the URL"),
    ("MISCONF", "cannot save to disk and therefore takes no writes", "look into its log and free its disk"),
    ("NOREPLICAS", "has too few replicas to take writes", "start them, or lower min-replicas-to-write"),
    ("BUSY ", "is busy with a script", "wait; if it stays, SCRIPT KILL"),
    ("CROSSSLOT", "is a Redis Cluster", "use a single primary: the journal's script touches many keys"),
    ("MOVED", "is a Redis Cluster", "use a single primary: the journal's script touches many keys"),
    ("max number of clients", "has too many clients", "raise its maxclients, or start fewer workers and clients"),
    ("unknown command", "does not know a command", "use Redis >= 6.2 or Valkey"),
)

#: For what is not known by its words: redis-py takes off the code of the errors that it knows (before 8.0 without leaving it anywhere).
_BY_CLASS: tuple[tuple[type[Exception], str, str], ...] = (
    (exceptions.AuthenticationError, "refuses the login", "correct user and password in the URL"),
    (exceptions.AuthorizationError, "refuses the login", "correct user and password in the URL"),
    (exceptions.BusyLoadingError, "is still loading its data", "wait a little and submit again"),
    (exceptions.OutOfMemoryError, "has no memory left", "raise its maxmemory (with maxmemory-policy noeviction), or purge old ops"),
    (exceptions.ReadOnlyError, "is a replica and cannot be written", "name the primary in the URL"),
    (exceptions.NoPermissionError, "forbids a command to this user", "allow EVALSHA, EVAL and XREAD on the namespace's keys"),
    (exceptions.MaxConnectionsError, "is not reached: this process has no free connection", "raise max_connections"),
    (exceptions.TimeoutError, "does not answer in time", "check that it runs and is reachable, then submit again with the same op id"),
    (
        exceptions.ConnectionError,
        "cannot be reached",
        "check that it runs and the URL is right, then submit again with the same op id",
    ),
    (exceptions.RedisError, "answered with an error", "look into its log"),
)


def server_name(redis: Redis) -> str:
    """The URL of the server without user and password."""
    options: dict[str, Any] = redis.connection_pool.connection_kwargs
    if path := options.get("path"):
        return f"unix://{path}"
    scheme = "rediss" if "SSL" in redis.connection_pool.connection_class.__name__ else "redis"
    return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db') or 0}"


def translate(error: exceptions.RedisError, server: str) -> QueueUnavailableError:
    """The error that our callers see. ``server`` is a URL without password."""
    text = f"{getattr(error, 'status_code', None) or ''} {error}"
    for marker, what, remedy in _BY_TEXT:
        if marker in text:
            return QueueUnavailableError(f"Redis at {server} {what} ({error}): {remedy}")
    what, remedy = next((what, remedy) for cls, what, remedy in _BY_CLASS if isinstance(error, cls))
    return QueueUnavailableError(f"Redis at {server} {what} ({error}): {remedy}")


@contextmanager
def translated(redis: Redis) -> Iterator[None]:
    """Turns what redis-py raises inside into :class:`QueueUnavailableError`."""
    try:
        yield
    except exceptions.RedisError as error:
        raise translate(error, server_name(redis)) from error
