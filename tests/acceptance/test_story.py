"""The commands of the README, run as a newcomer runs them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cifixer_exec.stack.leftovers import find_processes
from tests.acceptance.programs import ROOT, User

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]


def test_repair_ends_well_and_leaves_nothing(user: User) -> None:
    output = user.home / "out"

    done = user.python(ROOT / "examples/repair.py", "--output", output)

    said = done.stdout.decode()
    assert done.returncode == 0, said + done.stderr.decode()
    assert "2 failed, 11 passed" in said
    assert "13 passed" in said
    assert "0 processes, 0 directories, 0 Redis keys" in said
    assert user.left() == []
    assert find_processes(user.temporary) == ()
    suite = ElementTree.parse(output / "report.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("13", "0")


def test_the_delivered_diff_repairs_the_project(user: User, tmp_path: Path) -> None:
    done = user.python(ROOT / "examples/repair.py", "--output", user.home / "out")
    assert done.returncode == 0, done.stderr.decode()

    project = tmp_path / "project"
    subprocess.run(["cp", "-r", ROOT / "examples/broken-project", project], check=True)
    subprocess.run(["git", "apply", user.home / "out/repair.diff"], cwd=project, check=True)

    assert "by_loss" in (project / "src/ledger/shares.py").read_text()


def test_fanout_uses_several_sandboxes(user: User) -> None:
    done = user.python(ROOT / "examples/async_fanout.py", "3")

    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert done.stdout.count(b"13 passed") == 3
    assert user.left() == []


def test_run_without_a_stack_starts_one_for_itself(user: User) -> None:
    done = user.cifixer("run", "-q", "--", "sh", "-c", "printf 'a\\0\\377'; printf 'b\\n' >&2; exit 7")

    assert (done.returncode, done.stdout, done.stderr) == (7, b"a\0\xff", b"b\n")
    assert user.left() == []


def test_direct_run_uses_no_stack(user: User) -> None:
    done = user.cifixer("run", "--direct", "-i", "--", "cat", stdin=b"\xfe" * 300_000)

    assert (done.returncode, done.stdout) == (0, b"\xfe" * 300_000)
    assert user.left() == []


@pytest.mark.parametrize(
    ("arguments", "code", "named", "remedy"),
    [
        (["run", "--backend", "nope", "--", "true"], 2, "nope", "take one of"),
        (["run", "--redis-url", "redis://127.0.0.1:1/0", "--", "true"], 3, "redis://127.0.0.1:1/0", "check that it runs"),
        (["up", "--redis-url", "redis://127.0.0.1:1/0"], 3, "redis://127.0.0.1:1/0", "check that it runs"),
        (["run", "--redis-url", "nonsense", "--", "true"], 2, "redis_url", "redis://"),
        (["exec", "sb-1", "--", "true"], 3, "no stack is known", "cifixer-exec up"),
        (["exec", "--direct", "sb-1", "--", "true"], 3, "sb-1", "local"),
        (["run", "--direct", "--timeout", "-1", "--", "true"], 2, "-1.0", "greater than 0"),
        (["run", "--env", "novalue", "--", "true"], 2, "novalue", "NAME=VALUE"),
        (["cp", "a", "b"], 2, "'a'", "ID:path"),
        (["run", "--direct", "--upload", "/nonexistent", "--", "true"], 2, "/nonexistent", "not exist"),
    ],
)
def test_bad_input_is_one_clear_line(user: User, arguments: list[str], code: int, named: str, remedy: str) -> None:
    done = user.cifixer(*arguments)

    said = done.stderr.decode()
    assert done.returncode == code, said
    assert named in said
    assert remedy in said
    assert "Traceback" not in said
    assert done.stdout == b""
    assert user.left() == []
