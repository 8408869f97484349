"""The stack as its user's program sees it: start, a configuration to use it with, stop."""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cifixer_exec.errors import ExecutorError, InvalidRequestError, QueueUnavailableError, error_from_json
from cifixer_exec.settings import AppConfig
from cifixer_exec.stack import parts
from cifixer_exec.stack.cleanup import remove_sandboxes
from cifixer_exec.stack.keeper import GRACE_S, Order
from cifixer_exec.stack.leftovers import Leftovers, find_directories, find_processes

#: A socket's path has at most 107 bytes (unix(7)); this leaves room for the file's name.
_LONGEST_DIRECTORY = 90


class EmbeddedStack:
    """Redis, a worker, beat and (``flower_port``) Flower, in a private directory, for a ``with`` block or between start and stop.

    ``redis_url``: use that Redis instead of starting one; then nothing in it is purged at the end. :attr:`config` is what clients use.
    Whatever ends this process, the stack's own keeper process stops the parts and removes sandboxes and directory.
    """

    def __init__(
        self,
        config: AppConfig | None = None,
        *,
        redis_url: str | None = None,
        flower_port: int = 0,
        loglevel: str = "INFO",
        start_timeout_s: float = 40.0,
    ) -> None:
        self._base = AppConfig.from_env() if config is None else config
        self._redis_url = redis_url
        self._loglevel = loglevel
        self._start_timeout_s = start_timeout_s
        self._keeper: subprocess.Popen[bytes] | None = None
        self._said = b""
        self._config: AppConfig | None = None
        self._leftovers: Leftovers | None = None
        self.directory = Path()
        self.flower_port = flower_port
        self.flower_password = secrets.token_urlsafe(18) if flower_port else ""

    @property
    def config(self) -> AppConfig:
        """The configuration of this stack's clients.

        Raises:
            RuntimeError: it was not started.
        """
        if self._config is None:
            raise RuntimeError("the stack was not started: use it in a with block, or call start()")
        return self._config

    @property
    def redis_binary(self) -> Path | None:
        """The Redis program that is started, None when the Redis is somebody else's."""
        return None if self._redis_url else parts.find_redis()

    def start(self) -> None:
        """Start everything; returns when the worker holds its lease.

        Raises:
            QueueUnavailableError: a part did not come up; the message has the end of its log. Nothing is left of it.
            InvalidRequestError: the configuration cannot work.
        """
        binary = self.redis_binary
        if self.flower_port and not parts.is_free(self.flower_port):
            raise InvalidRequestError(f"Flower's port {self.flower_port} is in use on 127.0.0.1: choose another (--port-flower)")
        self.directory = _private_directory()
        try:
            self._config = self._derive()
            self._keeper = self._start_keeper(binary)
            event = self._next_event(self._start_timeout_s * 4)
            if event.get("event") == "failed":
                raise error_from_json(event)
            if event.get("event") != "ready":
                raise QueueUnavailableError(f"the stack did not start: its keeper ended: {self._keeper_log()}")
        except BaseException:
            self.stop()
            raise

    def wait(self, timeout_s: float | None = None) -> str | None:
        """Wait until a part ends by itself; returns its obituary, or None after ``timeout_s``."""
        try:
            event = self._next_event(timeout_s)
        except TimeoutError:
            return None
        return str(event.get("message", "the stack's keeper ended"))

    def stop(self, *, drain: bool = True) -> Leftovers:
        """Stop everything and say what is left. A second call only repeats the answer.

        ``drain``: running commands may end within ``config.drain_s`` first. Interrupted (Ctrl-C), it goes on without.
        """
        if self._leftovers is None:
            try:
                counted = self._stop_keeper(drain=drain)
            except KeyboardInterrupt:
                counted = self._stop_keeper(drain=False)
            self._leftovers = self._look(counted)
        return self._leftovers

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop(drain=kind is None)

    def _derive(self) -> AppConfig:
        """The base configuration, pointed at this stack. Local sandboxes see this Python, so that its pytest works in there."""
        base = self._base
        # A daemon is shared: to the reaper of another stack with another Redis, sandboxes of the same namespace would be orphans.
        shared = self._redis_url is not None or base.execution_backend == "local"
        shown = dict.fromkeys((*base.readonly_paths, *parts.python_directories()))
        return base.with_(
            dispatch="queue",
            namespace=base.namespace if shared else f"{base.namespace}-{self.directory.name.rpartition('-')[2]}",
            redis_url=self._redis_url or f"unix://{self.directory / 'redis.sock'}",
            state_dir=self.directory / "state",
            readonly_paths=tuple(shown) if base.execution_backend == "local" and not base.unsafe_no_isolation else base.readonly_paths,
        )

    def _start_keeper(self, binary: Path | None) -> subprocess.Popen[bytes]:
        order = Order(
            directory=str(self.directory),
            redis_binary=str(binary or ""),
            flower_port=self.flower_port,
            flower_password=self.flower_password,
            flower_cookie_secret=secrets.token_urlsafe(32),
            loglevel=self._loglevel,
            start_timeout_s=self._start_timeout_s,
        )
        variables = {parts.STACK_VARIABLE: self.directory.name}
        with open(self.directory / "keeper.log", "wb") as log:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "cifixer_exec.stack.keeper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.directory,
                env=parts.child_environment(self.config, **variables),
                start_new_session=True,
                bufsize=0,
            )
        assert keeper.stdin is not None
        keeper.stdin.write(order.to_json().encode() + b"\n")
        return keeper

    def _next_event(self, timeout_s: float | None) -> dict[str, Any]:
        """The keeper's next line; {} at its end. Raises TimeoutError."""
        keeper = self._keeper
        assert keeper is not None
        assert keeper.stdout is not None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._said:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([keeper.stdout], [], [], left)[0]:
                raise TimeoutError(f"the stack's keeper said nothing for {timeout_s} s")
            data = os.read(keeper.stdout.fileno(), 65536)
            if not data:
                return {}
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def _keeper_log(self) -> str:
        with suppress(OSError):
            return (self.directory / "keeper.log").read_text(errors="replace")[-1500:].strip() or "no log"
        return "no log"

    def _stop_keeper(self, *, drain: bool) -> dict[str, Any]:
        """Ask for the end and wait for it, within bounds; the keeper's last word, {} if it died without one."""
        keeper = self._keeper
        if keeper is None:
            return {}
        assert keeper.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; what it said last can still be read
            keeper.stdin.write(b"stop\n" if drain else b"now\n")
        bound_s = self._base.drain_s + 5 * GRACE_S
        try:
            while (event := self._next_event(bound_s)).get("event") not in ("stopped", None):
                pass
            keeper.wait(timeout=GRACE_S)
        except (TimeoutError, subprocess.TimeoutExpired):
            event = {}
            keeper.kill()  # the parts die with it
        keeper.wait()
        for pipe in (keeper.stdin, keeper.stdout):
            assert pipe is not None
            pipe.close()
        self._keeper = None
        return event

    def _look(self, counted: dict[str, Any]) -> Leftovers:
        if self.directory.name and self.directory.exists():  # the keeper did not come to its end
            if self._config is not None:
                with suppress(ExecutorError):
                    remove_sandboxes(self._config, own_redis=self._redis_url is None)
            shutil.rmtree(self.directory, ignore_errors=True)
        sandboxes = tuple(counted.get("sandboxes", ()))
        processes = find_processes(self.directory) if self.directory.name else ()
        return Leftovers(processes=processes, directories=find_directories(self.directory, sandboxes), keys=counted.get("keys"))


def _private_directory() -> Path:
    """A new directory for this user alone, with a name short enough for sockets."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="cifixer-", dir=base if len(base) < _LONGEST_DIRECTORY - 20 else "/tmp"))  # noqa: S108
