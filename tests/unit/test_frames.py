"""Frames and documents: what goes in comes out, and nothing else gets through."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec.channel.frames import (
    MAX_FRAME_BYTES,
    Answer,
    Frame,
    FrameParser,
    FrameType,
    MalformedFrameError,
    decode_document,
    decode_output,
    encode_credit,
    encode_document,
    encode_frame,
)

TYPES = st.sampled_from(FrameType)
CALLS = st.integers(0, 2**32 - 1)
FRAMES = st.lists(st.builds(Frame, TYPES, CALLS, st.binary(max_size=300)), max_size=8)
#: Any text a file name can become: bytes that are not UTF-8 are low surrogates.
NAMES = st.binary(max_size=20).map(lambda b: b.decode("utf-8", "surrogateescape"))
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | NAMES, st.lists)


def parse(data: bytes, cuts: list[int], bound: int = MAX_FRAME_BYTES) -> list[Frame]:
    """All frames of ``data`` fed in pieces; what is buffered never exceeds the bound and one frame's header."""
    parser, found = FrameParser(bound), []
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    for start, end in pairwise(edges):
        found += list(parser.feed(data[start:end]))
        assert parser.buffered_bytes <= bound + 9
    return found


@given(FRAMES, st.lists(st.integers(0, 5000), max_size=10))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[Frame], cuts: list[int]) -> None:
    assert parse(b"".join(encode_frame(f.type, f.call, f.payload) for f in frames), cuts) == frames


@given(st.binary(max_size=2000), st.lists(st.integers(0, 5000), max_size=10))
def test_any_bytes_are_frames_or_malformed(data: bytes, cuts: list[int]) -> None:
    with suppress(MalformedFrameError):
        parse(data, cuts, 500)


@given(FRAMES, st.integers(0, 3000), st.integers(0, 255))
def test_one_wrong_byte_is_frames_or_malformed(frames: list[Frame], position: int, value: int) -> None:
    data = bytearray(b"".join(encode_frame(f.type, f.call, f.payload) for f in frames))
    if data:
        data[position % len(data)] = value
    with suppress(MalformedFrameError):
        parse(bytes(data), [7, 100, 1000])


@pytest.mark.parametrize("seed", range(30))
def test_long_noise_is_malformed_soon(seed: int) -> None:
    noise = random.Random(seed).randbytes(200_000)
    with pytest.raises(MalformedFrameError):
        parse(noise, list(range(0, len(noise), 999)), 1000)


@pytest.mark.parametrize("length", [0, 4, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_malformed_before_its_bytes_come(length: int) -> None:
    parser = FrameParser()
    with pytest.raises(MalformedFrameError, match=str(length)):
        list(parser.feed(struct.pack(">IBI", length, FrameType.REPLY, 1)))


@pytest.mark.parametrize("length", [5, 6, MAX_FRAME_BYTES])
def test_a_length_within_bounds_is_waited_for(length: int) -> None:
    parser = FrameParser()
    assert list(parser.feed(struct.pack(">IBI", length, FrameType.REPLY, 1)[:8])) == []
    assert parser.buffered_bytes == 8


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.binary(max_size=200))
def test_documents_come_out_as_they_went_in(document: dict[str, Any], body: bytes) -> None:
    assert decode_document(encode_document(document, body)) == Answer(document, body)


@given(NAMES)
def test_a_name_of_any_bytes_survives(name: str) -> None:
    found = decode_document(encode_document({"path": name})).document["path"]
    assert found.encode("utf-8", "surrogateescape") == name.encode("utf-8", "surrogateescape")


@given(st.binary(max_size=300))
def test_any_payload_is_a_document_or_malformed(payload: bytes) -> None:
    with suppress(MalformedFrameError):
        assert isinstance(decode_document(payload).document, dict)


@given(st.text(alphabet='{}[]",:0123456789.eE+-tfnul\\ \ud800', max_size=60))
def test_any_json_like_text_is_a_document_or_malformed(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    with suppress(MalformedFrameError):
        assert isinstance(decode_document(struct.pack(">I", len(raw)) + raw).document, dict)


BAD = [b"", b"\0\0\0", struct.pack(">I", 3) + b"{}", b"\0\0\0\2[]", b"\0\0\0\4null", b"\0\0\0\1{", struct.pack(">I", 2**31) + b"{}"]


@pytest.mark.parametrize("payload", BAD)
def test_what_is_no_document_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedFrameError):
        decode_document(payload)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"1" * 5000 + b"}"])
def test_documents_made_to_exhaust_the_reader_are_malformed(text: bytes) -> None:
    with pytest.raises(MalformedFrameError):
        decode_document(struct.pack(">I", len(text)) + text)


@given(st.sampled_from([1, 2]), st.integers(0, 2**62 - 1), st.binary(min_size=1, max_size=100))
def test_output_frames_come_out_as_they_went_in(stream: int, offset: int, data: bytes) -> None:
    assert decode_output(struct.pack(">BQ", stream, offset) + data) == (stream, offset, data)


@given(st.binary(max_size=40))
def test_any_payload_is_output_or_malformed(payload: bytes) -> None:
    with suppress(MalformedFrameError):
        stream, offset, data = decode_output(payload)
        assert stream in (1, 2)
        assert 0 <= offset < 1 << 62
        assert data


def test_credit_is_a_frame_with_a_number() -> None:
    assert list(FrameParser().feed(encode_credit(7, 65536))) == [Frame(FrameType.CREDIT, 7, struct.pack(">I", 65536))]
