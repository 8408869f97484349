"""The process that starts, watches and stops the parts of a stack: ``python -m cifixer_exec.stack.keeper``.

Why a process of its own: the user's program may be killed with -9, may have threads, and is in the terminal's process group.

* It is in a session of its own, as are thus the parts: Ctrl-C in a terminal reaches only the user's program.
* Its standard input is a pipe from the user's program. End of file there means that the program is gone, however it ended, and
  leads to the same orderly stop as a request: a parent-death signal to each part could not drain, nor end detached sandboxes.
* The parts get PR_SET_PDEATHSIG, so they die when the *keeper* is killed. That is set between fork and exec, which is safe here:
  the keeper has one thread. (The signal follows the thread that forked, so in the user's program it would fire at the wrong time.)

It is told what to do by one JSON line (:class:`Order`) and then ``stop`` (drain first) or ``now``. It answers in JSON lines:
``ready``, ``failed``, ``died`` (a part ended by itself), ``stopped``.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cifixer_exec.errors import ExecutorError, QueueUnavailableError, error_to_json
from cifixer_exec.settings import AppConfig
from cifixer_exec.stack import parts
from cifixer_exec.stack.cleanup import purge_keys, remove_sandboxes
from cifixer_exec.stack.parts import Part
from cifixer_exec.wiring import make_journal

log = logging.getLogger("cifixer_exec.stack.keeper")
_PR_SET_PDEATHSIG = 1  # prctl(2)
_POLL_S = 0.05
_WATCH_S = 0.5
_TAIL_BYTES = 2000
#: What a part may take to end after SIGTERM, beyond the worker's drain.
GRACE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to keep. ``redis_binary`` '': the Redis of the configuration is somebody else's. ``flower_port`` 0: no Flower."""

    directory: str
    redis_binary: str
    flower_port: int
    flower_password: str
    flower_cookie_secret: str
    loglevel: str
    start_timeout_s: float

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


class _StopRequested(Exception):  # noqa: N818  # no error
    """Whoever started us wants the end, or is gone."""


