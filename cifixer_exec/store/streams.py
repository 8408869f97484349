"""Reading an op's stream: live output, the end, and reconnecting, in one mechanism."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cifixer_exec.errors import QueueUnavailableError
from cifixer_exec.model import OutputChunk, Stream
from cifixer_exec.store import records
from cifixer_exec.store.keys import Keys
from cifixer_exec.store.records import End, Entry, OpRecord
from cifixer_exec.store.redis_errors import server_name, translate

#: Entries per read: with chunks of up to 64 KiB this bounds what one reply takes in memory.
_COUNT = 128
_BLOCK_S = 5.0
_FIRST_DELAY_S = 0.05
_LAST_DELAY_S = 1.0
#: What a lost connection raises, and a server that is still loading its data.
LOST = (RedisConnectionError, RedisTimeoutError)


class Merge:
    """Makes one gapless row of what several epochs wrote: an adopter may repeat output that its forerunner published."""

    def __init__(self) -> None:
        self._expected: dict[tuple[int, Stream], int] = {}

    def new_part(self, chunk: OutputChunk) -> OutputChunk | None:
        """The part of ``chunk`` that was not seen yet. A gap is passed on as it is: the offset shows it."""
        key = (chunk.index, chunk.stream)
        seen = max(0, self._expected.get(key, 0) - chunk.offset)
        if seen >= len(chunk.data):
            return None
        self._expected[key] = chunk.offset + len(chunk.data)
        return replace(chunk, offset=chunk.offset + seen, data=chunk.data[seen:]) if seen else chunk


class Reader:
    """Reads one op's stream and record; raises what redis-py raises."""

    def __init__(self, redis: Redis, keys: Keys, op_id: str, tend: Callable[[], Awaitable[object]]) -> None:
        self.redis = redis
        self.op_id = op_id
        #: Looks after the op as a sweep does: where no worker lives there is no sweep, and who waits must not wait for ever.
        self.tend = tend
        self._execute: Any = redis.execute_command  # untyped in redis-py
        self._keys = keys

    def command(self, after: str, block_s: float) -> tuple[str | int, ...]:
        """The XREAD. It blocks for less than the socket's time-out, so that only a dead server trips that."""
        block_ms = records.milliseconds(min(block_s, self._longest_block_s()))
        block: tuple[str | int, ...] = ("BLOCK", block_ms) if block_ms > 0 else ()
        return ("XREAD", "COUNT", _COUNT, *block, "STREAMS", self._keys.out(self.op_id), after)

    def _longest_block_s(self) -> float:
        timeout_s = self.redis.connection_pool.connection_kwargs.get("socket_timeout")
        return 0.75 * timeout_s if timeout_s else _BLOCK_S

    async def read(self, after: str, block_s: float) -> list[Entry]:
        """The next entries; none if none came in time."""
        return entries_from(await self._execute(*self.command(after, block_s)))

    async def op(self) -> OpRecord | None:
        """The op's record."""
        return records.op_from(self.op_id, await cast(Any, self.redis.hgetall(self._keys.op(self.op_id))))


def entries_from(reply: Any) -> list[Entry]:
    """From the reply of XREAD on one stream: raw, by either protocol of Redis, or as redis-py parses it."""
    if not reply:
        return []
    rows = next(iter(reply.values())) if isinstance(reply, dict) else reply[0][1]
    return [records.entry_from(entry_id, fields) for entry_id, fields in rows]


async def follow(
    reader: Reader, *, after: str, patience_s: float, first: Sequence[Entry] | None = None
) -> AsyncIterator[OutputChunk | End]:
    """See :meth:`~cifixer_exec.store.journal.Journal.follow`. ``first`` is what a blocking read has given already, None without one."""
    merge, entries = Merge(), list(first or ())
    patience = Patience(reader.redis, patience_s)
    block_s = 0.0 if first == [] else _BLOCK_S  # it was waited for once: now the record is to be looked at
    while True:
        for entry in entries:
            after = entry.entry_id
            if isinstance(entry.item, End):
                yield entry.item
                return
            chunk = merge.new_part(entry.item)
            if chunk is not None:
                yield chunk
        try:
            entries = await _next_entries(reader, after, block_s)
            patience.renew()
            block_s = _BLOCK_S
        except LOST as error:
            entries = []
            block_s = 0  # a server that comes back may have lost its data: that is to be known at once
            await patience.wait(error)
        except RedisError as error:
            raise translate(error, server_name(reader.redis)) from error


async def _next_entries(reader: Reader, after: str, block_s: float) -> list[Entry]:
    """The next entries. If none come, the record tells whether any will."""
    entries = await reader.read(after, block_s)
    if entries:
        return entries
    record = await reader.op()
    if record is None:
        raise QueueUnavailableError(
            f"op {reader.op_id} is not in the journal of Redis at {server_name(reader.redis)}: it was never submitted there, its result"
            " was kept long enough, or Redis lost its data. Submit it again under the same op id: what its sandbox has run is not run twice"
        )
    if not record.final:
        await reader.tend()
        return []
    # It may have ended between the two reads. If not, its end entry is lost and the record must do.
    entries = await reader.read(after, 0)
    return entries or [Entry(entry_id=after, epoch=record.epoch, item=record.end())]


class Patience:
    """Waits longer and longer for Redis to come back, and gives up in the end."""

    def __init__(self, redis: Redis, patience_s: float) -> None:
        self._redis = redis
        self._patience_s = patience_s
        self.renew()

    def renew(self) -> None:
        """The server answered."""
        self._last_success = time.monotonic()
        self._delay_s = _FIRST_DELAY_S

    async def wait(self, error: RedisError) -> None:
        """A moment after ``error``. Raises QueueUnavailableError when it took too long."""
        refused = isinstance(error, AuthenticationError | AuthorizationError)  # redis-py counts them as lost connections
        if refused or time.monotonic() - self._last_success + self._delay_s > self._patience_s:
            raise translate(error, server_name(self._redis)) from error
        await asyncio.sleep(self._delay_s)
        self._delay_s = min(_LAST_DELAY_S, self._delay_s * 2)


async def submit_and_follow(
    reader: Reader,
    command: Sequence[bytes | str | int],
    check: Callable[[list[Any]], object],
    submit: Callable[[], Awaitable[None]],
    *,
    patience_s: float,
) -> AsyncIterator[OutputChunk | End]:
    """Send the submit and the first blocking read in one write. If that fails, do in the ordinary way what was not done: a submit
    may be repeated. Once the submit was answered, a lost connection is a matter of ``patience_s``; before that it is told at once.
    """
    first: list[Entry] | None = None
    try:
        first = await _write_both(reader, command, check)
    except RedisError:
        await submit()
    async for item in follow(reader, after="0", patience_s=patience_s, first=first):
        yield item


async def _write_both(reader: Reader, command: Sequence[bytes | str | int], check: Callable[[list[Any]], object]) -> list[Entry]:
    """The first entries, none if the connection was lost after the submit was answered. Raises RedisError before that."""
    pool: Any = reader.redis.connection_pool
    connection = await pool.get_connection()
    try:
        await connection.send_packed_command(connection.pack_commands([command, reader.command("0", _BLOCK_S)]))
        check(await connection.read_response())
        try:
            return entries_from(await connection.read_response())
        except LOST:
            await connection.disconnect()
            return []
    except BaseException:
        await connection.disconnect()  # a reply may still be under way, which nobody else must read
        raise
    finally:
        await pool.release(connection)
