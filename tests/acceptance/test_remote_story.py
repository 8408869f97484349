"""The commands of the README with sandboxes that are elsewhere, as Jobs in a cluster and microVMs, each in a process of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.settings import VARIABLES
from cifixer_exec.stack.leftovers import find_processes
from tests.acceptance.programs import Up, User, up, wait_until
from tests.support.contract_stack import check_daemon, on_backend
from tests.support.e2b_service import left_in_service
from tests.support.kubernetes_cluster import left_in_cluster

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]
Stack = tuple[User, Up]
NAMESPACE = f"cx{uuid4().hex[:8]}"
LEFT = {"kubernetes": left_in_cluster, "e2b": left_in_service}
#: What doctor finds that could be better, and how.
REMEDIES = {"kubernetes": ("network policies", "CIFIXER_KUBERNETES_NETWORK_POLICIES")}


@pytest.fixture(scope="module", params=sorted(LEFT))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def somebody(backend: str) -> Iterator[User]:
    """A user with an empty home whose sandboxes are there."""
    check_daemon(backend)
    home = Path(tempfile.mkdtemp(prefix="cx-"))
    config = on_backend(backend, AppConfig())
    names = [name for name, _ in VARIABLES.values() if name.startswith(f"{backend}_") or name == "image"]
    changed = config.with_(**{f: getattr(AppConfig(), f) for f in vars(config) if f not in names}).to_env()
    try:
        yield User(home, {**changed, "CIFIXER_NAMESPACE": NAMESPACE})
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def stack(backend: str) -> Iterator[Stack]:
    """A running ``up``; nothing of it is left behind it."""
    with somebody(backend) as user, up(user, "--backend", backend) as running:
        yield user, running
        code, said = running.stop()
        assert (code, LEFT[backend](running.exports["CIFIXER_NAMESPACE"])) == (0, []), said


def test_a_command_that_is_run_is_all_there_was(stack: Stack, backend: str) -> None:
    user, running = stack
    (user.home / "project").mkdir()
    (user.home / "project/check.py").write_text("import sys; print(6 * 7); sys.exit(3)")

    done = user.cifixer("run", "--quiet", "--upload", user.home / "project", "--", "python3", "check.py")

    assert (done.returncode, done.stdout, done.stderr) == (3, b"42\n", b"")
    assert LEFT[backend](running.exports["CIFIXER_NAMESPACE"]) == []


def test_a_sandbox_from_its_creation_to_its_end(stack: Stack, backend: str) -> None:
    user, _ = stack
    sandbox_id = user.cifixer("create").stdout.decode().strip()
    (user.home / "data.bin").write_bytes(bytes(range(256)) * 9000)

    there = user.cifixer("cp", user.home / "data.bin", f"{sandbox_id}:data.bin")
    started = user.cifixer("exec", "--detach", sandbox_id, "--", "sh", "-c", "wc -c < data.bin; exit 4")
    followed = user.cifixer("logs", "--follow", sandbox_id, started.stdout.decode().strip())
    listed = {row["id"]: row for row in json.loads(user.cifixer("ls", "--json").stdout)}
    removed = user.cifixer("rm", sandbox_id)

    assert (there.returncode, followed.stdout.strip()) == (0, b"2304000"), there.stderr
    assert (listed[sandbox_id]["state"], listed[sandbox_id]["backend"]) == ("ready", backend)
    assert (removed.returncode, removed.stdout.decode().split()) == (0, [sandbox_id])


def test_doctor_finds_the_platform_and_says_what_could_be_better(stack: Stack, backend: str) -> None:
    user, _ = stack
    doctor = user.cifixer("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(doctor.stdout)}
    assert (doctor.returncode, found[f"backend {backend}"]["ok"], "worker" in found) == (0, True, True), doctor.stdout.decode()
    for name, remedy in [REMEDIES[backend]] if backend in REMEDIES else []:
        assert remedy in found[name]["remedy"]


def test_a_direct_run_needs_no_stack(stack: Stack, backend: str) -> None:
    user, _ = stack
    direct = user.cifixer("run", "--direct", "--backend", backend, "-i", "--", "cat", stdin=b"\xfe" * 300_000)
    assert (direct.returncode, direct.stdout) == (0, b"\xfe" * 300_000)


def test_a_stack_that_is_killed_leaves_nothing(backend: str) -> None:
    with somebody(backend) as user, up(user, "--backend", backend) as running:
        assert user.cifixer("create").returncode == 0
        running.process.kill()
        wait_until(lambda: not find_processes(running.directory) and not running.directory.exists(), 40)
        assert LEFT[backend](running.exports["CIFIXER_NAMESPACE"]) == []
