"""The proxy does to connections what its faults say, and nothing else: a fault that does not strike would prove nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tests.support.redis_proxy import Port, RedisProxy
from tests.support.redis_server import redis_server

Use = Callable[[RedisProxy, Port, Any], Awaitable[None]]


def through_a_proxy(use: Use) -> None:
    async def run(target: int) -> None:
        proxy = RedisProxy(target)
        port = proxy.port()
        client = Redis(host="127.0.0.1", port=port.number, socket_timeout=0.5, retry=Retry(NoBackoff(), 0))
        try:
            await use(proxy, port, client)
        finally:
            await client.aclose()
            await asyncio.to_thread(proxy.close)

    with redis_server() as server:
        asyncio.run(run(server.port))


def test_a_lost_reply_was_executed() -> None:
    async def use(proxy: RedisProxy, port: Port, client: Any) -> None:
        await client.set("n", 1)
        await proxy.do(port.reset_after_bytes, 0)
        with pytest.raises(RedisConnectionError):
            await client.incr("n")
        assert await client.get("n") == b"2"

    through_a_proxy(use)


def test_a_reset_ends_what_is_open_and_nothing_more() -> None:
    async def use(proxy: RedisProxy, port: Port, client: Any) -> None:
        await client.ping()
        await proxy.do(port.reset)
        with pytest.raises(RedisConnectionError):
            await client.ping()
        assert await client.ping()

    through_a_proxy(use)


def test_two_refusals_at_once_end_with_the_later_one() -> None:
    async def use(proxy: RedisProxy, port: Port, client: Any) -> None:
        both = [asyncio.create_task(proxy.do(port.refuse, seconds)) for seconds in (0.2, 0.4)]
        await asyncio.sleep(0.05)
        for refusal in both:
            with pytest.raises(RedisConnectionError, match="111"):
                await client.ping()
            await refusal
        assert await client.ping()

    through_a_proxy(use)


def test_a_stall_keeps_connections_and_passes_nothing() -> None:
    async def use(proxy: RedisProxy, port: Port, client: Any) -> None:
        await client.ping()
        stall = asyncio.create_task(proxy.do(port.stall, 0.8))
        await asyncio.sleep(0.05)
        with pytest.raises(RedisTimeoutError):
            await client.ping()
        await stall
        assert await client.ping()

    through_a_proxy(use)


def test_a_slow_line_delays_both_directions_in_order() -> None:
    async def use(proxy: RedisProxy, port: Port, client: Any) -> None:
        await client.ping()
        loop = asyncio.get_running_loop()
        slow = asyncio.create_task(proxy.do(port.slow, 0.1, 0.5))
        await asyncio.sleep(0.05)
        began = loop.time()
        async with client.pipeline(transaction=False) as pipe:
            for n in range(50):
                pipe.rpush("list", f"{n}" * 1000)
            await pipe.execute()
        assert loop.time() - began >= 0.2
        await slow
        assert await client.lrange("list", 0, -1) == [f"{n}".encode() * 1000 for n in range(50)]

    through_a_proxy(use)
