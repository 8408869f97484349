"""The values and the errors: checked on the way in, unchanged by JSON."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec import errors
from cifixer_exec.errors import ExecutorError, InvalidRequestError, error_from_json, error_to_json
from cifixer_exec.model import (
    MAX_ARGUMENT_BYTES,
    MAX_PAYLOAD_BYTES,
    Command,
    ExecRecord,
    ExecResult,
    OutputChunk,
    SandboxHandle,
    SandboxSpec,
    Status,
    Stream,
    check_env,
    check_id,
    check_path,
    check_timeout_s,
    payload_digest,
    with_env,
)
from cifixer_exec.operations import commands_from, commands_payload

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
ENV = st.dictionaries(TEXT.filter(lambda t: t != "" and "=" not in t), TEXT, max_size=4)
SECONDS = st.floats(0.001, 366 * 86400)
COMMANDS = st.builds(
    Command,
    argv=st.lists(TEXT, min_size=1, max_size=4).map(tuple),
    env=ENV,
    cwd=st.none() | TEXT.filter(bool),
    timeout_s=st.none() | SECONDS,
    grace_s=st.floats(0, 3600),
    stdin=st.binary(max_size=50),
    stdin_open=st.booleans(),
    output_limit_bytes=st.integers(0, 1 << 40),
    spool_limit_bytes=st.integers(0, 1 << 40),
)
COUNTS = st.integers(0, 1 << 60)
RECORDS = st.builds(
    ExecRecord,
    status=st.sampled_from(Status),
    exit_code=st.none() | st.integers(0, 255),
    signal=st.none() | st.sampled_from(["TERM", "KILL"]),
    stdout_bytes=COUNTS,
    stderr_bytes=COUNTS,
    spool_truncated=st.booleans(),
    duration_s=st.floats(0, 1e6),
    cause=st.text(max_size=40),
    killed_processes=COUNTS,
    background_processes=COUNTS,
    oom_kills=COUNTS,
)
SPECS = st.builds(
    SandboxSpec,
    backend=st.just("local"),
    sandbox_id=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True),
    image=st.none() | TEXT,
    env=ENV,
    cpus=st.none() | st.floats(0.01, 64),
    memory_bytes=st.none() | st.integers(1, 1 << 40),
    disk_bytes=st.none() | st.integers(1, 1 << 40),
    max_processes=st.none() | st.integers(1, 10_000),
    network=st.none() | TEXT,
    lifetime_s=SECONDS,
    readonly_paths=st.lists(TEXT, max_size=3).map(tuple),
    labels=st.dictionaries(TEXT, TEXT, max_size=3),
)


def travelled(data: Any) -> Any:
    """As it arrives on the other side."""
    return json.loads(json.dumps(data))


@given(COMMANDS)
def test_a_command_survives_json(command: Command) -> None:
    assert Command.from_json(travelled(command.to_json()), command.stdin) == command


@given(st.lists(COMMANDS, min_size=1, max_size=4))
def test_a_batch_of_commands_survives_the_journal(commands: list[Command]) -> None:
    payload, body = commands_payload(commands)
    assert commands_from(travelled(payload), body) == commands


NO_BATCHES: list[dict[str, Any]] = [
    {},
    {"commands": 5},
    {"commands": [{}]},
    {"commands": [5]},
    {"commands": [{"argv": ["x"], "stdin_bytes": "x"}]},
]


@pytest.mark.parametrize("payload", NO_BATCHES, ids=repr)
def test_what_is_no_batch_is_refused(payload: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        commands_from(payload, b"")


@given(RECORDS)
def test_a_record_survives_json(record: ExecRecord) -> None:
    assert ExecRecord.from_json(travelled(record.to_json())) == record


@given(SPECS)
def test_a_spec_survives_json(spec: SandboxSpec) -> None:
    assert SandboxSpec.from_json(travelled(spec.to_json())) == spec


@given(st.dictionaries(TEXT, st.integers() | TEXT, max_size=4))
def test_a_handle_survives_json(data: dict[str, Any]) -> None:
    handle = SandboxHandle(backend="local", sandbox_id="s", placement="here", data=data)
    assert SandboxHandle.from_json(travelled(handle.to_json())) == handle


def test_members_of_a_newer_version_are_ignored() -> None:
    assert ExecRecord.from_json({"status": "exited", "exit_code": 0, "new": 1}).ok
    assert SandboxSpec.from_json({"backend": "local", "sandbox_id": "s", "new": 1}).sandbox_id == "s"
    assert Command.from_json({"argv": ["x"], "new": 1}, b"").argv == ("x",)


def test_a_record_without_a_status_is_unknown_and_never_a_success() -> None:
    record = ExecRecord.from_json({"exit_code": 0})
    assert record.status is Status.UNKNOWN
    assert not record.ok


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.EXITED])
def test_only_an_exit_is_a_success(status: Status) -> None:
    assert not ExecRecord(status=status, exit_code=0).ok


def test_a_shell_line_and_a_list() -> None:
    assert Command.parse("a | b").argv == ("/bin/sh", "-c", "a | b")
    assert Command.parse(["a", "|", "b"]).argv == ("a", "|", "b")
    assert Command.parse(("a",)).argv == ("a",)


NO_COMMANDS = ["", " ", [], (), None, 5, b"x", bytearray(b"x"), {"a": 1}, [""], ["x", 5], ["x", None], "a\0", ["a", "\0"]]


@pytest.mark.parametrize("command", NO_COMMANDS, ids=repr)
def test_an_impossible_command_is_refused(command: Any) -> None:
    with pytest.raises(InvalidRequestError):
        Command.parse(command)


def test_the_longest_argument_is_taken_and_a_longer_one_refused() -> None:
    Command.parse(["x", "a" * MAX_ARGUMENT_BYTES])
    with pytest.raises(InvalidRequestError, match=f"{MAX_ARGUMENT_BYTES + 1} bytes.*{MAX_ARGUMENT_BYTES}"):
        Command.parse(["x", "a" * (MAX_ARGUMENT_BYTES + 1)])


def test_lengths_are_counted_in_bytes() -> None:
    with pytest.raises(InvalidRequestError):
        Command.parse(["x", "ü" * (MAX_ARGUMENT_BYTES // 2 + 1)])


def test_arguments_and_env_together_are_bounded() -> None:
    with pytest.raises(InvalidRequestError, match=str(MAX_PAYLOAD_BYTES)):
        Command.parse(["x", *["a" * 100_000] * 2], env={"A": "a" * 100_000})


OPTIONS: list[dict[str, Any]] = [
    *({"timeout_s": v} for v in (0, -1, "1", True, float("nan"), float("inf"), 1e9)),
    *({"grace_s": v} for v in (-1, "1", True, 3601, float("nan"), None)),
    *({"output_limit_bytes": v} for v in (-1, 1.5, True, "1", None, (1 << 40) + 1)),
    *({"spool_limit_bytes": v} for v in (-1, 1.5, True, "1", None)),
    *({"stdin": v} for v in ("text", None, 5)),
    *({"cwd": v} for v in ("", "a\0", 5, "x" * 4097)),
    *({"env": v} for v in ({"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": 5}, {5: "A"}, {"A": "\0"}, ["A=B"])),
    *({"env": v} for v in ({"A": "\ud800"}, {"\ud800": "A"})),
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_an_impossible_option_of_a_command_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Command.parse("true", **options)
    assert {"cwd": "path"}.get(next(iter(options)), next(iter(options))) in str(caught.value)


MEMBERS: list[dict[str, Any]] = [
    *({"sandbox_id": v} for v in ("", "../x", "-x", ".x", "a b", "x\n", "x" * 101, 5, None)),
    *({name: v} for name in ("cpus", "memory_bytes", "disk_bytes", "max_processes") for v in (0, -1, "1", True, 1e-10, math.nan, math.inf)),
    *({"lifetime_s": v} for v in (0, -1, None, "1", float("nan"))),
    {"env": {"A": 1}},
]


@pytest.mark.parametrize("members", MEMBERS, ids=repr)
def test_an_impossible_member_of_a_spec_is_refused(members: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        SandboxSpec(**{"backend": "local", "sandbox_id": "s", **members})


@pytest.mark.parametrize("value", ["a", "A9._-z", "x" * 100, "0"])
def test_a_usable_id_is_taken(value: str) -> None:
    assert check_id(value, "op id") == value


@pytest.mark.parametrize("value", ["", "a\0b", None, 5, b"x", "x" * 4097, "ü" * 2049, "\ud83d"])
def test_an_impossible_path_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="path"):
        check_path(value)


@pytest.mark.parametrize("value", ["a", "/", "x" * 4096, "caf\udce9", " \n"])
def test_a_path_of_any_bytes_is_taken(value: str) -> None:
    assert check_path(value) == value


def test_no_time_out_is_no_time_out() -> None:
    assert check_timeout_s(None) is None
    assert check_timeout_s(5) == 5.0


def test_an_env_value_is_never_in_an_error() -> None:
    for value in ("hunter2\0", "hunter2" * 20_000, "hunter2\ud800"):
        with pytest.raises(InvalidRequestError) as caught:
            check_env({"TOKEN": value})
        assert "hunter2" not in str(caught.value)


@given(ENV, ENV)
def test_a_commands_own_env_wins(below: dict[str, str], own: dict[str, str]) -> None:
    assert with_env(Command(argv=("x",), env=own), below).env == {**below, **own}


@given(COMMANDS, COMMANDS)
def test_equal_payloads_and_only_those_have_equal_digests(one: Command, other: Command) -> None:
    digests = [payload_digest("start", travelled(c.to_json()), c.stdin) for c in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)


def test_a_chunk_prints_as_text() -> None:
    assert str(OutputChunk(stream=Stream.STDOUT, offset=0, data=b"a\xff\n")) == "a\ufffd\n"


def test_a_result_gives_text() -> None:
    result = ExecResult(
        status=Status.EXITED, exit_code=0, signal=None, stdout="grün".encode(), stderr=b"\xff", truncated=False,
        stdout_bytes=5, stderr_bytes=1, duration_s=0.0, cause="",
    )  # fmt: skip
    assert (result.ok, result.text, result.stderr_text) == (True, "grün", "\ufffd")


CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ExecutorError)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_error_survives_json_and_pickle(cls: type[ExecutorError]) -> None:
    error = cls("what and why: do this", "a_code")
    for copy in (error_from_json(travelled(error_to_json(error))), pickle.loads(pickle.dumps(error)), cls(*error.args)):
        assert (type(copy), str(copy), copy.code, copy.args) == (cls, "what and why: do this", "a_code", error.args)


@pytest.mark.parametrize("data", [{}, {"error": "OSError", "args": ["x"]}, {"error": None, "args": []}, {"error": "X", "args": [1, 2, 3]}])
def test_an_unknown_error_is_still_one_of_ours(data: dict[str, Any]) -> None:
    assert type(error_from_json(data)) is ExecutorError
    assert str(error_from_json(data))


def test_only_errors_before_a_start_are_retryable() -> None:
    assert {c.__name__ for c in CLASSES if c.retryable} == {
        "BackendUnavailableError",
        "CapacityError",
        "CircuitOpenError",
        "SandboxStartError",
    }
