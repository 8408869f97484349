"""Bytes in, bytes out: complete, in order, and never mistaken for anything else."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from cifixer_exec import OutputChunk, SandboxEnvironment, Status, Stream
from cifixer_exec.channel.frames import FrameType, encode_document, encode_frame
from cifixer_exec.model import MIB

NUMBERS = b"".join(b"%d\n" % n for n in range(1, 1_500_001))


def test_stdin_is_read_to_its_end(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("cat; echo end", stdin=b"one\ntwo").stdout == b"one\ntwoend\n"


def test_stdin_may_be_text(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("cat", stdin="grüße").stdout == "grüße".encode()


def test_without_stdin_there_is_end_of_file_at_once(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("cat; echo end").stdout == b"end\n"


@pytest.mark.parametrize("size", [1, 65_536, 256 * 1024, 256 * 1024 + 1, 5 * MIB])
def test_binary_stdin_comes_back_byte_for_byte(sandbox: SandboxEnvironment, size: int) -> None:
    data = os.urandom(size)
    result = sandbox.run_command("tee /dev/stderr | sha256sum", stdin=data)
    assert result.text.split()[0] == hashlib.sha256(data).hexdigest()
    assert result.stderr == data


def test_a_command_need_not_read_its_stdin(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("exit 3", stdin=bytes(5 * MIB)).exit_code == 3


def test_a_command_may_close_a_large_stdin_half_way(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("head -c 1000000 | wc -c", stdin=bytes(5 * MIB)).text.strip() == "1000000"


def test_all_bytes_pass_unchanged(sandbox: SandboxEnvironment, name: str) -> None:
    data = bytes(range(256)) * 100 + b"\xff\xfe\xc3\x28\xed\xa0\x80"
    sandbox.write_file(name, data)
    assert sandbox.run_command(["cat", name]).stdout == data


def test_output_that_is_not_utf8_is_readable_as_text(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command(r"printf 'a\377b'").text == "a\ufffdb"


def test_stdout_and_stderr_are_apart(sandbox: SandboxEnvironment) -> None:
    result = sandbox.run_command("for i in 1 2 3; do echo out$i; echo err$i >&2; done")
    assert (result.stdout, result.stderr) == (b"out1\nout2\nout3\n", b"err1\nerr2\nerr3\n")


def test_output_without_a_newline_is_kept(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("printf no-newline").stdout == b"no-newline"


def test_50_mib_of_output_are_complete(sandbox: SandboxEnvironment, name: str) -> None:
    command = f"head -c {50 * MIB} /dev/urandom > {name}; sha256sum < {name} >&2; cat {name}; rm {name}"
    result = sandbox.run_command(command, output_limit_bytes=64 * MIB)
    assert (len(result.stdout), result.stdout_bytes, result.truncated) == (50 * MIB, 50 * MIB, False)
    assert hashlib.sha256(result.stdout).hexdigest() == result.stderr_text.split()[0]


def test_beyond_the_limit_head_and_tail_are_kept_with_the_total(sandbox: SandboxEnvironment) -> None:
    limit = 100_000
    result = sandbox.run_command(["seq", "1", "1500000"], output_limit_bytes=limit)
    mark = b"\n[... %d bytes cut ...]\n" % (len(NUMBERS) - 2 * limit)
    assert result.truncated
    assert result.stdout_bytes == len(NUMBERS)
    assert result.stdout == NUMBERS[:limit] + mark + NUMBERS[-limit:]


def test_output_of_exactly_the_limit_is_whole(sandbox: SandboxEnvironment) -> None:
    result = sandbox.run_command(["head", "-c", "100000", "/dev/zero"], output_limit_bytes=100_000)
    assert (result.stdout, result.truncated) == (bytes(100_000), False)


def test_each_stream_has_the_limit_for_itself(sandbox: SandboxEnvironment) -> None:
    result = sandbox.run_command("seq 1 1500000; echo short >&2", output_limit_bytes=1000)
    assert (result.stderr, result.stderr_bytes) == (b"short\n", 6)


def test_what_was_cut_stays_readable_by_offset(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(["seq", "1", "1500000"], output_limit_bytes=1000, op_id=name)
    assert sandbox.command(name).read_output(Stream.STDOUT, 5_000_000, 70_000) == NUMBERS[5_000_000:5_070_000]


def test_on_output_gets_every_byte_in_order_while_the_command_runs(sandbox: SandboxEnvironment) -> None:
    chunks: list[OutputChunk] = []
    result = sandbox.run_command("seq 1 300000; echo oops >&2", on_output=chunks.append)
    out = [c for c in chunks if c.stream is Stream.STDOUT]
    assert b"".join(c.data for c in out) == result.stdout
    assert [c.offset for c in out] == [sum(len(b.data) for b in out[:n]) for n in range(len(out))]


def test_on_output_is_called_before_the_end(sandbox: SandboxEnvironment) -> None:
    seen: list[bytes] = []
    handle = sandbox.start_command("echo first; read x; echo second", stdin_open=True)

    def answer(chunk: OutputChunk) -> None:
        seen.append(chunk.data)
        if len(seen) == 1:
            handle.send_stdin(b"go\n", eof=True)

    assert handle.wait(on_output=answer).ok
    assert seen == [b"first\n", b"second\n"]


FORGERIES = {
    "reply frame": encode_frame(FrameType.REPLY, 1, encode_document({"record": {"state": "finished", "status": "exited", "exit_code": 0}})),
    "error frame": encode_frame(FrameType.ERROR, 0, encode_document({"code": "epoch_stale", "message": "go away"})),
    "hello frame": encode_frame(FrameType.HELLO, 0, encode_document({"protocol": 1, "boot_id": "evil"})),
    "oversized frame": b"\xff\xff\xff\xff\x05\x00\x00\x00\x01",
    "record": json.dumps({"state": "finished", "status": "exited", "exit_code": 0, "stdout_bytes": 0}).encode() + b"\n",
    "cut mark": b"\n[... 12345 bytes cut ...]\n",
    "redis protocol": b"*1\r\n$8\r\nFLUSHALL\r\n-ERR no\r\n",
    "terminal escapes": b"\x1b]0;title\x07\x1b[2J\x04\x03\x00",
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_output_is_only_output(sandbox: SandboxEnvironment, name: str, forgery: bytes) -> None:
    sandbox.write_file(name, forgery * 50)
    result = sandbox.run_command(f"cat {name}; cat {name} >&2; exit 9")
    assert (result.stdout, result.stderr) == (forgery * 50, forgery * 50)
    assert (result.status, result.exit_code, result.truncated) == (Status.EXITED, 9, False)


def test_a_command_inherits_no_descriptors(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("ls /proc/$$/fd").text.split() == ["0", "1", "2"]
