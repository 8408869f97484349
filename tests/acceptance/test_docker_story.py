"""The commands of the README with containers on a real daemon, each in a process of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from cifixer_exec.stack.leftovers import find_processes
from tests.acceptance.programs import Up, User, up, wait_until
from tests.support.contract_stack import check_daemon
from tests.support.docker_daemon import docker_host, image_for_tests, left_on_daemon

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]
Stack = tuple[User, Up]
NAMESPACE = f"cx{uuid4().hex[:8]}"
#: Orphans are reaped when they are older.
GRACE_S = 1.0


@contextmanager
def somebody() -> Iterator[User]:
    """A user with an empty home whose sandboxes are containers. Their namespaces are the same, as the default is."""
    check_daemon("docker_local")
    home = Path(tempfile.mkdtemp(prefix="cx-"))
    variables = {"CIFIXER_NAMESPACE": NAMESPACE, "CIFIXER_CREATION_GRACE_S": f"{GRACE_S}"}
    variables |= {"CIFIXER_DOCKER_HOST": docker_host(), "CIFIXER_IMAGE": image_for_tests(docker_host())}
    try:
        yield User(home, variables)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def docker_stack() -> Iterator[Stack]:
    """A running ``up``; nothing of it is on the daemon behind it."""
    with somebody() as user, up(user, "--backend", "docker_local") as running:
        yield user, running
        code, said = running.stop()
        assert (code, left_on_daemon(running.exports["CIFIXER_NAMESPACE"])) == (0, []), said


@pytest.fixture(scope="module")
def sandbox_id(docker_stack: Stack) -> str:
    done = docker_stack[0].cifixer("create")
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def test_a_command_that_is_run_is_all_there_was(docker_stack: Stack) -> None:
    user, running = docker_stack
    (user.home / "project").mkdir()
    (user.home / "project/check.py").write_text("import sys; print(6 * 7); sys.exit(3)")

    done = user.cifixer("run", "--quiet", "--upload", user.home / "project", "--", "python3", "check.py")

    assert (done.returncode, done.stdout, done.stderr) == (3, b"42\n", b"")
    assert left_on_daemon(running.exports["CIFIXER_NAMESPACE"]) == []


def test_exec_logs_and_the_same_op_again(docker_stack: Stack, sandbox_id: str) -> None:
    user, _ = docker_stack
    script = "printf '%s\\0' \"$WORD\"; printf err >&2; exit 5"

    done = user.cifixer("exec", "--env", "WORD=x=y", "--cwd", "/tmp", sandbox_id, "--", "sh", "-c", script)
    started = user.cifixer("exec", "--detach", sandbox_id, "--", "sh", "-c", "for i in 1 2 3; do echo line $i; sleep 0.1; done; exit 4")
    followed = user.cifixer("logs", "--follow", sandbox_id, started.stdout.decode().strip())
    again = user.cifixer("logs", sandbox_id, started.stdout.decode().strip())
    late = user.cifixer("exec", "--timeout", "0.3", sandbox_id, "--", "sleep", "60")

    assert (done.returncode, done.stdout, done.stderr) == (5, b"x=y\0", b"err")
    assert (followed.stdout, again.stdout) == (b"line 1\nline 2\nline 3\n", b"line 1\nline 2\nline 3\n")
    assert (late.returncode, b"timed out" in late.stderr) == (124, True)


def test_cp_there_and_back_and_ls(docker_stack: Stack, sandbox_id: str) -> None:
    user, _ = docker_stack
    (user.home / "here/sub").mkdir(parents=True)
    (user.home / "here/sub/data.bin").write_bytes(bytes(range(256)) * 9000)

    there = user.cifixer("cp", user.home / "here", f"{sandbox_id}:there")
    back = user.cifixer("cp", f"{sandbox_id}:there", user.home / "back")
    listed = {row["id"]: row for row in json.loads(user.cifixer("ls", "--json").stdout)}

    assert (there.returncode, back.returncode) == (0, 0), there.stderr + back.stderr
    assert (user.home / "back/sub/data.bin").read_bytes() == bytes(range(256)) * 9000
    assert (listed[sandbox_id]["state"], listed[sandbox_id]["backend"]) == ("ready", "docker_local")


def test_doctor_finds_the_daemon(docker_stack: Stack) -> None:
    user, _ = docker_stack
    doctor = user.cifixer("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(doctor.stdout)}
    assert (doctor.returncode, found["backend docker_local"]["ok"], "worker" in found) == (0, True, True), doctor.stdout.decode()


def test_a_stack_never_reaps_what_another_has_on_the_same_daemon_and_leaves_nothing_when_it_is_killed(
    docker_stack: Stack, sandbox_id: str
) -> None:
    user, _ = docker_stack
    with somebody() as other, up(other, "--backend", "docker_local") as theirs:
        made = other.cifixer("create")
        time.sleep(GRACE_S + 0.1)
        rounds = [user.cifixer("reap"), other.cifixer("reap")]
        alive = [u.cifixer("exec", i, "--", "echo", "on") for u, i in ((user, sandbox_id), (other, made.stdout.decode().strip()))]
        assert [(r.returncode, r.stdout) for r in rounds] == [(0, b""), (0, b"")]
        assert [a.stdout for a in alive] == [b"on\n", b"on\n"]
        theirs.process.kill()
        wait_until(lambda: not find_processes(theirs.directory) and not theirs.directory.exists(), 40)
        assert left_on_daemon(theirs.exports["CIFIXER_NAMESPACE"]) == []


def test_rm_and_a_direct_run(docker_stack: Stack, sandbox_id: str) -> None:
    user, _ = docker_stack
    removed = user.cifixer("rm", sandbox_id)
    direct = user.cifixer("run", "--direct", "--backend", "docker_local", "-i", "--", "cat", stdin=b"\xfe" * 300_000)
    assert (removed.returncode, removed.stdout.decode().split()) == (0, [sandbox_id])
    assert (direct.returncode, direct.stdout) == (0, b"\xfe" * 300_000)
