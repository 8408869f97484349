"""Running our programs as a user does: in processes of their own, with nothing of the test's environment, each with a bound."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cifixer_exec.stack.leftovers import find_processes

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 90.0


@dataclass
class User:
    """A user with a home of their own: temporary files and state lie below ``home``, so that what is left can be seen."""

    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def temporary(self) -> Path:
        """Where stacks put their directories."""
        return self.home / "tmp"

    def environment(self) -> dict[str, str]:
        """Of every program that the user starts."""
        self.temporary.mkdir(exist_ok=True)
        passed = {k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")}
        own = {"TMPDIR": str(self.temporary), "CIFIXER_STATE_DIR": str(self.home / "state")}
        return {**passed, **own, **self.variables}

    def python(self, *arguments: str | Path, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[bytes]:
        """Run this Python to its end."""
        return self._run([sys.executable, *map(str, arguments)], b"", limit_s)

    def cifixer(self, *arguments: str | Path, stdin: bytes = b"", limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[bytes]:
        """Run ``cifixer-exec`` to its end."""
        return self._run([*self.command(), *map(str, arguments)], stdin, limit_s)

    def command(self) -> list[str]:
        """``cifixer-exec`` of this checkout."""
        return [sys.executable, "-c", "from cifixer_exec.cli import main; main()"]

    def _run(self, command: list[str], stdin: bytes, limit_s: float) -> subprocess.CompletedProcess[bytes]:
        environment = self.environment()
        return subprocess.run(command, input=stdin, capture_output=True, env=environment, cwd=self.home, timeout=limit_s, check=False)

    def left(self) -> list[str]:
        """Directories below ``tmp``."""
        return sorted(p.name for p in self.temporary.iterdir())


@dataclass
class Up:
    """A running ``cifixer-exec up``."""

    process: subprocess.Popen[bytes]
    directory: Path
    exports: dict[str, str]
    told: str

    def stop(self, number: int = signal.SIGINT, limit_s: float = 60.0) -> tuple[int, str]:
        """Send a signal; the exit code and what it said on stderr."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=limit_s)
        return self.process.returncode, said.decode()


@contextmanager
def up(user: User, *options: str) -> Iterator[Up]:
    """``cifixer-exec up`` for the block; killed at its end if the test did not stop it, and its keeper awaited."""
    process = subprocess.Popen(
        [*user.command(), "up", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=user.environment(), cwd=user.home, bufsize=0
    )
    directory = None
    try:
        assert process.stdout is not None
        last = b"READONLY_PATHS" if "local" in options or "--backend" not in options else b"NAMESPACE"  # of what it tells to export
        told = read_until(process.stdout.fileno(), last + b"=[^\n]*\n", LIMIT_S).decode()
        exports = dict(re.findall(r"^export (\w+)=(.*)$", told, re.MULTILINE))
        directory = Path(exports["CIFIXER_REDIS_URL"].removeprefix("unix://")).parent
        yield Up(process, directory, exports, told)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        if directory is not None:
            wait_until(lambda: not find_processes(directory), 60)


def read_until(descriptor: int, pattern: bytes, limit_s: float) -> bytes:
    """What comes from a pipe up to where ``pattern`` is in it."""
    os.set_blocking(descriptor, False)
    said, deadline = b"", time.monotonic() + limit_s
    while not re.search(pattern, said):
        assert time.monotonic() < deadline, f"{pattern!r} did not come; this did: {said!r}"
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            time.sleep(0.02)
            continue
        assert data, f"ended without {pattern!r}; said: {said!r}"
        said += data
    os.set_blocking(descriptor, True)
    return said


def wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    """Fails the test if it does not come true in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.05)
