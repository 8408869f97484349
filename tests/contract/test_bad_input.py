"""Wrong requests: one clear error that names the value and the remedy, nothing started, and the sandbox works on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cifixer_exec import InvalidRequestError, SandboxEnvironment, create_sandbox
from tests.support.contract_stack import Stack


@pytest.fixture(autouse=True)
def works_afterwards(sandbox: SandboxEnvironment) -> Iterator[None]:
    yield
    assert sandbox.run_command("echo works").stdout == b"works\n"


COMMANDS: dict[str, tuple[Any, str]] = {
    "empty line": ("", "empty"),
    "blank line": (" \n", "empty"),
    "empty list": ([], "empty"),
    "None": (None, "None"),
    "number": (5, "5"),
    "bytes": (b"true", "true"),
    "dict": ({"a": 1}, "wrong type"),
    "empty program": (["", "x"], "program to run"),
    "number in list": (["echo", 5], "5 is a int: give a str"),
    "bytes in list": (["echo", b"x"], "give a str"),
    "NUL in line": ("echo a\0b", "NUL"),
    "NUL in list": (["echo", "a\0b"], "NUL"),
}


@pytest.mark.parametrize(("command", "said"), COMMANDS.values(), ids=COMMANDS.keys())
def test_an_impossible_command_is_refused(sandbox: SandboxEnvironment, command: Any, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        sandbox.run_command(command)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "negative time-out": ({"timeout_s": -1}, "timeout_s=-1 .* greater than 0"),
    "zero time-out": ({"timeout_s": 0}, "timeout_s=0 "),
    "infinite time-out": ({"timeout_s": float("inf")}, "timeout_s=inf "),
    "NaN time-out": ({"timeout_s": float("nan")}, "timeout_s=nan "),
    "text time-out": ({"timeout_s": "60"}, "timeout_s='60'"),
    "true time-out": ({"timeout_s": True}, "timeout_s=True"),
    "env value": ({"env": {"A": 1}}, r"env\['A'\] is a int: give a str"),
    "env name": ({"env": {"A=B": "x"}}, "env name 'A=B'"),
    "empty env name": ({"env": {"": "x"}}, "env name ''"),
    "NUL in env": ({"env": {"A": "x\0y"}}, r"env\['A'\] has a NUL"),
    "env no mapping": ({"env": ["A=B"]}, "env"),
    "NUL in cwd": ({"cwd": "a\0b"}, "NUL"),
    "number as cwd": ({"cwd": 5}, "path 5 is a int"),
    "empty cwd": ({"cwd": ""}, "empty"),
    "stdin None": ({"stdin": None}, "stdin is a NoneType: give bytes"),
    "stdin list": ({"stdin": [1, 2]}, "stdin is a list: give bytes"),
    "op id": ({"op_id": "not ok!"}, "op id 'not ok!' .* characters"),
    "long op id": ({"op_id": "x" * 101}, "1 to 100"),
    "number as op id": ({"op_id": 5}, "op id 5"),
    "negative output limit": ({"output_limit_bytes": -1}, "output_limit_bytes=-1"),
    "text output limit": ({"output_limit_bytes": "1M"}, "output_limit_bytes='1M'"),
}


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=OPTIONS.keys())
def test_an_impossible_option_is_refused(sandbox: SandboxEnvironment, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        sandbox.run_command("true", **options)


def test_an_env_value_is_never_shown(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sandbox.run_command("true", env={"TOKEN": "hunter2\0"})
    assert "hunter2" not in str(caught.value)


def test_a_10_mb_command_line_names_the_limit_and_the_way_out(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError, match=r"10485760 bytes.* 131071.*write_file.*stdin"):
        sandbox.run_command(["echo", "x" * 10_485_760])


def test_a_10_mb_script_names_the_limit_and_the_way_out(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError, match=r"131071.*write_file"):
        sandbox.run_command("echo " + "x" * 10_485_760)


@pytest.mark.parametrize("arguments", [20, 100], ids=["2 MB", "10 MB"])
def test_too_many_long_arguments_are_refused_with_the_limit(sandbox: SandboxEnvironment, arguments: int) -> None:
    with pytest.raises(InvalidRequestError, match=r"\d{5,}.*(write_file|stdin|file)"):
        sandbox.run_command(["echo", *["x" * 100_000] * arguments])


def test_an_env_that_is_too_large_is_refused_with_the_limit(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError, match=r"\d{5,}"):
        sandbox.run_command("true", env={f"V{n}": "x" * 100_000 for n in range(20)})


def test_an_env_value_that_linux_cannot_take_is_refused_by_name(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError, match="LARGE"):
        sandbox.run_command("true", env={"LARGE": "x" * 140_000})


def test_a_long_argument_just_within_the_limit_runs(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command(["printf", "%s", "x" * 131_071]).stdout == b"x" * 131_071


def test_text_that_is_no_unicode_is_refused_or_runs(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command(["printf", "%s", "caf\udce9"]).stdout == b"caf\xe9"


def test_a_lone_surrogate_in_a_command_is_refused(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError):
        sandbox.run_command(["echo", "\ud83d"])


def test_a_lone_surrogate_in_a_path_is_refused(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError):
        sandbox.read_file("\ud83d")


def test_a_lone_surrogate_in_an_env_is_refused(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError, match="NAME"):
        sandbox.run_command("true", env={"NAME": "\ud83d"})


@pytest.mark.parametrize("data", [None, 5, ["a"]])
def test_a_file_content_of_a_wrong_type_is_refused(sandbox: SandboxEnvironment, data: Any) -> None:
    with pytest.raises(InvalidRequestError, match=type(data).__name__):
        sandbox.write_file("file", data)


@pytest.mark.parametrize("mode", [-1, 0o100000, "755"])
def test_an_impossible_mode_is_refused(sandbox: SandboxEnvironment, mode: Any) -> None:
    with pytest.raises(InvalidRequestError, match="mode"):
        sandbox.write_file("file", b"", mode=mode)


def test_an_unknown_backend_names_the_known_ones(stack: Stack) -> None:
    with pytest.raises(InvalidRequestError, match=r"'warp' is not known: take one of .*local"):
        create_sandbox(stack.config, execution_backend="warp")


@pytest.mark.parametrize("sandbox_id", ["", "../up", "a b", "x" * 101, "ünicode", 5])
def test_an_impossible_sandbox_id_is_refused(stack: Stack, sandbox_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match="sandbox id"):
        create_sandbox(stack.config, sandbox_id=sandbox_id)


SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "memory": ({"memory_bytes": -5}, "memory_bytes=-5"),
    "cpus": ({"cpus": 0}, "cpus=0"),
    "disk": ({"disk_bytes": "1G"}, "disk_bytes='1G'"),
    "processes": ({"max_processes": True}, "max_processes=True"),
    "lifetime": ({"lifetime_s": -1}, "lifetime_s=-1"),
    "env": ({"env": {"A": 5}}, r"env\['A'\]"),
    "dispatch": ({"dispatch": "pigeon"}, "dispatch='pigeon'"),
}


@pytest.mark.parametrize(("overrides", "said"), SPECS.values(), ids=SPECS.keys())
def test_an_impossible_sandbox_is_refused(stack: Stack, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        stack.create(**overrides)


def test_an_image_is_refused_by_a_backend_without_images(stack: Stack) -> None:
    if stack.backend.capabilities.images:
        pytest.skip("this backend runs images")
    sandbox = stack.create(image="debian:13")
    with pytest.raises(InvalidRequestError, match=r"image='debian:13'.*leave image out"):
        sandbox.init()
    sandbox.teardown()


@pytest.mark.parametrize("path", ["relative", "/no/such/directory", "/etc/passwd"])
def test_a_readonly_path_that_is_no_directory_is_refused(stack: Stack, path: str) -> None:
    if not stack.backend.capabilities.readonly_paths:
        pytest.skip("this backend shows no paths of the host")
    sandbox = stack.create(readonly_paths=(path,))
    with pytest.raises(InvalidRequestError, match=path):
        sandbox.init()
    sandbox.teardown()
