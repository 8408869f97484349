"""The channel against runners that misbehave, and a real one over a connection that keeps breaking."""

from __future__ import annotations

import asyncio
import hashlib
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.channel import connection
from cifixer_exec.channel.channel import Channel
from cifixer_exec.channel.connection import Connection, EpochStaleError
from cifixer_exec.channel.frames import FrameType, encode_document, encode_frame
from cifixer_exec.errors import BackendError, ExecutorError, SandboxLostError
from cifixer_exec.model import MIB, Command, ExecRecord, Inspection, OutputChunk, SandboxSpec, Status
from tests.support.contract_fake_runner import FINISHED, Behaviour, Document, Peer, cutting_proxy, fake_channel
from tests.support.contract_stack import check_present
from tests.support.run import run

COMMAND = Command(argv=("true",))


def output(call: int, offset: int, data: bytes, stream: int = 1) -> bytes:
    return encode_frame(FrameType.OUTPUT, call, struct.pack(">BQ", stream, offset) + data)


def document_frame(call: int, text: bytes, size: int | None = None) -> bytes:
    return encode_frame(FrameType.REPLY, call, struct.pack(">I", len(text) if size is None else size) + text)


async def collect(channel: Channel) -> tuple[bytes, ExecRecord]:
    """The stdout and the record of one command."""
    pieces: list[bytes] = []
    async for item in channel.run("op", COMMAND):
        if isinstance(item, ExecRecord):
            return b"".join(pieces), item
        assert isinstance(item, OutputChunk)
        pieces.append(item.data)
    raise AssertionError("the run ended without a record")


def request(behaviour: Behaviour, **options: Any) -> Any:
    """What one request to such a runner gives."""

    async def go() -> Any:
        async with fake_channel(behaviour, **options) as channel:
            return (await channel.request("stats", {})).document

    return run(go())


def command(behaviour: Behaviour, **options: Any) -> tuple[bytes, ExecRecord]:
    """What one command on such a runner gives."""

    async def go() -> tuple[bytes, ExecRecord]:
        async with fake_channel(behaviour, **options) as channel:
            return await collect(channel)

    return run(go())


