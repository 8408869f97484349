"""How another program of the same user finds the stack that ``cifixer-exec up`` keeps: a small file in the state directory."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cifixer_exec.backends.local.processes import start_time_of
from cifixer_exec.settings import AppConfig

_FILE = "up.json"


@dataclass(frozen=True, kw_only=True)
class RunningStack:
    """What a client must know of it. ``pid`` and ``start_time`` tell whether it still runs: pids are used again."""

    backend: str
    redis_url: str
    namespace: str
    state_dir: str
    readonly_paths: tuple[str, ...]
    pid: int
    start_time: int


def announce(stack: AppConfig, state_dir: Path) -> None:
    """Write down that this process keeps ``stack``. The newest one wins."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    running = RunningStack(
        backend=stack.execution_backend,
        redis_url=stack.redis_url,
        namespace=stack.namespace,
        state_dir=str(stack.state_dir),
        readonly_paths=stack.readonly_paths,
        pid=os.getpid(),
        start_time=start_time_of(os.getpid()) or 0,
    )
    new = state_dir / f".{_FILE}.{os.getpid()}"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)  # the URL may hold a password
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(running), file)
    os.rename(new, state_dir / _FILE)


def withdraw(state_dir: Path) -> None:
    """Remove what this process announced, and the directory if it holds nothing else."""
    running = _read(state_dir / _FILE)
    if running is not None and running.pid == os.getpid():
        (state_dir / _FILE).unlink(missing_ok=True)
        with suppress(OSError):
            state_dir.rmdir()


def find_running(state_dir: Path) -> RunningStack | None:
    """The stack that this user keeps running, None if there is none. A file that another user wrote is not believed.

    A file whose writer was killed is removed.
    """
    running = _read(state_dir / _FILE)
    if running is not None and start_time_of(running.pid) != running.start_time:
        with suppress(OSError):
            (state_dir / _FILE).unlink()
        return None
    return running


def _read(path: Path) -> RunningStack | None:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            data = json.load(file)
        return RunningStack(**{**data, "readonly_paths": tuple(data["readonly_paths"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