class Keeper:
    """The parts of one stack, in this process's care."""

    def __init__(self, order: Order, config: AppConfig) -> None:
        self._order = order
        self._config = config
        self._directory = Path(order.directory)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._parent = os.getppid()
        self._stop = False
        self._hurry = False
        self._open = True

    def start(self) -> None:
        """Start all parts; returns when the worker holds its lease.

        Raises:
            QueueUnavailableError: a part ended or took too long; the message has the end of its log.
        """
        order = self._order
        if order.redis_binary:
            self._spawn(parts.redis(Path(order.redis_binary), self._directory))
            self._until("Redis answers", "redis", self._redis_answers)
        else:
            self._lease_holders()  # raises if the Redis that was given is not there
        self._spawn(parts.worker(order.loglevel))
        self._spawn(parts.beat(order.loglevel))
        if order.flower_port:
            self._spawn(parts.flower(order.flower_port, order.flower_password, order.flower_cookie_secret))
        self._until("the worker holds its lease", "worker", self._worker_lives)
        if order.flower_port:
            self._until("Flower listens", "flower", self._flower_listens)

    def watch(self) -> None:
        """Wait for the request to stop; tell when a part ends by itself, once each."""
        told: set[str] = set()
        while not self._stop_requested(_WATCH_S):
            for name, child in self._children.items():
                if child.poll() is not None and name not in told:
                    told.add(name)
                    tell("died", message=self._obituary(name))

    def stop(self) -> dict[str, Any]:
        """Beat, worker (drained), sandboxes, Flower, Redis: each only when what needs it is gone. Returns what was counted."""
        self._end("beat")
        self._end("worker", self._config.drain_s)
        sandboxes: tuple[str, ...] = ()
        keys: int | None = None
        try:
            sandboxes = remove_sandboxes(self._config, own_redis=bool(self._order.redis_binary))
        except ExecutorError as error:
            log.warning("sandboxes may be left: %s", error)
        self._end("flower")
        if self._order.redis_binary and "redis" in self._children:
            with suppress(ExecutorError):
                keys = purge_keys(self._config)
        self._end("redis")
        return {"sandboxes": sandboxes, "keys": keys}

    def _spawn(self, part: Part) -> None:
        with open(self._log(part.name), "wb") as out:
            self._children[part.name] = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env={**os.environ, **part.variables},
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509  # one thread: see the module
            )

    def _until(self, what: str, name: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._order.start_timeout_s
        while not condition():
            if (dead := next((n for n, c in self._children.items() if c.poll() is not None), None)) is not None:
                raise QueueUnavailableError(self._obituary(dead))
            if time.monotonic() > deadline:
                raise QueueUnavailableError(f"{what}: not within {self._order.start_timeout_s:.0f} s{self._said(name)}")
            if self._stop_requested(_POLL_S):
                raise _StopRequested

    def _stop_requested(self, wait_s: float) -> bool:
        """Look for a request for up to ``wait_s``. A fork in the user's program may hold our pipe open: hence the look at the parent."""
        if self._open and select.select([0], [], [], wait_s)[0]:
            words = os.read(0, 4096)
            self._open = bool(words)
            self._hurry = self._hurry or b"now" in words
            self._stop = True
        elif not self._open:
            time.sleep(wait_s)
        self._stop = self._stop or os.getppid() != self._parent
        return self._stop

    def request_stop(self, *_: Any) -> None:
        """For signals."""
        self._stop = True

    def _end(self, name: str, patience_s: float = 0.0) -> None:
        child = self._children.get(name)
        if child is None or child.poll() is not None:
            return
        child.terminate()
        deadline = time.monotonic() + patience_s + GRACE_S
        while child.poll() is None and time.monotonic() < deadline and not self._hurry:
            self._stop_requested(_POLL_S)
        if child.poll() is None:
            log.warning("%s did not end in time: killed", name)
            child.kill()
        child.wait()

    def _redis_answers(self) -> bool:
        try:
            self._lease_holders()
        except QueueUnavailableError:
            return False
        return True

    def _worker_lives(self) -> bool:
        return self._children["worker"].pid in self._lease_holders()

    def _lease_holders(self) -> set[int]:
        async def workers() -> set[int]:
            journal = make_journal(self._config)
            try:
                return {int(w.info.get("pid", 0)) for w in await journal.workers()}
            finally:
                await journal.redis.aclose()

        return asyncio.run(workers())

    def _flower_listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._order.flower_port), timeout=1):
            return True
        return False

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _obituary(self, name: str) -> str:
        code = self._children[name].returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{name} {how}{self._said(name)}"

    def _said(self, name: str) -> str:
        with suppress(OSError):
            if text := self._log(name).read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace").strip():
                return f": {text.splitlines()[-1]}\nthe end of its log:\n{text}"
        return " and said nothing"


def tell(event: str, **values: Any) -> None:
    """One line to whoever started us, if it is still there."""
    with suppress(BrokenPipeError):
        os.write(1, json.dumps({"event": event, **values}).encode() + b"\n")


def _die_with(keeper: int) -> Callable[[], None]:
    """What a child does between fork and exec. The library is loaded before: there only the call itself happens."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(1)  # it died before the line above

    return prepare


def main() -> None:
    """Keep a stack until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with open(0, "rb", buffering=0, closefd=False) as told:
        line = told.readline()
    if not line:
        return
    order = Order(**json.loads(line))
    keeper = Keeper(order, AppConfig.from_env())
    signal.signal(signal.SIGTERM, keeper.request_stop)
    counted: dict[str, Any] = {}
    try:
        keeper.start()
        tell("ready")
        keeper.watch()
    except _StopRequested:
        pass
    except ExecutorError as error:
        tell("failed", **error_to_json(error))
    finally:
        try:
            counted = keeper.stop()
        finally:
            shutil.rmtree(order.directory, ignore_errors=True)
            tell("stopped", **counted)


if __name__ == "__main__":
    main()
