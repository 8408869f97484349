"""Files in and out: whole, checked, and within the allowed roots."""

from __future__ import annotations

import hashlib
import os

import pytest

from cifixer_exec import InvalidRequestError, SandboxEnvironment, SandboxFileError
from cifixer_exec.model import MIB

NAMES = {
    "spaces": "a  file with spaces ",
    "newline": "two\nlines",
    "unicode": "grüße-日本-🦀",
    "leading dash": "-rf",
    "quotes": 'it\'s "quoted" $HOME `id` \\',
    "not UTF-8": os.fsdecode(b"caf\xe9\xff"),
    "control characters": "\x01\x1b[31m\x7f",
    "255 bytes": "n" * 255,
}


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB])
def test_a_file_comes_back_byte_for_byte(sandbox: SandboxEnvironment, name: str, size: int) -> None:
    data = os.urandom(size)
    sandbox.write_file(name, data)
    assert sandbox.read_file(name) == data
    assert sandbox.run_command(["sha256sum", name]).text.split()[0] == hashlib.sha256(data).hexdigest()


def test_100_mib_come_back_byte_for_byte(fresh: SandboxEnvironment) -> None:
    data = os.urandom(100 * MIB)
    fresh.write_file("big", data)
    assert fresh.run_command("sha256sum < big").text.split()[0] == hashlib.sha256(data).hexdigest()
    assert hashlib.sha256(fresh.read_file("big")).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("odd", NAMES.values(), ids=NAMES.keys())
def test_odd_names_are_only_names(sandbox: SandboxEnvironment, name: str, odd: str) -> None:
    sandbox.write_file(f"{name}/{odd}", b"content")
    assert sandbox.read_file(f"{name}/{odd}") == b"content"
    assert [f.name for f in sandbox.list_files(name)] == [odd]
    assert sandbox.run_command(["cat", f"{name}/{odd}"]).stdout == b"content"
    sandbox.remove(f"{name}/{odd}")
    assert sandbox.list_files(name) == []


def test_text_is_written_as_utf8(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, "grüße")
    assert sandbox.read_file(name) == "grüße".encode()
    assert sandbox.read_text(name) == "grüße"


