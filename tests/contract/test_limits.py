"""Limits hold, are told truthfully, and the sandbox lives afterwards."""

from __future__ import annotations

import pytest

from cifixer_exec import ExecResult, InvalidRequestError, SandboxEnvironment, SandboxFileError, Status
from cifixer_exec.model import MIB
from tests.contract.conftest import Make
from tests.support.contract_stack import Stack

BOMB = "f() { f | f & }; f & exec sleep 600"  # one fork, then exec: the bomb leaves the leader no process to fork


def need(stack: Stack, capability: str) -> None:
    if not getattr(stack.backend.capabilities, capability):
        pytest.skip(f"backend {stack.backend.name!r} cannot limit {capability} here")


@pytest.fixture
def small_disk(stack: Stack, make: Make) -> SandboxEnvironment:
    need(stack, "disk")
    return make(disk_bytes=16 * MIB)


def test_a_file_for_which_there_is_no_room_is_no_space_by_name(small_disk: SandboxEnvironment) -> None:
    with pytest.raises(SandboxFileError, match="too-big") as caught:
        small_disk.write_file("too-big", bytes(32 * MIB))
    assert caught.value.code == "no_space"


def test_a_refused_file_leaves_nothing_behind(small_disk: SandboxEnvironment) -> None:
    with pytest.raises(SandboxFileError):
        small_disk.write_file("too-big", bytes(32 * MIB))
    assert small_disk.list_files() == []
    small_disk.write_file("fits", bytes(12 * MIB))


def test_a_refused_overwrite_keeps_the_old_file(small_disk: SandboxEnvironment) -> None:
    small_disk.write_file("file", b"old")
    with pytest.raises(SandboxFileError):
        small_disk.write_file("file", bytes(32 * MIB))
    assert small_disk.read_file("file") == b"old"


def test_a_command_sees_the_full_disk(small_disk: SandboxEnvironment) -> None:
    result = small_disk.run_command("head -c 33554432 /dev/zero > big")
    assert (result.status, result.exit_code) == (Status.EXITED, 1)
    assert "No space left" in result.stderr_text


def test_commands_run_and_tell_all_on_a_full_disk(small_disk: SandboxEnvironment) -> None:
    small_disk.run_command('for d in . /tmp "$HOME"; do head -c 33554432 /dev/zero > $d/big; done')
    assert small_disk.run_command("seq 1 100000; exit 3").stdout == b"".join(b"%d\n" % n for n in range(1, 100_001))
    small_disk.remove("big")
    small_disk.write_file("fits", bytes(MIB))


def test_the_disk_is_one_for_workspace_home_and_tmp(small_disk: SandboxEnvironment) -> None:
    fill = 'for d in . /tmp "$HOME"; do head -c 33554432 /dev/zero > $d/big; stat -c %s $d/big; done'
    assert sum(map(int, small_disk.run_command(fill).text.split())) <= 16 * MIB
    assert small_disk.run_command("rm big; head -c 1048576 /dev/zero > /tmp/other").ok


def test_empty_files_cannot_be_made_without_end(stack: Stack, small_disk: SandboxEnvironment, make: Make) -> None:
    if stack.backend.name == "kubernetes":  # volumes in memory have no limit on inodes there, but inodes are memory
        result = make(memory_bytes=128 * MIB).run_command("seq 600000 | xargs touch", timeout_s=90)
        assert result.status is not Status.EXITED or not result.ok, result
        return
    result = small_disk.run_command("seq 60000 | xargs touch", timeout_s=60)
    assert "No space left" in result.stderr_text
    assert small_disk.run_command("find . -delete; echo x > /tmp/fits").ok


def test_output_of_many_commands_cannot_fill_the_spool_for_good(fresh: SandboxEnvironment) -> None:
    sizes = [fresh.run_command(["head", "-c", str(100 * MIB), "/dev/zero"], output_limit_bytes=1000).stdout_bytes for _ in range(12)]
    assert sizes == [100 * MIB] * 12
    assert fresh.run_command("echo alive").stdout == b"alive\n"


def test_a_fork_bomb_ends_with_its_time_out(stack: Stack, make: Make) -> None:
    need(stack, "max_processes")
    sandbox = make(max_processes=64)
    assert sandbox.run_command(BOMB, timeout_s=2).status is Status.TIMED_OUT
    assert sandbox.run_command("echo alive").stdout == b"alive\n"


def test_a_fork_bomb_can_be_killed(stack: Stack, make: Make) -> None:
    need(stack, "max_processes")
    sandbox = make(max_processes=64)
    bomb = sandbox.start_command(f"echo begun; {BOMB}")
    next(iter(bomb.output()))
    bomb.kill()
    assert bomb.wait().status is Status.KILLED
    assert sandbox.run_command("echo alive").stdout == b"alive\n"


def test_files_can_be_reached_during_a_fork_bomb(stack: Stack, make: Make) -> None:
    need(stack, "max_processes")
    sandbox = make(max_processes=64)
    bomb = sandbox.start_command(f"echo begun; {BOMB}", timeout_s=60)
    next(iter(bomb.output()))
    sandbox.write_file("file", b"content")
    assert sandbox.read_file("file") == b"content"
    bomb.kill()


