"""A client waits for a Redis that it has reached before, and is told at once of one that was never there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from cifixer_exec import AppConfig, create_async_sandbox
from cifixer_exec.errors import QueueUnavailableError
from cifixer_exec.store.connection import connect
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import End, NewOp, NewSandbox
from tests.support.redis_server import RedisServer, redis_server

PATIENCE_S = 20.0
CREATE = NewSandbox(backend="local", queue="pool", spec={}, lifetime_s=60)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as started:
        yield started


def create(name: str) -> NewOp:
    return NewOp(op_id=f"create-{name}", sandbox_id=name, kind="create", create=CREATE)


@asynccontextmanager
async def opened(server: RedisServer, namespace: str, patience_s: float = PATIENCE_S) -> AsyncIterator[Journal]:
    """A client's journal."""
    redis = connect(server.url)
    yield Journal(redis, namespace=namespace, patience_s=patience_s)
    await redis.aclose()


async def come_back(server: RedisServer) -> None:
    await asyncio.sleep(1.0)
    await asyncio.to_thread(server.start)


def test_every_call_of_a_client_outlives_a_restart(server: RedisServer, namespace: str) -> None:
    async def scene() -> None:
        async with opened(server, namespace) as journal:
            await journal.submit(create("first"))
            server.stop()
            coming = asyncio.create_task(come_back(server))
            submitting = journal.submit(create("second"))
            created, op, record, state = await asyncio.gather(
                submitting, journal.op("create-first"), journal.sandbox("first"), journal.cancel("create-first")
            )
            await coming
            assert created.created
            assert op is not None
            assert record is not None
            assert state == "cancelled"

    asyncio.run(scene())


def test_a_submit_with_its_answer_outlives_a_restart(server: RedisServer, namespace: str) -> None:
    async def scene() -> None:
        async with opened(server, namespace) as journal:
            await journal.submit(create("first"))
            server.stop()
            coming = asyncio.create_task(come_back(server))
            following = asyncio.create_task(_ends(journal, create("second")))
            await coming
            while await journal.op("create-second") is None:  # noqa: ASYNC110  # what it waits for is in Redis
                await asyncio.sleep(0.05)
            await journal.cancel("create-second")
            assert await following == ["cancelled"]

    asyncio.run(scene())


async def _ends(journal: Journal, op: NewOp) -> list[str]:
    return [item.state async for item in journal.submit_and_follow(op) if isinstance(item, End)]


def test_a_server_that_was_never_there_is_told_of_at_once(server: RedisServer, namespace: str) -> None:
    server.stop()

    async def scene() -> None:
        async with opened(server, namespace) as journal:
            before = time.monotonic()
            with pytest.raises(QueueUnavailableError, match="cannot be reached"):
                await journal.submit(create("first"))
            assert time.monotonic() - before < PATIENCE_S / 2

    asyncio.run(scene())


def test_patience_has_an_end(server: RedisServer, namespace: str) -> None:
    async def scene() -> None:
        async with opened(server, namespace, patience_s=0.5) as journal:
            await journal.submit(create("first"))
            server.stop()
            with pytest.raises(QueueUnavailableError, match="same op id"):
                await journal.submit(create("second"))

    asyncio.run(scene())


def test_who_has_a_result_does_not_wait_to_say_so(server: RedisServer, namespace: str) -> None:
    async def scene() -> None:
        async with opened(server, namespace) as journal:
            await journal.submit(create("first"))
            server.stop()
            before = time.monotonic()
            await journal.collected("create-first")
            await journal.drop("create-first")
            assert time.monotonic() - before < PATIENCE_S / 2

    asyncio.run(scene())


def test_a_creation_that_is_given_up_while_redis_is_away_is_given_up_soon(server: RedisServer, namespace: str) -> None:
    async def scene() -> None:
        sandbox = create_async_sandbox(AppConfig(redis_url=server.url, namespace=namespace, redis_patience_s=PATIENCE_S))
        making = asyncio.create_task(sandbox.init())
        await asyncio.sleep(0.5)
        server.stop()
        await asyncio.sleep(0.5)
        before = time.monotonic()
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert time.monotonic() - before < PATIENCE_S / 2
        await sandbox.close()

    asyncio.run(scene())
