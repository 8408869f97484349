"""Several pieces of a file on their way at once, and one op's piece in several requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any

import pytest

from cifixer_exec.channel.frames import Answer
from cifixer_exec.errors import SandboxFileError
from cifixer_exec.model import MAX_BODY_BYTES
from cifixer_exec.pieces import all_of, in_order, read_piece, write_piece
from tests.support.run import run

Step = Callable[[int], Coroutine[Any, Any, int]]


async def calls(step: Step, count: int) -> AsyncGenerator[Coroutine[Any, Any, int], None]:
    for number in range(count):
        yield step(number)


def test_answers_come_in_order_and_no_more_than_so_many_are_under_way() -> None:
    under_way: list[int] = []
    most = 0

    async def step(number: int) -> int:
        nonlocal most
        under_way.append(number)
        most = max(most, len(under_way))
        await asyncio.sleep(0.01 * (5 - number % 5))
        under_way.remove(number)
        return number

    async def take() -> list[int]:
        return [answer async for answer in in_order(calls(step, 12), 3)]

    assert run(take()) == list(range(12))
    assert most == 3


def test_a_failure_waits_for_what_is_under_way_and_begins_nothing_more() -> None:
    begun: list[int] = []
    ended: list[int] = []

    async def step(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise SandboxFileError("disk full", "no_space")
        await asyncio.sleep(0.05)
        ended.append(number)
        return number

    with pytest.raises(SandboxFileError, match="disk full"):
        run(all_of(calls(step, 10), 3))
    assert begun == [*ended[:1], 1, *ended[1:]]
    assert len(begun) < 10


def test_what_is_under_way_is_cancelled_with_its_caller() -> None:
    cancelled: list[int] = []

    async def step(number: int) -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await all_of(calls(step, 10), 3)

    run(give_up())
    assert sorted(cancelled) == [0, 1, 2]


class Runner:
    """The verbs ``write`` and ``read`` as one runner has them: at most a mebibyte each, each id once."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.committed: list[object] = []
        self.ids: list[str] = []

    async def write(self, arguments: Mapping[str, Any], body: bytes | memoryview, request_id: str) -> Answer:
        assert len(body) <= MAX_BODY_BYTES
        if request_id not in self.ids:
            end = arguments["offset"] + len(body)
            self.content.extend(bytes(max(0, end - len(self.content))))
            self.content[arguments["offset"] : end] = body
            if arguments["commit"]:
                self.committed.append((arguments["commit"], len(self.content)))
        self.ids.append(request_id)
        return Answer({"received_bytes": len(self.content)})

    async def read(self, arguments: Mapping[str, Any], _body: bytes | memoryview, _request_id: str) -> Answer:
        assert arguments["length"] <= MAX_BODY_BYTES
        if arguments["etag"] not in (None, "e"):
            raise SandboxFileError("it changed", "changed")
        piece = self.content[arguments["offset"] : arguments["offset"] + arguments["length"]]
        return Answer({"size": len(self.content), "etag": "e", "mode": 0o644}, bytes(piece))


SIZES = [0, 1, MAX_BODY_BYTES, MAX_BODY_BYTES + 1, 3 * MAX_BODY_BYTES, 3 * MAX_BODY_BYTES + 7]


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


@pytest.mark.parametrize("size", SIZES)
def test_a_piece_is_written_in_requests_of_the_runners_size_and_committed_last(size: int) -> None:
    runner, data = Runner(), pattern(size)
    arguments = {"path": "f", "offset": 0, "commit": {"size": size, "sha256": "s"}}
    run(write_piece(runner.write, arguments, data, "op"))
    assert runner.content == data
    assert runner.committed == [({"size": size, "sha256": "s"}, size)]
    assert len(set(runner.ids)) == len(runner.ids)


def test_a_piece_that_is_written_again_does_nothing_again() -> None:
    runner, data = Runner(), pattern(2 * MAX_BODY_BYTES + 5)
    arguments = {"path": "f", "offset": 0, "commit": {"size": len(data), "sha256": "s"}}
    for _ in range(2):
        run(write_piece(runner.write, arguments, data, "op"))
    assert len(runner.committed) == 1
    assert sorted(set(runner.ids)) == sorted(runner.ids[: len(runner.ids) // 2]) == sorted(runner.ids[len(runner.ids) // 2 :])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 5])
def test_a_piece_is_read_in_requests_of_the_runners_size(size: int, offset: int) -> None:
    runner = Runner(pattern(size))
    answer = run(read_piece(runner.read, {"path": "f", "offset": offset, "length": 2 * MAX_BODY_BYTES, "etag": None}, "op"))
    assert answer.body == pattern(size)[offset : offset + 2 * MAX_BODY_BYTES]
    assert answer.document["size"] == size


def test_a_piece_of_a_file_that_changed_is_an_error() -> None:
    with pytest.raises(SandboxFileError, match="changed"):
        run(read_piece(Runner(b"x").read, {"path": "f", "offset": 0, "length": 2 * MAX_BODY_BYTES, "etag": "other"}, "op"))