def test_one_fork_bomb_does_not_touch_another_sandbox(stack: Stack, make: Make) -> None:
    need(stack, "max_processes")
    bombed, other = make(max_processes=64), make(max_processes=64)
    bomb = bombed.start_command(f"echo begun; {BOMB}", timeout_s=60)
    next(iter(bomb.output()))
    assert [other.run_command(f"echo {n}").stdout for n in range(5)] == [b"%d\n" % n for n in range(5)]
    bomb.kill()


def test_the_process_limit_is_the_one_asked_for(stack: Stack, make: Make, marker: str) -> None:
    need(stack, "max_processes")
    sandbox = make(max_processes=40)
    result = sandbox.run_command(f"i=0; while [ $i -lt 200 ]; do sleep {marker} & i=$((i + 1)); echo $i; done; sleep 5", timeout_s=3)
    assert 10 < int(result.text.split()[-1]) <= 40


def test_a_command_keeps_its_processes_while_many_others_start(stack: Stack, make: Make, marker: str) -> None:
    need(stack, "max_processes")
    sandbox = make(max_processes=100)
    fork = f"i=0; while [ $i -lt 20 ]; do sleep {marker} & i=$((i + 1)); done; echo all; kill $(jobs -p)"
    early = sandbox.start_command(f"read x; {fork}", stdin_open=True)
    others = [sandbox.start_command("read x", stdin_open=True) for _ in range(40)]
    early.send_stdin("go\n")
    assert early.wait().text == "all\n"
    for other in others:
        other.close_stdin()
    assert {other.wait().status for other in others} == {Status.EXITED}


@pytest.mark.parametrize("command", [["tail", "/dev/zero"], "tail /dev/zero; exit $?"], ids=["leader", "child"])
def test_a_command_without_enough_memory_is_out_of_memory(stack: Stack, make: Make, command: list[str] | str) -> None:
    need(stack, "memory")
    result = make(memory_bytes=128 * MIB).run_command(command, timeout_s=60)
    assert result.exit_code is None
    assert result.status is Status.OUT_OF_MEMORY or is_whole_lost(stack, result), result
    assert "memory" in result.cause


def is_whole_lost(stack: Stack, result: ExecResult) -> bool:
    """A node with cgroup v2 lets the kernel kill a container as a whole, and so the sandbox: k8s/README.md."""
    return stack.backend.name == "kubernetes" and result.status is Status.SANDBOX_LOST and "out of memory" in result.cause


def test_a_disk_fills_up_before_the_memory_does(stack: Stack, make: Make) -> None:
    need(stack, "memory")
    sandbox = make(memory_bytes=128 * MIB)
    result = sandbox.run_command("head -c 400000000 /dev/zero > big", timeout_s=60)
    assert "No space left" in result.stderr_text
    assert sandbox.run_command("rm big; echo alive").stdout == b"alive\n"


def test_a_disk_that_does_not_fit_into_the_memory_is_refused(stack: Stack, make: Make) -> None:
    need(stack, "memory")
    need(stack, "disk")
    with pytest.raises(InvalidRequestError, match=r"disk_bytes=134217728 does not fit into memory_bytes=134217728.*more memory"):
        make(memory_bytes=128 * MIB, disk_bytes=128 * MIB)


def test_memory_that_is_full_of_files_is_told_as_lack_of_memory(stack: Stack, make: Make) -> None:
    """In shared memory, which no disk limits. They stay when the command is dead, so the kernel may have to kill the sandbox too."""
    need(stack, "memory")
    result = make(memory_bytes=128 * MIB).run_command("head -c 200000000 /dev/zero > /dev/shm/big", timeout_s=60)
    assert result.status in (Status.OUT_OF_MEMORY, Status.SANDBOX_LOST)
    assert "memory" in result.cause


def test_the_sandbox_lives_after_out_of_memory(stack: Stack, make: Make) -> None:
    need(stack, "memory")
    sandbox = make(memory_bytes=128 * MIB)
    if not is_whole_lost(stack, sandbox.run_command(["tail", "/dev/zero"], timeout_s=60)):
        assert sandbox.run_command("exit 3").exit_code == 3


def test_a_kill_without_lack_of_memory_is_not_out_of_memory(stack: Stack, make: Make) -> None:
    need(stack, "memory")
    sandbox = make(memory_bytes=128 * MIB)
    sandbox.run_command(["tail", "/dev/zero"], timeout_s=60)
    result = sandbox.run_command("kill -9 $$")
    assert (result.status, result.signal) == (Status.SIGNALED, "KILL")


@pytest.mark.parametrize(("limit", "value"), [("image", "debian:13"), ("network", "wormhole")])
def test_what_cannot_be_enforced_is_refused_by_name(stack: Stack, limit: str, value: str) -> None:
    if limit == "image" and stack.backend.capabilities.images:
        pytest.skip("this backend runs images")
    with pytest.raises(InvalidRequestError, match=value), stack.create(**{limit: value}):
        pass
