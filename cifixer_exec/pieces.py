"""Pieces of files: several on their way at once, and one of an op's size in several requests of the runner's size."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from cifixer_exec.channel.frames import Answer
from cifixer_exec.errors import BackendError
from cifixer_exec.model import MAX_BODY_BYTES

T = TypeVar("T")
#: ``(arguments, body, request id)`` of one verb → the runner's answer.
Request = Callable[[Mapping[str, Any], bytes | memoryview, str], Coroutine[Any, Any, Answer]]

#: Requests of one op under way.
REQUESTS_AT_ONCE = 2


async def in_order(calls: AsyncGenerator[Coroutine[Any, Any, T], None], most: int) -> AsyncGenerator[T, None]:
    """The answers of ``calls`` in their order, with up to ``most`` under way at once.

    When one fails those behind it are waited for, because they may do something; when the iteration is given up they are cancelled.
    """
    waiting: deque[asyncio.Task[T]] = deque()
    try:
        async for coroutine in calls:
            waiting.append(asyncio.create_task(coroutine))
            if len(waiting) >= most:
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    except Exception:
        await asyncio.gather(*waiting, return_exceptions=True)
        raise
    finally:
        await calls.aclose()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def all_of(calls: AsyncGenerator[Coroutine[Any, Any, T], None], most: int) -> None:
    """As :func:`in_order`, for answers that nobody needs."""
    async with aclosing(in_order(calls, most)) as answers:
        async for _ in answers:
            pass


def whole_number(answer: Answer, name: str) -> int:
    """A member of an answer that must be 0 or more: it comes from a sandbox, which may say anything.

    Raises:
        BackendError: it is missing or something else.
    """
    value = answer.document.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise BackendError(f"the sandbox's runner answered with {name}={str(value)[:40]}, which cannot be: it has been tampered with")
    return value


async def write_piece(request: Request, arguments: Mapping[str, Any], body: bytes, request_id: str) -> Answer:
    """The verb ``write`` with a body of any size. What commits goes last, when all else is there.

    Each request has an id of its own that follows from ``request_id``, so a repetition of the whole does nothing twice.
    """
    view, offset = memoryview(body), int(arguments["offset"])
    starts = range(0, len(body), MAX_BODY_BYTES)
    last = starts[-1] if starts else 0

    async def before_last() -> AsyncGenerator[Coroutine[Any, Any, Answer], None]:
        for start in starts[:-1]:
            part = {**arguments, "offset": offset + start, "commit": None}
            yield request(part, view[start : start + MAX_BODY_BYTES], _part_id(request_id, start))

    await all_of(before_last(), REQUESTS_AT_ONCE)
    return await request({**arguments, "offset": offset + last}, view[last:] if last else body, _part_id(request_id, last))


async def read_piece(request: Request, arguments: Mapping[str, Any], request_id: str) -> Answer:
    """The verb ``read`` with a length of any size: the first answer's document, and all that was asked for or is there.

    Raises:
        BackendError: the runner's answers cannot be.
    """
    offset, length = int(arguments["offset"]), int(arguments["length"])
    first = await request({**arguments, "length": min(length, MAX_BODY_BYTES)}, b"", request_id)
    if length <= MAX_BODY_BYTES:
        return first
    there = min(length, whole_number(first, "size") - offset)

    async def following() -> AsyncGenerator[Coroutine[Any, Any, Answer], None]:
        for start in range(MAX_BODY_BYTES, there, MAX_BODY_BYTES):
            part = {"offset": offset + start, "length": min(MAX_BODY_BYTES, there - start), "etag": first.document.get("etag")}
            yield request({**arguments, **part}, b"", _part_id(request_id, start))

    bodies = [first.body]
    async with aclosing(in_order(following(), REQUESTS_AT_ONCE)) as answers:
        bodies += [answer.body async for answer in answers]
    return Answer(first.document, b"".join(bodies))


def _part_id(request_id: str, start: int) -> str:
    return f"{request_id}:{start}" if start else request_id
