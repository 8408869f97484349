"""The commands of the README with Jobs in a cluster, each in a process of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from cifixer_exec.settings import VARIABLES
from cifixer_exec.stack.leftovers import find_processes
from tests.acceptance.programs import Up, User, up, wait_until
from tests.support.contract_stack import check_daemon
from tests.support.kubernetes_cluster import cluster_settings, left_in_cluster

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]
Stack = tuple[User, Up]
NAMESPACE = f"cx{uuid4().hex[:8]}"


@contextmanager
def somebody() -> Iterator[User]:
    """A user with an empty home whose sandboxes are Jobs."""
    check_daemon("kubernetes")
    home = Path(tempfile.mkdtemp(prefix="cx-"))
    settings = cluster_settings()
    variables = {variable: str(settings[name]) for variable, (name, _) in VARIABLES.items() if settings.get(name)}
    try:
        yield User(home, {**variables, "CIFIXER_NAMESPACE": NAMESPACE})
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A running ``up``; nothing of it is in the cluster behind it."""
    with somebody() as user, up(user, "--backend", "kubernetes") as running:
        yield user, running
        code, said = running.stop()
        assert (code, left_in_cluster(running.exports["CIFIXER_NAMESPACE"])) == (0, []), said


def test_a_command_that_is_run_is_all_there_was(stack: Stack) -> None:
    user, running = stack
    (user.home / "project").mkdir()
    (user.home / "project/check.py").write_text("import sys; print(6 * 7); sys.exit(3)")

    done = user.cifixer("run", "--quiet", "--upload", user.home / "project", "--", "python3", "check.py")

    assert (done.returncode, done.stdout, done.stderr) == (3, b"42\n", b"")
    assert left_in_cluster(running.exports["CIFIXER_NAMESPACE"]) == []


def test_a_sandbox_from_its_creation_to_its_end(stack: Stack) -> None:
    user, _ = stack
    sandbox_id = user.cifixer("create").stdout.decode().strip()
    (user.home / "data.bin").write_bytes(bytes(range(256)) * 9000)

    there = user.cifixer("cp", user.home / "data.bin", f"{sandbox_id}:data.bin")
    started = user.cifixer("exec", "--detach", sandbox_id, "--", "sh", "-c", "wc -c < data.bin; exit 4")
    followed = user.cifixer("logs", "--follow", sandbox_id, started.stdout.decode().strip())
    listed = {row["id"]: row for row in json.loads(user.cifixer("ls", "--json").stdout)}
    removed = user.cifixer("rm", sandbox_id)

    assert (there.returncode, followed.stdout.strip()) == (0, b"2304000"), there.stderr
    assert (listed[sandbox_id]["state"], listed[sandbox_id]["backend"]) == ("ready", "kubernetes")
    assert (removed.returncode, removed.stdout.decode().split()) == (0, [sandbox_id])


def test_doctor_finds_the_cluster_and_says_what_could_be_better(stack: Stack) -> None:
    user, _ = stack
    doctor = user.cifixer("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(doctor.stdout)}
    assert (doctor.returncode, found["backend kubernetes"]["ok"], "worker" in found) == (0, True, True), doctor.stdout.decode()
    assert "CIFIXER_KUBERNETES_NETWORK_POLICIES" in found["network policies"]["remedy"]


def test_a_direct_run_needs_no_stack(stack: Stack) -> None:
    user, _ = stack
    direct = user.cifixer("run", "--direct", "--backend", "kubernetes", "-i", "--", "cat", stdin=b"\xfe" * 300_000)
    assert (direct.returncode, direct.stdout) == (0, b"\xfe" * 300_000)


def test_a_stack_that_is_killed_leaves_nothing_in_the_cluster() -> None:
    with somebody() as user, up(user, "--backend", "kubernetes") as running:
        assert user.cifixer("create").returncode == 0
        running.process.kill()
        wait_until(lambda: not find_processes(running.directory) and not running.directory.exists(), 40)
        assert left_in_cluster(running.exports["CIFIXER_NAMESPACE"]) == []
