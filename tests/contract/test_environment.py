"""Environment and working directory of a command."""

from __future__ import annotations

import pytest

from cifixer_exec import InvalidRequestError, SandboxEnvironment
from tests.contract.conftest import Make
from tests.support.contract_stack import HOST_SECRET

ENVS = {
    "plain": {"GREETING": "hello"},
    "unicode": {"GREETING": "grüße 🦀 日本"},
    "empty": {"GREETING": ""},
    "spaces and newlines": {"GREETING": "a\nb  c\t=d'\"$x"},
    "long": {"GREETING": "x" * 100_000},
}


@pytest.mark.parametrize("env", ENVS.values(), ids=ENVS.keys())
def test_a_variable_arrives_as_it_was_given(sandbox: SandboxEnvironment, env: dict[str, str]) -> None:
    assert sandbox.run_command(["sh", "-c", 'printf %s "${GREETING-unset}"'], env=env).stdout == env["GREETING"].encode()


def test_a_unicode_name_arrives(sandbox: SandboxEnvironment) -> None:
    assert "GRÜSSE=ja\n" in sandbox.run_command(["env"], env={"GRÜSSE": "ja"}).text


def test_a_commands_env_is_not_seen_by_the_next(sandbox: SandboxEnvironment) -> None:
    sandbox.run_command("true", env={"ONLY_ONCE": "1"})
    assert "ONLY_ONCE" not in sandbox.run_command("env").text


def test_the_sandboxs_env_is_seen_by_every_command(make: Make) -> None:
    assert make(env={"SHARED": "yes"}).run_command('echo "$SHARED"').text == "yes\n"


def test_a_commands_env_goes_over_the_sandboxs(make: Make) -> None:
    assert make(env={"SHARED": "yes"}).run_command('echo "$SHARED"', env={"SHARED": "no"}).text == "no\n"


def test_the_hosts_environment_is_not_visible(sandbox: SandboxEnvironment) -> None:
    seen = sandbox.run_command("env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'").text
    assert HOST_SECRET not in seen
    assert "CIFIXER_" not in seen


def test_programs_are_found_by_path_and_home_is_writable(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command('test -n "$PATH" && touch "$HOME/here" && rm "$HOME/here"').ok


def test_the_default_directory_is_the_workspace(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, "x")
    assert sandbox.run_command(["cat", name]).text == "x"


def test_a_relative_cwd_is_below_the_workspace(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.mkdir(f"{name}/deep")
    workspace = sandbox.run_command("pwd").text.strip()
    assert sandbox.run_command("pwd", cwd=f"{name}/deep").text == f"{workspace}/{name}/deep\n"


def test_an_absolute_cwd_is_taken(sandbox: SandboxEnvironment) -> None:
    assert [sandbox.run_command("pwd", cwd=path).text for path in ("/usr", "/tmp", "/workspace")] == ["/usr\n", "/tmp\n", "/workspace\n"]


def test_a_missing_cwd_is_refused_by_name(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError, match="no/such/place"):
        sandbox.run_command("pwd", cwd="no/such/place")


def test_a_cwd_that_is_a_file_is_refused_by_name(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, "x")
    with pytest.raises(InvalidRequestError, match=name):
        sandbox.run_command("pwd", cwd=name)