NONSENSE: dict[str, bytes] = {
    "garbage": b"\xff" * 1000,
    "text": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "oversized length": struct.pack(">IBI", 1 << 31, 3, 1),
    "just over the limit": struct.pack(">IBI", 2 * MIB + 1, 3, 1),
    "too small a length": struct.pack(">IBI", 4, 3, 1),
    "zero length": bytes(9),
    "unknown type": struct.pack(">IBI", 5, 99, 1),
    "type 0": struct.pack(">IBI", 5, 0, 1),
    "second hello": encode_frame(FrameType.HELLO, 0, encode_document({"protocol": 1})),
    "a request": encode_frame(FrameType.REQUEST, 0, encode_document({"verb": "start"})),
    "a request in a call": encode_frame(FrameType.REQUEST, 1, encode_document({"verb": "start"})),
    "credit": encode_frame(FrameType.CREDIT, 1, bytes(4)),
    "cancel": encode_frame(FrameType.CANCEL, 1),
    "output without credit": output(1, 0, b"x"),
    "output for the connection": output(0, 0, b"x"),
    "empty output": output(1, 0, b""),
    "third stream": output(1, 0, b"x", stream=3),
    "offset without bounds": output(1, 1 << 62, b"x"),
    "no document": encode_frame(FrameType.REPLY, 1),
    "document too long": document_frame(1, b"{}", 1 << 30),
    "document longer than the frame": document_frame(1, b"{}", 3),
    "no JSON": document_frame(1, b"{oops"),
    "a JSON list": document_frame(1, b"[1]"),
    "not UTF-8": document_frame(1, b'{"a":"\xff"}'),
    "deep JSON": document_frame(1, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "huge number": document_frame(1, b'{"a":' + b"9" * 10_000 + b"}"),
    "error without document": encode_frame(FrameType.ERROR, 1, b"oops"),
    "error for the connection without document": encode_frame(FrameType.ERROR, 0, b"oops"),
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
def test_a_runner_that_talks_nonsense_is_lost(nonsense: bytes) -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello()
        await peer.request()
        await peer.send(nonsense)
        await peer.stay()

    with pytest.raises(SandboxLostError):
        request(behave)


@pytest.mark.parametrize("nonsense", [b"", b"\xff" * 100, b"\0\0\0\5\7\0\0\0\0", document_frame(0, b"{}")])
def test_a_runner_that_cannot_greet_is_lost(nonsense: bytes) -> None:
    async def behave(peer: Peer) -> None:
        await peer.send(nonsense)

    with pytest.raises(SandboxLostError):
        request(behave)


@pytest.mark.parametrize("hello", [{"protocol": 2}, {"protocol": "1"}, {"protocol": None}, {"protocol": [1]}, {"protocol": 1.5}])
def test_a_runner_of_another_protocol_is_lost(hello: Document) -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello(**hello)
        await peer.stay()

    with pytest.raises(SandboxLostError):
        request(behave)


def test_a_runner_that_never_greets_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Connection.open.__func__.__kwdefaults__, "timeout_s", 0.2)  # type: ignore[attr-defined]
    with pytest.raises(SandboxLostError, match="greet"):
        request(lambda peer: peer.stay())


def test_a_runner_that_goes_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(connection, "SILENCE_S", 0.2)

    async def behave(peer: Peer) -> None:
        await peer.hello()
        await peer.stay()

    with pytest.raises(SandboxLostError, match="silent"):
        request(behave)


def test_a_quiet_runner_that_answers_pings_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(connection, "SILENCE_S", 0.4)

    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, _ = await peer.request()
        for _ in range(20):
            await asyncio.sleep(0.05)
            await peer.send(encode_frame(FrameType.PONG, 0))
        await peer.reply(call, {"late": True})
        await peer.stay()

    assert request(behave) == {"late": True}


@pytest.mark.parametrize("part", [b"", b"\0", b"\0\0\0\x0a\3\0\0\0\1", b"\0\0\0\x0a\3\0\0\0\1\0\0"])
def test_a_runner_that_closes_in_mid_frame_is_lost_in_the_end(part: bytes) -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello()
        await peer.request()
        await peer.send(part)

    with pytest.raises(SandboxLostError, match="times without an answer"):
        request(behave)


def test_a_request_is_sent_again_after_a_cut() -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, document = await peer.request()
        if peer.number > 2:
            await peer.reply(call, {"verb": document["verb"], "connection": peer.number})
            await peer.stay()

    assert request(behave) == {"verb": "stats", "connection": 3}


def test_output_is_asked_for_from_where_it_was_cut() -> None:
    data = os.urandom(1000)

    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, document = await peer.request()
        offset = document["attach"]["stdout_offset"]
        await peer.send(output(call, offset, data[offset : offset + 300]))
        if offset + 300 >= len(data):
            await peer.reply(call, {"record": {**FINISHED, "stdout_bytes": 1000}})
            await peer.stay()

    assert command(behave)[0] == data


def test_output_that_is_repeated_is_passed_on_once() -> None:
    data = os.urandom(1000)

    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, _ = await peer.request()
        for offset in (0, 0, 200, 100, 500):
            await peer.send(output(call, offset, data[offset : offset + 500]))
        await peer.reply(call, {"record": FINISHED})
        await peer.stay()

    assert command(behave)[0] == data


def test_more_output_than_credit_is_lost() -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, document = await peer.request()
        start = document["attach"]["stdout_offset"]
        for n in range(17):
            await peer.send(output(call, start + n * 65536, bytes(65536)))
        await peer.stay()

    async def go() -> None:
        async with fake_channel(behave) as channel:
            async for _ in channel.run("op", COMMAND):
                await asyncio.sleep(0.05)  # a slow reader gives no credit back meanwhile

    with pytest.raises(SandboxLostError, match="credit"):
        run(go())


def test_a_slow_reader_keeps_no_more_than_the_window() -> None:
    sent = 0

    async def behave(peer: Peer) -> None:
        nonlocal sent
        await peer.hello()
        call, document = await peer.request()
        credit = document["attach"]["window_bytes"]
        while True:
            while credit >= 65536:
                await peer.send(output(call, sent, bytes(65536)))
                sent += 65536
                credit -= 65536
            frame = await peer.frame()
            assert frame.type is FrameType.CREDIT
            credit += struct.unpack(">I", frame.payload)[0]

    async def go() -> None:
        taken = 0
        async with fake_channel(behave) as channel:
            async for item in channel.run("op", COMMAND):
                assert isinstance(item, OutputChunk)
                taken += len(item.data)
                assert sent <= taken + 2 * MIB
                if taken > 8 * MIB:
                    return

    run(go())


RECORDS: dict[str, Any] = {
    "missing": None,
    "a list": [],
    "a text": "exited",
    "running": {**FINISHED, "state": "running"},
    "no state": {k: v for k, v in FINISHED.items() if k != "state"},
    "exit without a code": {**FINISHED, "exit_code": None},
    "code as text": {**FINISHED, "exit_code": "0"},
    "code as bool": {**FINISHED, "exit_code": True},
    "code as float": {**FINISHED, "exit_code": 0.0},
    "code out of range": {**FINISHED, "exit_code": 256},
    "negative code": {**FINISHED, "exit_code": -1},
    "unknown status": {**FINISHED, "status": "splendid"},
    "status as number": {**FINISHED, "status": 5},
    "status as list": {**FINISHED, "status": ["exited"]},
    "status lost": {**FINISHED, "status": "sandbox_lost", "exit_code": 0},
    "signal as number": {**FINISHED, "signal": 9},
    "negative size": {**FINISHED, "stdout_bytes": -1},
    "size as text": {**FINISHED, "stdout_bytes": "many"},
    "size without bounds": {**FINISHED, "stdout_bytes": 1 << 80},
    "duration missing": {**FINISHED, "duration_s": None},
    "duration as bool": {**FINISHED, "duration_s": True},
    "duration NaN": {**FINISHED, "duration_s": float("nan")},
    "duration infinite": {**FINISHED, "duration_s": float("inf")},
    "negative duration": {**FINISHED, "duration_s": -1},
    "truncated as text": {**FINISHED, "spool_truncated": "yes"},
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_a_record_that_cannot_be_is_never_a_result(record: Any) -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, _ = await peer.request()
        await peer.reply(call, {"record": record})
        await peer.stay()

    with pytest.raises(SandboxLostError, match="malformed"):
        command(behave)


def test_a_cause_and_a_signal_are_bounded_text() -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, _ = await peer.request()
        await peer.reply(call, {"record": {**FINISHED, "cause": "x" * 500_000}})
        await peer.stay()

    assert len(command(behave)[1].cause) <= 2000


def test_a_runner_that_was_restarted_is_lost() -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello(boot_id=str(peer.number))
        await peer.request()

    with pytest.raises(SandboxLostError, match="restarted"):
        request(behave)


def test_a_stale_epoch_is_told_and_not_tried_again() -> None:
    connections = 0

    async def behave(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        await peer.hello()
        await peer.request()
        await peer.send(encode_frame(FrameType.ERROR, 0, encode_document({"code": "epoch_stale", "message": "newer"})))
        await peer.stay()

    async def go() -> None:
        async with fake_channel(behave) as channel:
            for _ in range(2):
                with pytest.raises(EpochStaleError):
                    await channel.request("stats", {})

    run(go())
    assert connections == 1


@pytest.mark.parametrize("error", [{}, {"code": 5, "message": ["x"]}, {"code": "x" * 100_000, "message": "y" * 100_000}, {"code": None}])
def test_an_odd_error_is_still_one_of_ours(error: Document) -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, _ = await peer.request()
        await peer.send(encode_frame(FrameType.ERROR, call, encode_document(error)))
        await peer.stay()

    with pytest.raises(ExecutorError) as caught:
        request(behave)
    assert len(str(caught.value)) <= 2000


def test_answers_for_calls_that_nobody_made_are_dropped() -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, _ = await peer.request()
        for other in (call + 1, 77, 1 << 31):
            await peer.reply(other, {"not": "yours"})
            await peer.send(output(other, 0, b"x"))
        await peer.reply(call, {"is": "yours"})
        await peer.stay()

    assert request(behave) == {"is": "yours"}


def test_a_flood_of_pings_is_answered_and_does_no_harm() -> None:
    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, _ = await peer.request()
        await peer.send(encode_frame(FrameType.PING, 0, b"p" * 100_000) * 10 + encode_frame(FrameType.PING, 0) * 10_000)
        await peer.reply(call, {"ok": 1})
        await peer.stay()

    assert request(behave) == {"ok": 1}


def test_a_dead_sandbox_is_lost_with_its_cause() -> None:
    async def behave(peer: Peer) -> None:
        await peer.frame()

    with pytest.raises(SandboxLostError, match="it fell over"):
        request(behave, alive=False)


def test_a_socket_that_is_gone_is_lost_within_bounds() -> None:
    async def go() -> None:
        async def dial() -> Any:
            raise FileNotFoundError("no socket")

        async def inspect() -> Inspection:
            return Inspection(alive=True)

        await Channel(dial=dial, inspect=inspect, epoch=0, client="t", reconnect_s=0.3).request("stats", {})

    with pytest.raises(SandboxLostError, match="no socket"):
        run(go())


def test_a_platform_that_does_not_answer_is_told() -> None:
    async def go() -> None:
        async def dial() -> Any:
            raise ConnectionRefusedError

        async def inspect() -> Inspection:
            raise BackendError("the platform does not answer")

        await Channel(dial=dial, inspect=inspect, epoch=0, client="t", reconnect_s=0.3).request("stats", {})

    with pytest.raises(BackendError, match="platform"):
        run(go())


def test_many_calls_share_one_connection() -> None:
    connections = 0

    async def behave(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        await peer.hello()
        calls = [await peer.request() for _ in range(50)]
        for call, document in reversed(calls):
            await peer.reply(call, {"n": document["n"]})
        await peer.stay()

    async def go() -> list[Any]:
        async with fake_channel(behave) as channel:
            answers = await asyncio.gather(*(channel.request("stats", {"n": n}) for n in range(50)))
            return [a.document["n"] for a in answers]

    assert run(go()) == list(range(50))
    assert connections == 1


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_never_end_in_another_error(seed: int) -> None:
    noise = hashlib.shake_256(str(seed).encode()).digest(5000)

    async def behave(peer: Peer) -> None:
        await peer.hello()
        await peer.request()
        await peer.send(struct.pack(">I", 5 + seed * 40) + bytes([1 + seed % 9]) + noise)

    with pytest.raises(ExecutorError):
        request(behave)


@asynccontextmanager
async def real_channel(directory: Path, every_bytes: int) -> AsyncIterator[tuple[Channel, list[int]]]:
    """A channel to a real sandbox through a proxy that cuts."""
    config = AppConfig(dispatch="direct", state_dir=directory)
    check_present("local", config)
    backend = make_backend(config)
    handle = await asyncio.to_thread(backend.create, SandboxSpec(backend="local", sandbox_id="cut", lifetime_s=120))

    async def inspect() -> Inspection:
        return await asyncio.to_thread(backend.inspect, handle)

    try:
        async with cutting_proxy(backend.dial(handle), every_bytes) as (dial, cuts):
            channel = Channel(dial=dial, inspect=inspect, epoch=0, client="test")
            yield channel, cuts
            channel.close()
    finally:
        await asyncio.to_thread(backend.destroy, handle)


@pytest.mark.parametrize("every_bytes", [90_001, 300_007, 1_000_003])
def test_not_a_byte_is_lost_or_repeated_over_a_breaking_connection(tmp_path: Path, every_bytes: int) -> None:
    script = "head -c 5242880 /dev/urandom > f; sha256sum f >&2; echo run >> runs; cat f; cat runs >&2"
    wanted = Command(argv=("/bin/sh", "-c", script), env={"PATH": "/usr/bin:/bin"}, timeout_s=60)

    async def go() -> None:
        async with real_channel(tmp_path, every_bytes) as (channel, cuts):
            streams = {"stdout": b"", "stderr": b""}
            async for item in channel.run("op", wanted):
                if isinstance(item, OutputChunk):
                    assert item.offset == len(streams[item.stream])
                    streams[item.stream] += item.data
                else:
                    assert item == replace(item, status=Status.EXITED, exit_code=0, stdout_bytes=5 * MIB)
            assert len(cuts) >= 5 * MIB // every_bytes
            assert streams["stderr"].split() == [hashlib.sha256(streams["stdout"]).hexdigest().encode(), b"f", b"run"]

    run(go(), 90)


def test_stdin_and_files_survive_a_breaking_connection(tmp_path: Path) -> None:
    data = os.urandom(3 * MIB)
    wanted = Command(argv=("sha256sum",), env={"PATH": "/usr/bin:/bin"}, stdin_open=True, timeout_s=60)

    async def feed(channel: Channel) -> None:
        sent = 0
        while sent < len(data):
            piece = data[sent : sent + 200_000]
            arguments = {"op_id": "op", "offset": sent, "eof": sent + len(piece) == len(data)}
            sent = int((await channel.request("stdin", arguments, piece)).document["accepted_bytes"])  # counted from the first byte of all

    async def go() -> None:
        async with real_channel(tmp_path, 700_001) as (channel, cuts):
            await channel.start("op", wanted)
            await feed(channel)
            found = b""
            async for item in channel.attach("op"):
                found += item.data if isinstance(item, OutputChunk) else b""
            assert found.split()[0] == hashlib.sha256(data).hexdigest().encode()
            assert len(cuts) >= 3

    run(go(), 90)
