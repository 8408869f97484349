"""Frames and documents of the runner protocol (docs/protocol.md §2), both ways, without any I/O.

What comes from a sandbox is untrusted: sizes are checked before anything is kept, and every malformed frame
is a :class:`MalformedFrameError`, never another exception.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

MAX_FRAME_BYTES = 2 * 1024 * 1024
MAX_DOCUMENT_BYTES = 1024 * 1024
_HEADER = struct.Struct(">IBI")
_LENGTH = struct.Struct(">I")
_OUTPUT = struct.Struct(">BQ")
_HEAD_BYTES = 5  # type and call: what the length counts besides the payload


class FrameType(IntEnum):
    """The first byte after the length."""

    HELLO = 1
    REQUEST = 2
    REPLY = 3
    ERROR = 4
    OUTPUT = 5
    CREDIT = 6
    CANCEL = 7
    PING = 8
    PONG = 9


class MalformedFrameError(Exception):
    """Bytes that are not the protocol."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; ``payload`` is still raw."""

    type: FrameType
    call: int
    payload: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Answer:
    """A REPLY: its JSON document and the raw bytes behind it."""

    document: Mapping[str, Any]
    body: bytes = b""


def encode_frame(type_: FrameType, call: int, *payload: bytes | bytearray | memoryview) -> bytes:
    """The bytes of one frame; its payload may come in parts, so that a body of a mebibyte is copied once."""
    return b"".join((_HEADER.pack(sum(map(len, payload)) + _HEAD_BYTES, type_, call), *payload))


def document_parts(document: Mapping[str, Any], body: bytes | memoryview = b"") -> tuple[bytes | memoryview, ...]:
    """The parts of a payload: length, JSON, body. Surrogates (non-UTF-8 file names) travel as ``\\udcXX`` escapes."""
    text = json.dumps(document, separators=(",", ":")).encode("ascii")
    return _LENGTH.pack(len(text)), text, body


def encode_document(document: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    """The payload of :func:`document_parts` as one."""
    return b"".join(document_parts(document, body))


def decode_document(payload: bytes | bytearray) -> Answer:
    """The inverse of :func:`encode_document`.

    Raises:
        MalformedFrameError: lengths that do not fit, or no JSON object.
    """
    if len(payload) < _LENGTH.size:
        raise MalformedFrameError(f"a document of {len(payload)} bytes has no length")
    (size,) = _LENGTH.unpack_from(payload)
    end = _LENGTH.size + size
    if size > MAX_DOCUMENT_BYTES or end > len(payload):
        raise MalformedFrameError(f"a document says {size} bytes, the frame has {len(payload) - _LENGTH.size}")
    try:
        document = json.loads(payload[_LENGTH.size : end].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedFrameError(f"a document is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise MalformedFrameError("a document is not a JSON object")
    return Answer(document, bytes(memoryview(payload)[end:]))


def decode_output(payload: bytes | bytearray) -> tuple[int, int, bytes]:
    """``(stream 1|2, offset, data)`` of an OUTPUT frame.

    Raises:
        MalformedFrameError: too short, unknown stream, no data.
    """
    if len(payload) <= _OUTPUT.size:
        raise MalformedFrameError(f"an output frame of {len(payload)} bytes has no data")
    stream, offset = _OUTPUT.unpack_from(payload)
    if stream not in (1, 2) or offset >= 1 << 62:
        raise MalformedFrameError(f"an output frame has stream {stream}, offset {offset}")
    return stream, offset, bytes(memoryview(payload)[_OUTPUT.size :])


def encode_credit(call: int, size: int) -> bytes:
    """A CREDIT frame for ``size`` more bytes."""
    return encode_frame(FrameType.CREDIT, call, _LENGTH.pack(size))


class FrameParser:
    """Cuts a byte stream into frames. Holds at most one frame, and what was fed last while its frames are taken."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max = max_frame_bytes
        self._head = b""
        self._payload = bytearray()  # of a frame that comes in parts

    def feed(self, data: bytes) -> Iterator[Frame]:
        """All frames that are complete with ``data``.

        Raises:
            MalformedFrameError: a length out of bounds or an unknown type; the parser is useless afterwards.
        """
        view, at = memoryview(data), 0
        while True:
            if len(self._head) < _HEADER.size:
                taken = bytes(view[at : at + _HEADER.size - len(self._head)])
                at += len(taken)
                self._head += taken
                if len(self._head) < _HEADER.size:
                    return
            size, kind, call = self._read_head()
            part = view[at : at + size - len(self._payload)]
            at += len(part)
            if len(self._payload) + len(part) < size:
                self._payload += part
                return
            payload: bytes | bytearray = bytes(part)
            if self._payload:
                self._payload += part
                payload, self._payload = self._payload, bytearray()
            self._head = b""
            yield Frame(kind, call, payload)

    def _read_head(self) -> tuple[int, FrameType, int]:
        """Size of the payload, type and call."""
        length, kind, call = _HEADER.unpack(self._head)
        if not _HEAD_BYTES <= length <= self._max:
            raise MalformedFrameError(f"a frame says it has {length} bytes; {_HEAD_BYTES} to {self._max} are possible")
        return length - _HEAD_BYTES, _frame_type(kind), call

    @property
    def buffered_bytes(self) -> int:
        """How much of an incomplete frame is held."""
        return len(self._head) + len(self._payload)


def _frame_type(value: int) -> FrameType:
    try:
        return FrameType(value)
    except ValueError:
        raise MalformedFrameError(f"a frame has the unknown type {value}") from None
