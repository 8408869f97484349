"""One event loop per process, in a thread of its own, behind calls that any thread may make.

Sockets to sandboxes and Redis belong to that loop, so nothing is shared between threads.
The loop is made on first use and forgotten in a forked child (a loop does not survive a fork).
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
_END = object()


class _Work(Generic[T]):
    """A coroutine on a loop in another thread, for one who waits and may be interrupted at any instruction.

    A concurrent.futures.Future is none for that: an interrupt between the taking of its lock and the block that gives it back leaves
    it taken, and then the loop waits for it. Here locks are taken within one C call only
    (https://docs.python.org/3/library/queue.html, SimpleQueue).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> None:
        self._loop = loop
        self._coroutine = coroutine
        self._task: asyncio.Task[None] | None = None
        self._ends: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()
        loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            self._ends.put((await self._coroutine, None))
        except BaseException as error:  # noqa: BLE001  # it is raised by who waits
            self._ends.put((None, error))

    def result(self) -> T:
        """Wait for the end; what the coroutine raised is raised. Raises concurrent.futures.CancelledError when it was cancelled."""
        value, error = self._ends.get()
        try:
            if isinstance(error, asyncio.CancelledError):
                raise CancelledError from error
            if error is not None:
                raise error
            return cast(T, value)
        finally:
            del error  # else this frame and the exception would keep each other, and what hangs on them

    def cancel(self) -> None:
        """Behind :meth:`_begin`, which the loop does first."""
        with suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class Portal:
    """Runs coroutines on a background event loop for callers that have none."""

    def __init__(self, name: str = "cifixer-loop") -> None:
        self.loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    @property
    def alive(self) -> bool:
        """False in a forked child (which has the objects and not the thread) and once the process is exiting."""
        return self._pid == os.getpid() and self._thread.is_alive() and not self.loop.is_closed()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``coroutine`` on the loop; the future can be cancelled."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` to its end and return its result. An interrupted caller (Ctrl-C) cancels it.

        Raises:
            RuntimeError: called from the loop's own thread, which would wait for itself; or the loop is not :attr:`alive`.
        """
        if not self.alive:
            coroutine.close()
            raise RuntimeError(
                "the event loop of this object is not in this process: it was made before a fork, or the process is exiting; "
                "in a forked child take the sandbox up with attach(sandbox_id)"
            )
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("this call blocks, and was made on the event loop it would wait for: use the async API there")
        work = _Work(self.loop, coroutine)
        try:
            return work.result()
        except BaseException:
            work.cancel()
            raise

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """The items of ``source``, one by one, in the caller's thread; ``source`` is closed when the caller stops."""

        busy: asyncio.Task[Any] | None = None

        async def following() -> Any:
            nonlocal busy
            busy = asyncio.current_task()
            return await anext(source, _END)

        async def close() -> None:
            # The caller may have been interrupted anywhere, also before it could cancel; a running generator cannot be closed.
            while busy is not None and not busy.done():
                busy.cancel()
                await asyncio.wait([busy], timeout=1.0)
            aclose = getattr(source, "aclose", None)
            if aclose is not None:
                await aclose()

        try:
            while (item := self.call(following())) is not _END:
                yield item
        finally:
            if self.alive:
                self.call(close())

    def stop(self) -> None:
        """End the loop and its thread; what still runs is cancelled."""
        if not self.alive:
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result(timeout=5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)
        self.loop.close()


async def _cancel_all() -> None:
    tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


_lock = threading.Lock()
_portals: dict[int, Portal] = {}


def process_portal() -> Portal:
    """The portal of this process, made on first use."""
    with _lock:
        pid = os.getpid()
        if pid not in _portals:
            _portals.clear()
            _portals[pid] = Portal()
            # Else a daemon thread is frozen at exit, and whoever still waits for it hangs the interpreter.
            atexit.register(_portals[pid].stop)
        return _portals[pid]


def _after_fork() -> None:
    global _lock  # noqa: PLW0603  # the parent's lock may be held by a thread that the child does not have
    _lock = threading.Lock()
    _portals.clear()


os.register_at_fork(after_in_child=_after_fork)