def test_a_file_that_a_command_wrote_is_read(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(f"printf 'a\\000b' > {name}")
    assert sandbox.read_file(name) == b"a\0b"


def test_parents_are_made(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(f"{name}/a/b/c", b"x")
    assert sandbox.stat(f"{name}/a/b").type == "directory"


def test_the_default_mode_is_0644(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, b"x")
    assert sandbox.stat(name).mode == 0o644


@pytest.mark.parametrize("mode", [0o755, 0o600, 0o444, 0o640])
def test_a_mode_is_set_exactly(sandbox: SandboxEnvironment, name: str, mode: int) -> None:
    sandbox.write_file(name, b"#!/bin/sh\necho ran\n", mode=mode)
    assert sandbox.stat(name).mode == mode


def test_an_executable_runs(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, b"#!/bin/sh\necho ran\n", mode=0o755)
    assert sandbox.run_command([f"./{name}"]).stdout == b"ran\n"


def test_an_overwrite_replaces_content_and_length(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, bytes(2 * MIB))
    sandbox.write_file(name, b"short")
    assert sandbox.read_file(name) == b"short"


def test_an_overwrite_does_not_touch_the_old_file(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, b"old content")
    reader = sandbox.start_command(f"exec 3< {name}; echo ready; read go; cat <&3", stdin_open=True)
    next(iter(reader.output()))
    sandbox.write_file(name, b"new")
    reader.send_stdin("go\n", eof=True)
    assert reader.wait().stdout == b"ready\nold content"


def test_an_overwrite_of_a_link_replaces_the_link(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(f"mkdir {name}; cd {name}; echo kept > target; ln -s target link")
    sandbox.write_file(f"{name}/link", b"new")
    assert sandbox.read_file(f"{name}/link") == b"new"


def test_no_temporary_file_is_left(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(f"{name}/file", bytes(3 * MIB))
    assert [f.name for f in sandbox.list_files(name)] == ["file"]


def test_a_missing_file_is_not_found_by_name(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(SandboxFileError, match="no-such-file") as caught:
        sandbox.read_file("no-such-file")
    assert caught.value.code == "not_found"


@pytest.mark.parametrize("verb", ["read_file", "write_file"])
def test_a_directory_is_no_file(sandbox: SandboxEnvironment, name: str, verb: str) -> None:
    sandbox.mkdir(name)
    with pytest.raises(SandboxFileError, match=name) as caught:
        sandbox.read_file(name) if verb == "read_file" else sandbox.write_file(name, b"x")
    assert caught.value.code == "is_a_directory"


def test_a_file_is_no_directory(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, b"x")
    with pytest.raises(SandboxFileError) as caught:
        sandbox.write_file(f"{name}/below", b"x")
    assert caught.value.code == "not_a_directory"


def test_a_file_without_permission_is_a_clear_error(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, b"x", mode=0o000)
    with pytest.raises(SandboxFileError, match=name) as caught:
        sandbox.read_file(name)
    assert caught.value.code == "permission"


def test_a_fifo_is_refused_and_does_not_hang(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(["mkfifo", name])
    with pytest.raises((SandboxFileError, InvalidRequestError), match=name):
        sandbox.read_file(name)


def test_an_endless_file_is_refused_or_empty(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(["ln", "-s", "/dev/zero", name])
    with pytest.raises((SandboxFileError, InvalidRequestError)):
        sandbox.read_file(name)


OUTSIDE = ["/etc/passwd", "/proc/1/environ", "/", "/usr/bin/env", "../../etc/passwd", "/tmp/../etc/passwd", "/run/cifixer/runner"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_reading_outside_the_allowed_roots_is_refused_by_name(sandbox: SandboxEnvironment, path: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sandbox.read_file(path)
    assert caught.value.code == "path_not_allowed"
    assert path.rpartition("/")[2] in str(caught.value)


@pytest.mark.parametrize("verb", ["write_file", "stat", "list_files", "mkdir", "remove", "exists"])
def test_every_verb_refuses_a_path_outside(sandbox: SandboxEnvironment, verb: str) -> None:
    arguments = ("/etc/evil", b"x") if verb == "write_file" else ("/etc/evil",)
    with pytest.raises(InvalidRequestError) as caught:
        getattr(sandbox, verb)(*arguments)
    assert caught.value.code == "path_not_allowed"


def test_a_link_does_not_lead_a_read_outside(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(["ln", "-s", "/etc/passwd", name])
    with pytest.raises(InvalidRequestError) as caught:
        sandbox.read_file(name)
    assert caught.value.code == "path_not_allowed"


@pytest.mark.parametrize("verb", ["read_file", "write_file", "mkdir", "remove", "stat", "list_files"])
def test_a_link_to_a_directory_does_not_lead_outside(sandbox: SandboxEnvironment, name: str, verb: str) -> None:
    sandbox.run_command(["ln", "-s", "/run/cifixer", name])
    arguments = (f"{name}/spool", b"x") if verb == "write_file" else (f"{name}/spool",)
    with pytest.raises(InvalidRequestError) as caught:
        getattr(sandbox, verb)(*arguments)
    assert caught.value.code == "path_not_allowed"


@pytest.mark.parametrize(("path", "said"), [("", "empty"), ("a\0b", "NUL"), ("x" * 5000, "4096"), (b"bytes", "bytes"), (None, "NoneType")])
def test_an_impossible_path_is_refused(sandbox: SandboxEnvironment, path: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        sandbox.read_file(path)


def test_a_name_that_is_too_long_is_a_clear_error(sandbox: SandboxEnvironment) -> None:
    with pytest.raises((SandboxFileError, InvalidRequestError)):
        sandbox.write_file("n" * 300, b"x")
    assert sandbox.run_command("true").ok
