"""The Docker daemon's frames and answers, wherever the reads cut them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec.backends.docker_local.stream import SAID_BYTES, FrameSplitter, UnixEndpoint, dial_exec

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def frame(stream: int, payload: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=12), st.data())
def test_frames_are_taken_apart_wherever_they_are_cut(frames: list[tuple[int, bytes]], data: st.DataObject) -> None:
    raw = b"".join(frame(*f) for f in frames)
    splitter, output = FrameSplitter(), b""
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        output += splitter.feed(raw[:size])
        raw = raw[size:]
    assert output == b"".join(p for s, p in frames if s == 1)
    assert splitter.said == b"".join(p for s, p in frames if s == 2)
    assert splitter.between_frames


@pytest.mark.parametrize("raw", [b"\x03\0\0\0\0\0\0\x01x", b"\x01\0\x01\0\0\0\0\x01x", b"HTTP/1.1 500"])
def test_what_is_no_frame_is_an_error(raw: bytes) -> None:
    with pytest.raises(ConnectionError, match="frame should begin"):
        FrameSplitter().feed(raw)


def test_only_the_end_of_what_was_said_is_kept() -> None:
    splitter = FrameSplitter()
    splitter.feed(frame(2, b"x" * 100_000) + frame(2, b"end"))
    assert len(splitter.said) == SAID_BYTES
    assert splitter.said.endswith(b"xend")


def test_a_frame_that_was_begun_is_not_between_frames() -> None:
    splitter = FrameSplitter()
    assert splitter.feed(frame(1, b"abc")[:-1]) == b"ab"
    assert not splitter.between_frames


CREATED = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n" + b'{"Id": "e1"}'
CHUNKED = b'HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"Id"\r\n7\r\n: "e1"}\r\n0\r\n\r\n'
UPGRADED = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
GONE = b'HTTP/1.1 409 Conflict\r\nContent-Length: 34\r\n\r\n{"message": "it is not running"}  '


def talk(directory: Path, answers: list[bytes]) -> bytes:
    """All that a dialled stream gives when the daemon answers each request so and then closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            if await reader.read(65536):
                writer.write(answer)
        await writer.drain()
        writer.close()

    async def dial() -> bytes:
        async with await asyncio.start_unix_server(serve, str(directory / "d.sock")):
            endpoint = UnixEndpoint(str(directory / "d.sock"))
            transport = await dial_exec(endpoint, api_version="1.41", container="c", user="0", command=["x"])
            received = b""
            try:
                while data := await transport.receive():
                    received += data
            finally:
                transport.close()
            return received

    return asyncio.run(dial())


@pytest.mark.parametrize("created", [CREATED, CHUNKED], ids=["whole", "chunked"])
def test_output_follows_the_upgrade_at_once(tmp_path: Path, created: bytes) -> None:
    assert talk(tmp_path, [created, UPGRADED + frame(1, b"out") + frame(2, b"err")]) == b"out"


REFUSALS = {
    "not running": ([GONE], "it is not running"),
    "no http": ([b"what?\r\n\r\n"], "cannot be understood"),
    "closed at once": ([], "cannot be understood|reset"),
    "cut in a frame": ([CREATED, UPGRADED + frame(1, b"out")[:-1]], "within a frame"),
    "the bridge failed": ([CREATED, UPGRADED + frame(2, b"no socket\n")], "no socket"),
    "no object": ([b'HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\n"no"'], "no JSON object"),
    "too long": ([b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n"], "cannot be understood"),
}


@pytest.mark.parametrize("how", REFUSALS)
def test_what_goes_wrong_is_an_os_error_that_says_it(tmp_path: Path, how: str) -> None:
    answers, said = REFUSALS[how]
    with pytest.raises(OSError, match=said):
        talk(tmp_path, answers)
