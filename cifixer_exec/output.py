"""Bounding and gathering of output: what passes while a command runs, and what its result keeps."""

from __future__ import annotations

from collections import deque

from cifixer_exec.model import TAIL_BYTES, ExecRecord, ExecResult, OutputChunk, Stream


class OutputGate:
    """Lets the first ``limit_bytes`` of each stream pass, and keeps the last :data:`TAIL_BYTES` (at most the limit) of what is beyond."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._tails = {stream: _Tail(min(TAIL_BYTES, limit_bytes)) for stream in Stream}

    def take(self, chunk: OutputChunk) -> OutputChunk | None:
        """The part of ``chunk`` that passes now."""
        room = max(0, self._limit - chunk.offset)
        if len(chunk.data) > room:
            self._tails[chunk.stream].add(chunk.offset + room, chunk.data[room:])
        return _part(chunk, chunk.offset, chunk.data[:room]) if room else None

    def rest(self, index: int) -> list[OutputChunk]:
        """At the end: the kept tails, as chunks with their true offsets."""
        return [
            OutputChunk(stream=stream, offset=tail.offset, data=data, index=index)
            for stream, tail in self._tails.items()
            if (data := tail.data())
        ]


def _part(chunk: OutputChunk, offset: int, data: bytes) -> OutputChunk:
    return chunk if len(data) == len(chunk.data) else OutputChunk(stream=chunk.stream, offset=offset, data=data, index=chunk.index)


class _Tail:
    """The last bytes of a stream, in pieces, so that adding costs no copy."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._end = 0

    def add(self, offset: int, data: bytes) -> None:
        if offset != self._end:
            self._pieces.clear()
            self._size = 0
        self._pieces.append(data)
        self._size += len(data)
        self._end = offset + len(data)
        while self._pieces and self._size - len(self._pieces[0]) >= self._limit:
            self._size -= len(self._pieces.popleft())

    @property
    def offset(self) -> int:
        return self._end - min(self._size, self._limit)

    def data(self) -> bytes:
        return b"".join(self._pieces)[-self._limit :] if self._limit else b""


class OutputCollector:
    """Puts the chunks of one command together. A jump in offset becomes a line that says how much is missing."""

    def __init__(self) -> None:
        self._pieces: dict[Stream, list[bytes]] = {stream: [] for stream in Stream}
        self._ends = dict.fromkeys(Stream, 0)
        self._cut = False

    def add(self, chunk: OutputChunk) -> None:
        """Take the next chunk of its stream."""
        self._skip_to(chunk.stream, chunk.offset)
        self._pieces[chunk.stream].append(chunk.data)
        self._ends[chunk.stream] = chunk.offset + len(chunk.data)

    def result(self, record: ExecRecord, op_id: str) -> ExecResult:
        """The result, once ``record`` says how it ended."""
        self._skip_to(Stream.STDOUT, record.stdout_bytes)
        self._skip_to(Stream.STDERR, record.stderr_bytes)
        return ExecResult(
            status=record.status,
            exit_code=record.exit_code,
            signal=record.signal,
            stdout=b"".join(self._pieces[Stream.STDOUT]),
            stderr=b"".join(self._pieces[Stream.STDERR]),
            truncated=self._cut,
            stdout_bytes=max(record.stdout_bytes, self._ends[Stream.STDOUT]),
            stderr_bytes=max(record.stderr_bytes, self._ends[Stream.STDERR]),
            duration_s=record.duration_s,
            cause=record.cause,
            op_id=op_id,
        )

    def _skip_to(self, stream: Stream, offset: int) -> None:
        missing = offset - self._ends[stream]
        if missing > 0:
            self._cut = True
            self._pieces[stream].append(b"\n[... %d bytes cut ...]\n" % missing)
            self._ends[stream] = offset
