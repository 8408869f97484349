"""Direct use of the E2B stand-in: an account per test, what is in its machines, and what the SDK says to them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.backends.e2b import E2BBackend
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.model import SandboxHandle, SandboxSpec
from tests.support.e2b_service import KNOBS, NoServiceError, is_real, service, settings_on
from tests.support.kubernetes.waiting import until

Json = dict[str, Any]


@contextmanager
def account_of(namespace: str) -> Iterator[AppConfig]:
    """A team of its own, with a key that no other test has. Nothing of it may be left at the end; faults and knobs end with it."""
    if is_real():
        pytest.skip("the real service takes no orders")
    try:
        found = service()
    except NoServiceError as error:
        pytest.skip(str(error))
    found.order("forget")
    config = AppConfig(execution_backend="e2b", dispatch="direct", namespace=namespace, **settings_on(found))
    try:
        yield config.with_(e2b_api_key=found.key(namespace))
    finally:
        found.order("clear_faults")
        found.order("reset")
        found.set(**KNOBS)
        found.order("thaw")
        clean = backend_of(config, e2b_api_key=found.key(namespace))  # with a breaker of its own
        for owned in clean.list_owned():
            clean.destroy(owned.handle)
    until(lambda: not machines_of(namespace))


def backend_of(config: AppConfig, **settings: Any) -> E2BBackend:
    backend = make_backend(config.with_(**settings))
    assert isinstance(backend, E2BBackend)
    return backend


def spec_of(sandbox_id: str = "one", **members: Any) -> SandboxSpec:
    return SandboxSpec(**{"backend": "e2b", "sandbox_id": sandbox_id, **members})


def machines_of(team: str) -> list[Json]:
    """What the service has of an account, as it sees it."""
    return [found for found in service().order("sandboxes") if found["team"] == team]


def machine_of(handle: SandboxHandle) -> str:
    return str(handle.data["e2b_id"])


def processes_in(e2b_id: str, word: str) -> list[int]:
    """On this machine, of those that were started as our runner with ``word`` as what it shall do."""
    found = []
    for pid in service().order("pids", sandbox=e2b_id):
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if len(line) > 1 and line[1] == word.encode():
                found.append(int(pid))
    return found


@contextmanager
def overheard(url: str) -> Iterator[tuple[str, bytearray]]:
    """Another address of a server, and all that clients send to that during the ``with`` block."""
    target, said = urlsplit(url), bytearray()
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = [listener]

    def copy(source: socket.socket, to: socket.socket, heard: bytearray | None) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if heard is not None:
                    heard += data
                to.sendall(data)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((target.hostname, target.port))
                sockets.extend((client, server))
                for arguments in ((client, server, said), (server, client, None)):
                    threading.Thread(target=copy, args=arguments, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", said
    finally:
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
