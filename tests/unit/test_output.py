"""Bounding and gathering output: for any chunking head, tail and totals are right, and memory is bounded."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec.model import ExecRecord, ExecResult, OutputChunk, Status, Stream
from cifixer_exec.output import OutputCollector, OutputGate

DATA = st.binary(max_size=400)
CUTS = st.lists(st.integers(0, 400), max_size=12)


def chunks(data: bytes, cuts: list[int], stream: Stream = Stream.STDOUT) -> list[OutputChunk]:
    edges = sorted({0, len(data), *(c for c in cuts if c < len(data))})
    return [OutputChunk(stream=stream, offset=a, data=data[a:b]) for a, b in pairwise(edges)]


def through(data: bytes, cuts: list[int], limit: int) -> tuple[list[OutputChunk], ExecResult]:
    """What passes a gate of ``limit`` bytes, and the result that is made of it."""
    gate, collector = OutputGate(limit), OutputCollector()
    passed = [p for c in chunks(data, cuts) if (p := gate.take(c)) is not None] + gate.rest(0)
    for chunk in passed:
        collector.add(chunk)
    return passed, collector.result(ExecRecord(status=Status.EXITED, exit_code=0, stdout_bytes=len(data)), "op")


def expected(data: bytes, limit: int) -> bytes:
    """Head, mark and tail, worked out from the whole."""
    missing = len(data) - 2 * limit
    if missing <= 0:
        return data
    return data[:limit] + b"\n[... %d bytes cut ...]\n" % missing + data[len(data) - limit :]


@given(DATA, CUTS, st.integers(0, 300))
def test_head_tail_and_totals_are_right_for_any_chunking(data: bytes, cuts: list[int], limit: int) -> None:
    _, result = through(data, cuts, limit)
    assert result.stdout == expected(data, limit)
    assert result.stdout_bytes == len(data)
    assert result.truncated == (len(data) > 2 * limit)


@given(DATA, CUTS, st.integers(0, 300))
def test_never_more_than_twice_the_limit_passes(data: bytes, cuts: list[int], limit: int) -> None:
    passed, _ = through(data, cuts, limit)
    assert sum(len(c.data) for c in passed) <= 2 * limit


@given(DATA, CUTS, st.integers(0, 300))
def test_what_passes_has_its_true_offset(data: bytes, cuts: list[int], limit: int) -> None:
    for chunk in through(data, cuts, limit)[0]:
        assert chunk.data == data[chunk.offset : chunk.offset + len(chunk.data)]
        assert chunk.data


@given(DATA, DATA, CUTS, CUTS, st.integers(1, 300))
def test_the_streams_do_not_touch_each_other(out: bytes, err: bytes, cuts: list[int], other: list[int], limit: int) -> None:
    gate, collector = OutputGate(limit), OutputCollector()
    for chunk in chunks(out, cuts) + chunks(err, other, Stream.STDERR):
        if (passed := gate.take(chunk)) is not None:
            collector.add(passed)
    for chunk in gate.rest(0):
        collector.add(chunk)
    record = ExecRecord(status=Status.EXITED, exit_code=0, stdout_bytes=len(out), stderr_bytes=len(err))
    result = collector.result(record, "op")
    assert (result.stdout, result.stderr) == (expected(out, limit), expected(err, limit))


@given(DATA, CUTS, st.integers(1, 100), st.integers(0, 200))
def test_a_gap_before_the_tail_is_counted(data: bytes, cuts: list[int], limit: int, gap: int) -> None:
    gate, collector = OutputGate(limit), OutputCollector()
    pieces = [*chunks(data, cuts), OutputChunk(stream=Stream.STDOUT, offset=len(data) + gap, data=b"the end")]
    passed = [p for c in pieces if (p := gate.take(c)) is not None] + gate.rest(0)
    for chunk in passed:
        collector.add(chunk)
    total = len(data) + gap + 7
    result = collector.result(ExecRecord(status=Status.EXITED, exit_code=0, stdout_bytes=total), "op")
    kept = sum(len(c.data) for c in passed)
    assert result.truncated == (kept < total)
    assert result.stdout_bytes == total


def test_a_long_stream_keeps_little_memory() -> None:
    gate = OutputGate(1000)
    for n in range(20_000):
        gate.take(OutputChunk(stream=Stream.STDOUT, offset=n * 1000, data=bytes(1000)))
    assert [(c.offset, len(c.data)) for c in gate.rest(0)] == [(19_999_000, 1000)]
    assert gate._tails[Stream.STDOUT]._size < 3000


@pytest.mark.parametrize("limit", [0, 1])
def test_a_tiny_limit_works(limit: int) -> None:
    assert through(b"abcdef", [2, 4], limit)[1].stdout == expected(b"abcdef", limit)


def test_missing_output_at_the_end_is_counted() -> None:
    collector = OutputCollector()
    collector.add(OutputChunk(stream=Stream.STDOUT, offset=0, data=b"abc"))
    result = collector.result(ExecRecord(status=Status.SANDBOX_LOST, stdout_bytes=10), "op")
    assert (result.stdout, result.truncated, result.stdout_bytes) == (b"abc\n[... 7 bytes cut ...]\n", True, 10)


def test_a_record_that_counts_less_than_came_does_not_lower_the_total() -> None:
    collector = OutputCollector()
    collector.add(OutputChunk(stream=Stream.STDOUT, offset=0, data=b"abc"))
    result = collector.result(ExecRecord(status=Status.SANDBOX_LOST), "op")
    assert (result.stdout, result.truncated, result.stdout_bytes) == (b"abc", False, 3)


def test_a_mark_in_the_output_is_not_taken_for_a_cut() -> None:
    forged = b"\n[... 5 bytes cut ...]\n"
    assert through(forged, [3], 1000)[1].truncated is False
