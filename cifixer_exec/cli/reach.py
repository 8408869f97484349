"""Which stack a command works with: the one that was named, the one this user keeps running, one of its own, or none at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from cifixer_exec.backends.registry import check_backend
from cifixer_exec.cli import progress
from cifixer_exec.errors import QueueUnavailableError
from cifixer_exec.settings import AppConfig
from cifixer_exec.stack.embedded import EmbeddedStack
from cifixer_exec.stack.parts import python_directories
from cifixer_exec.stack.running import find_running
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import WorkerRecord
from cifixer_exec.wiring import make_journal

T = TypeVar("T")
NO_STACK = "no stack is known: start one with `cifixer-exec up`, or set CIFIXER_REDIS_URL (or --redis-url) to the Redis of one"


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What the command line (and CIFIXER_REDIS_URL) said."""

    redis_url: str | None = None
    direct: bool = False
    backend: str | None = None
    unsafe_no_isolation: bool = False

    def settings(self, **overrides: Any) -> AppConfig:
        """The environment's settings with the command line's on top.

        Raises:
            InvalidRequestError: an unknown backend, or a value that cannot work.
        """
        chosen: dict[str, Any] = {"execution_backend": self.backend} if self.backend else {}
        if self.unsafe_no_isolation:
            chosen["unsafe_no_isolation"] = True
        config = AppConfig.from_env(**{**chosen, **overrides})
        check_backend(config.execution_backend)
        return config


def known_config(reach: Reach) -> AppConfig | None:
    """How to reach what was named or is running; None if there is nothing. Contacts nobody."""
    config = reach.settings()
    if reach.direct or config.dispatch == "direct":
        hidden = config.execution_backend != "local" or config.unsafe_no_isolation
        shown = config.readonly_paths if hidden else tuple(dict.fromkeys((*config.readonly_paths, *python_directories())))
        return config.with_(dispatch="direct", readonly_paths=shown)  # this Python is there as it is with a stack of `up`
    running = find_running(config.state_dir)
    if reach.redis_url and (running is None or running.redis_url != reach.redis_url):
        return config.with_(redis_url=reach.redis_url)
    if running is None:
        return None
    shown = tuple(dict.fromkeys((*config.readonly_paths, *running.readonly_paths)))
    return reach.settings(
        execution_backend=reach.backend or running.backend,
        redis_url=running.redis_url,
        namespace=running.namespace,
        state_dir=running.state_dir,
        readonly_paths=() if config.unsafe_no_isolation else shown,
    )


def existing_stack(reach: Reach, *, with_worker: bool = True) -> AppConfig:
    """The configuration of a stack that answers (or of direct use).

    Raises:
        QueueUnavailableError: there is none, its Redis does not answer, or no worker serves the backend.
    """
    config = known_config(reach)
    if config is None:
        raise QueueUnavailableError(NO_STACK)
    if config.dispatch == "queue":
        check_workers(config, needed=with_worker)
    return config


@contextmanager
def stack_for_run(reach: Reach, *, quiet: bool = False) -> Iterator[AppConfig]:
    """As :func:`existing_stack`; if none is known, one of its own for the ``with`` block."""
    if known_config(reach) is not None:
        yield existing_stack(reach)
        return
    stack = EmbeddedStack(reach.settings())
    with progress.step("no stack is running: starting one for this command", quiet=quiet):
        stack.start()
    drain = False
    try:
        yield stack.config
        drain = True
    finally:
        left = stack.stop(drain=drain)
        if not left.nothing:
            progress.tell(f"the stack left something behind: {left}")


def check_workers(config: AppConfig, *, needed: bool = True) -> list[WorkerRecord]:
    """The workers that hold a lease, asked of Redis right now.

    Raises:
        QueueUnavailableError: Redis does not answer, or (``needed``) no worker serves the configured backend.
    """
    workers = ask(config, lambda journal: journal.workers())
    if needed and not any(w.info.get("backend") == config.execution_backend for w in workers):
        raise QueueUnavailableError(
            f"no worker serves backend {config.execution_backend!r} in namespace {config.namespace!r} of this Redis: "
            "start one with `cifixer-exec worker`"
        )
    return workers


def ask(config: AppConfig, question: Callable[[Journal], Awaitable[T]]) -> T:
    """One question to the journal, on an event loop of its own."""

    async def asking() -> T:
        journal = make_journal(config)
        try:
            return await question(journal)
        finally:
            await journal.redis.aclose()

    return asyncio.run(asking())
