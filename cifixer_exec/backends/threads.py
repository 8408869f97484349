"""Threads for the blocking verbs of backends.

An event loop's own threads are few (six on two cores) and also look up host names, so a platform that does not answer for a minute would
keep everything waiting. Sandboxes are made in threads apart, because that may take as long as a pull: nobody else shall wait for it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from itertools import islice
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MOST_CREATIONS = 32
MOST_CALLS = 128


async def creating(create: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``create``'s result; it goes on to its end even when the caller is cancelled."""
    return await _run(_threads(os.getpid(), "create", MOST_CREATIONS), lambda: create(*args, **kwargs))


async def asking(verb: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of any other verb; it goes on as well."""
    return await _run(_threads(os.getpid(), "ask", MOST_CALLS), lambda: verb(*args, **kwargs))


async def batches(listing: Callable[[], Iterable[T]], size: int = 500) -> AsyncIterator[list[T]]:
    """What ``listing`` gives, some at a time: it may ask its platform for each, and so goes on in threads."""
    items = iter(await asking(listing))
    while batch := await asking(lambda: list(islice(items, size))):
        yield batch


async def _run(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    context = copy_context()  # as asyncio.to_thread does
    return await asyncio.get_running_loop().run_in_executor(threads, context.run, work)


@cache
def _threads(_pid: int, name: str, most: int) -> ThreadPoolExecutor:
    """Started one by one as they are needed; a forked child has none of its parent's."""
    return ThreadPoolExecutor(most, f"cifixer-{name}")
