"""Ending what sandboxes a stack still has. Used when the worker has gone, so it asks the backend and not the queue."""

from __future__ import annotations

import asyncio
import logging

from redis.exceptions import RedisError

from cifixer_exec.backends.registry import make_backend
from cifixer_exec.errors import ExecutorError
from cifixer_exec.settings import AppConfig
from cifixer_exec.wiring import make_journal

log = logging.getLogger(__name__)


def remove_sandboxes(config: AppConfig, *, own_redis: bool) -> tuple[str, ...]:
    """Destroy the sandboxes of this stack and close their entries. Never raises for one that resists.

    Returns the ids of all that the stack ever had, as far as they are known.

    Which are its own: with the local backend all that its state directory holds; else, with a Redis of its own, all that is registered
    there. With a Redis that others share, sandboxes of other backends may be theirs: those stay.
    """
    registered = _registered(config)
    backend = make_backend(config)
    ours = [o for o in backend.list_owned() if backend.name == "local" or (own_redis and o.handle.sandbox_id in registered)]
    for owned in ours:
        sandbox_id = owned.handle.sandbox_id
        try:
            backend.destroy(owned.handle)
            _close(config, sandbox_id)
        except ExecutorError as error:
            log.warning("sandbox %s: %s", sandbox_id, error)
    known = registered if own_redis else frozenset()
    return tuple(sorted({*known, *(o.handle.sandbox_id for o in ours)}))


def purge_keys(config: AppConfig) -> int:
    """Remove the namespace from a Redis that is ours alone; returns how many keys, of whatever name, are in it then.

    Raises:
        QueueUnavailableError: Redis does not answer.
    """

    async def purge() -> int:
        journal = make_journal(config)
        try:
            await journal.purge()
            return int(await journal.redis.dbsize())
        finally:
            await journal.redis.aclose()

    return asyncio.run(purge())


def _registered(config: AppConfig) -> frozenset[str]:
    async def ask() -> frozenset[str]:  # ended ones too: their control groups must be gone
        journal = make_journal(config)
        try:
            prefix = journal.keys.sandbox("")
            keys = [key.decode() async for key in journal.redis.scan_iter(match=f"{prefix}*", count=1000)]
            return frozenset(key.removeprefix(prefix) for key in keys if key.count(":") == prefix.count(":"))
        finally:
            await journal.redis.aclose()

    try:
        return asyncio.run(ask())
    except (ExecutorError, OSError, RedisError) as error:
        log.warning("the registry cannot be read: %s", error)
        return frozenset()


def _close(config: AppConfig, sandbox_id: str) -> None:
    async def close() -> None:
        journal = make_journal(config)
        try:
            await journal.close(sandbox_id, state="closed", cause="its stack was stopped")
        finally:
            await journal.redis.aclose()

    asyncio.run(close())
