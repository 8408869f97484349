"""A stack kept by ``cifixer-exec up``, used from other processes, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cifixer_exec.stack.leftovers import find_processes
from tests.acceptance.programs import ROOT, Up, User, up, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]
Stack = tuple[User, Up]


@pytest.fixture
def sandbox_id(stack: Stack) -> str:
    """A new sandbox."""
    done = stack[0].cifixer("create")
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def test_exec_passes_bytes_environment_and_exit_code(stack: Stack, sandbox_id: str) -> None:
    user, _ = stack
    script = "printf '%s\\0' \"$WORD\"; printf err >&2; pwd >&2; exit 5"

    done = user.cifixer("exec", "--env", "WORD=x=y", "--cwd", "/tmp", sandbox_id, "--", "sh", "-c", script)

    assert (done.returncode, done.stdout, done.stderr) == (5, b"x=y\0", b"err/tmp\n")


def test_time_out_and_signal_have_their_codes(stack: Stack, sandbox_id: str) -> None:
    user, _ = stack

    late = user.cifixer("exec", "--timeout", "0.3", sandbox_id, "--", "sleep", "60")
    shot = user.cifixer("exec", sandbox_id, "--", "sh", "-c", "kill -USR1 $$")

    assert (late.returncode, b"timed out" in late.stderr) == (124, True)
    assert (shot.returncode, b"signal USR1" in shot.stderr) == (128 + signal.SIGUSR1, True)


def test_ls_and_rm(stack: Stack, sandbox_id: str) -> None:
    user, _ = stack

    listed = {row["id"]: row for row in json.loads(user.cifixer("ls", "--json").stdout)}
    table = user.cifixer("ls").stdout.decode()
    removed = user.cifixer("rm", sandbox_id, "sb-unknown")
    after = json.loads(user.cifixer("ls", "--json").stdout)

    assert listed[sandbox_id]["state"] == "ready"
    assert sandbox_id in table
    assert removed.returncode == 3
    assert removed.stdout.decode().split() == [sandbox_id]
    assert b"sb-unknown" in removed.stderr
    assert sandbox_id not in {row["id"] for row in after}


def test_cp_files_and_directories_both_ways(stack: Stack, sandbox_id: str) -> None:
    user, _ = stack
    here = user.home / "here"
    (here / "sub").mkdir(parents=True, exist_ok=True)
    (here / "sub/data.bin").write_bytes(bytes(range(256)) * 9000)

    codes = [
        user.cifixer("cp", here, f"{sandbox_id}:there").returncode,
        user.cifixer("cp", here / "sub/data.bin", f"{sandbox_id}:there/").returncode,
        user.cifixer("cp", f"{sandbox_id}:there", user.home / "back").returncode,
        user.cifixer("cp", f"{sandbox_id}:there/data.bin", user.home / "one.bin").returncode,
    ]

    assert codes == [0, 0, 0, 0]
    expected = (here / "sub/data.bin").read_bytes()
    assert (user.home / "back/sub/data.bin").read_bytes() == expected
    assert (user.home / "back/data.bin").read_bytes() == expected
    assert (user.home / "one.bin").read_bytes() == expected
    missing = user.cifixer("cp", f"{sandbox_id}:nothing", user.home / "x")
    assert (missing.returncode, b"nothing" in missing.stderr) == (3, True)


def test_logs_of_a_detached_command(stack: Stack, sandbox_id: str) -> None:
    user, _ = stack
    script = "for i in 1 2 3; do echo line $i; echo err $i >&2; sleep 0.1; done"

    started = user.cifixer("exec", "--detach", sandbox_id, "--", "sh", "-c", script)
    op_id = started.stdout.decode().strip()
    followed = user.cifixer("logs", "--follow", sandbox_id, op_id)
    again = user.cifixer("logs", sandbox_id, op_id)
    unknown = user.cifixer("logs", sandbox_id, "op-unknown")

    assert followed.stdout == b"line 1\nline 2\nline 3\n"
    assert followed.stderr == b"err 1\nerr 2\nerr 3\n"
    assert (again.stdout, again.stderr) == (followed.stdout, followed.stderr)
    assert (unknown.returncode, b"op-unknown" in unknown.stderr) == (2, True)


def test_the_same_op_id_runs_once(stack: Stack, sandbox_id: str) -> None:
    user, _ = stack
    command = ("exec", "--op-id", f"once-{sandbox_id}", sandbox_id, "--", "sh", "-c", "date +%N >> ran; cat ran")

    first, second = user.cifixer(*command), user.cifixer(*command)

    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout == second.stdout
    assert first.stdout.count(b"\n") == 1


def test_interrupted_exec_kills_its_command(stack: Stack, sandbox_id: str) -> None:
    user, _ = stack
    command = [*user.command(), "exec", sandbox_id, "--", "sh", "-c", "echo go; exec sleep 4321"]
    # Who runs the tests in the background of a shell has it ignored, and a program that starts so leaves it at that.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", heed, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=user.environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    assert process.returncode == 130
    alive = user.cifixer("exec", sandbox_id, "--", "sh", "-c", "cat /proc/[0-9]*/comm | grep -c sleep")
    assert alive.stdout == b"0\n"


def test_run_uses_the_running_stack(stack: Stack) -> None:
    user, _ = stack

    done = user.cifixer(
        "run", "--upload", ROOT / "examples/broken-project", "--", "python3", "-m", "pytest", "-q", "-p", "no:cacheprovider"
    )

    assert done.returncode == 1
    assert b"2 failed, 11 passed" in done.stdout
    assert done.stderr == b""
    assert len([n for n in user.left() if n.startswith("cifixer-")]) == 1


def test_named_redis_and_doctor(stack: Stack) -> None:
    user, running = stack
    other = User(user.home / "other", running.exports)
    other.home.mkdir()

    done = other.cifixer("run", "--", "echo", "hi")
    doctor = other.cifixer("doctor", "--json")

    assert (done.returncode, done.stdout) == (0, b"hi\n")
    assert doctor.returncode == 0, doctor.stdout.decode()
    assert "worker" in {finding["name"] for finding in json.loads(doctor.stdout)}


def test_raw_celery_from_another_process(stack: Stack) -> None:
    user, running = stack
    client = User(user.home, running.exports)
    script = (
        "from cifixer_exec.tasks import create_sandbox, run_command, teardown_sandbox\n"
        "sandbox_id = create_sandbox.delay().get(timeout=30)['sandbox_id']\n"
        "result = run_command.delay(sandbox_id, 'echo $((6 * 7)); exit 3').get(timeout=30)\n"
        "teardown_sandbox.delay(sandbox_id).get(timeout=30)\n"
        "print(result['status'], result['exit_code'], result['stdout'].strip())\n"
    )

    sent = client.python(ROOT / "examples/celery_raw.py")
    delayed = client.python("-c", script)

    assert sent.returncode == 0, sent.stderr.decode()
    assert b"exited 0: 42" in sent.stdout
    assert delayed.stdout == b"exited 3 42\n", delayed.stderr.decode()


def test_interrupt_drains_and_leaves_nothing(user: User) -> None:
    with up(user) as running:
        sandbox_id = user.cifixer("create").stdout.decode().strip()
        command = [*user.command(), "exec", sandbox_id, "--", "sh", "-c", "echo go; sleep 2; echo done"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=user.environment())
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"

        code, said = running.stop(signal.SIGINT)
        out, _ = process.communicate(timeout=30)

    assert (out, process.returncode) == (b"done\n", 0)
    assert code == 0, said
    assert "0 processes, 0 directories, 0 Redis keys" in said
    assert find_processes(running.directory) == ()
    assert user.left() == []
    assert not (user.home / "state").exists()


@pytest.mark.parametrize("victim", ["program", "keeper"])
def test_killed_with_9_leaves_nothing(user: User, victim: str) -> None:
    user.variables["CIFIXER_DRAIN_S"] = "1"
    with up(user) as running:
        sandbox_id = user.cifixer("create").stdout.decode().strip()
        assert user.cifixer("exec", "--detach", sandbox_id, "--", "sleep", "1000").returncode == 0

        os.kill(running.process.pid if victim == "program" else _keeper_of(running.process.pid), signal.SIGKILL)

        wait_until(lambda: not find_processes(running.directory) and not running.directory.exists(), 40)
        assert user.left() == []


def test_no_stack_after_it_ended(user: User) -> None:
    with up(user) as running:
        running.process.kill()
        running.process.communicate()
        done = user.cifixer("ls")

    assert done.returncode == 3
    assert b"no stack is known" in done.stderr


def test_flower_is_behind_its_password(user: User) -> None:
    from urllib.error import HTTPError
    from urllib.request import HTTPBasicAuthHandler, HTTPPasswordMgrWithDefaultRealm, build_opener, urlopen

    port = str(_free_port())
    with up(user, "--flower", "--port-flower", port) as running:
        wait_until(lambda: (running.directory / "flower.log").exists(), 10)
        assert running.process.stdout is not None
        line = running.told.partition("# Flower: ")[2] or running.process.stdout.readline().decode().partition("# Flower: ")[2]
        url, password = line.split()[0], line.split()[-1]
        with pytest.raises(HTTPError, match="401"):
            urlopen(url, timeout=10)
        known = HTTPPasswordMgrWithDefaultRealm()
        known.add_password(None, url, "cifixer", password)
        with build_opener(HTTPBasicAuthHandler(known)).open(f"{url}workers", timeout=10) as page:
            assert page.status == 200
        assert password.encode() not in b"".join(_command_lines())
        running.stop()


def _keeper_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(c) for c in children if b"stack.keeper" in Path(f"/proc/{c}/cmdline").read_bytes())


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return found
