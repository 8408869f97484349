"""How a command ended is told truthfully."""

from __future__ import annotations

import pytest

from cifixer_exec import SandboxEnvironment, Status


def test_every_exit_code_comes_back(sandbox: SandboxEnvironment) -> None:
    results = [sandbox.run_command(f"exit {code}") for code in range(256)]
    assert [(r.status, r.exit_code) for r in results] == [(Status.EXITED, code) for code in range(256)]


def test_only_exit_code_0_is_ok(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("true").ok
    assert not sandbox.run_command("false").ok


@pytest.mark.parametrize("signal", ["HUP", "INT", "QUIT", "ABRT", "KILL", "USR1", "SEGV", "PIPE", "ALRM", "TERM"])
def test_a_command_killed_by_a_signal_names_it(sandbox: SandboxEnvironment, signal: str) -> None:
    result = sandbox.run_command(f"kill -{signal} $$; sleep 5")
    assert (result.status, result.signal, result.exit_code) == (Status.SIGNALED, signal, None)


def test_a_signalled_command_is_not_ok(sandbox: SandboxEnvironment) -> None:
    assert not sandbox.run_command("kill -TERM $$; sleep 5").ok


def test_a_program_that_is_not_found_is_exit_code_127_with_a_cause(sandbox: SandboxEnvironment) -> None:
    result = sandbox.run_command(["no-such-program-here"])
    assert (result.status, result.exit_code) == (Status.EXITED, 127)
    assert "no-such-program-here" in result.cause


def test_a_file_that_is_not_executable_is_exit_code_126_with_a_cause(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, "#!/bin/sh\n")
    result = sandbox.run_command([f"./{name}"])
    assert (result.status, result.exit_code) == (Status.EXITED, 126)
    assert name in result.cause


def test_a_broken_pipe_ends_the_writer_as_in_any_shell(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("yes | head -n 1").text == "y\n"


def test_the_duration_is_that_of_the_command(sandbox: SandboxEnvironment) -> None:
    assert 0.5 <= sandbox.run_command("sleep 0.5").duration_s < 10


def test_a_list_is_run_without_a_shell(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command(["echo", "$HOME", "*", "a b"]).text == "$HOME * a b\n"


def test_a_string_is_a_shell_line(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("printf '%s-' a 'b c' | cat").text == "a-b c-"


def test_the_result_bears_the_op_id(sandbox: SandboxEnvironment, name: str) -> None:
    assert sandbox.run_command("true", op_id=name).op_id == name
