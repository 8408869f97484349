"""The channel to one sandbox: a connection that is made again after a cut and goes on where it was.

Every verb can be repeated (commands are known by their op id, stdin is by offset, what else changes something is known by
the request's id), so a request whose answer was lost is simply sent again, and output is asked for from the first byte not
yet seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from itertools import count
from math import inf
from typing import Any

from cifixer_exec.channel.connection import (
    WINDOW_BYTES,
    Connection,
    ConnectionClosedError,
    EpochStaleError,
    Output,
    RunnerError,
)
from cifixer_exec.channel.frames import Answer, MalformedFrameError
from cifixer_exec.channel.transport import Dial
from cifixer_exec.errors import (
    BackendError,
    BackendUnavailableError,
    CapacityError,
    CircuitOpenError,
    ExecutorError,
    InvalidRequestError,
    OperationConflictError,
    OutcomeUnknownError,
    SandboxFileError,
    SandboxLostError,
)
from cifixer_exec.model import Command, ExecRecord, Inspection, OutputChunk, Status, Stream, payload_digest

#: How long a sandbox that the platform calls alive may refuse a connection before it counts as lost; and how long a request bears
#: a platform that does not answer at all.
RECONNECT_S = 10.0
#: Before a sandbox that the platform calls alive counts as lost it was tried so often: one attempt can take long on a host that is busy.
LEAST_ATTEMPTS = 3
#: How often a platform that is away is asked for.
AWAY_PAUSE_S = 0.25
#: How many malformed connections in a row make a runner hopeless.
MAX_MALFORMED = 3
#: How many connections in a row may break without one answer or byte of output.
MAX_CUTS = 20

#: How much of a cause is kept.
MAX_CAUSE_CHARS = 2000

_STREAMS = {1: Stream.STDOUT, 2: Stream.STDERR}
_BOUNDS = {
    "exit_code": 255,
    "stdout_bytes": 1 << 62,
    "stderr_bytes": 1 << 62,
    "killed_processes": 1 << 32,
    "background_processes": 1 << 32,
    "oom_kills": 1 << 32,
}
#: What a runner may say; that a sandbox is lost is for this side to find out. A list: what comes may be unhashable.
_STATUSES = [None, *(s.value for s in Status if s is not Status.SANDBOX_LOST)]

_ERRORS: dict[str, type[ExecutorError]] = {
    "invalid": InvalidRequestError,
    "op_unknown": InvalidRequestError,
    "op_dropped": InvalidRequestError,
    "op_conflict": OperationConflictError,
    "busy": CapacityError,
    "path_not_allowed": InvalidRequestError,
    **dict.fromkeys(
        (
            "not_found",
            "exists",
            "not_a_directory",
            "is_a_directory",
            "permission",
            "no_space",
            "checksum_mismatch",
            "changed",
            "stdin_closed",
        ),
        SandboxFileError,
    ),
}

Inspect = Callable[[], Awaitable[Inspection]]


def translate(error: RunnerError) -> ExecutorError:
    """The runner's error codes as this package's errors: the one table of this boundary."""
    return _ERRORS.get(error.code, BackendError)(error.message or error.code, error.code)


class Channel:
    """Used on one event loop. :meth:`close` leaves the sandbox and its commands as they are."""

    def __init__(
        self,
        *,
        dial: Dial,
        inspect: Inspect,
        epoch: int,
        client: str,
        token: str = "",
        boot_id: str | None = None,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        self._dial = dial
        self._inspect = inspect
        self._hello = {"epoch": epoch, "client": client, "token": token}
        self._reconnect_s = reconnect_s
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._boot_id = boot_id
        self._malformed = 0
        self._cuts = 0
        self._counted: Connection | None = None

    async def request(
        self, verb: str, arguments: Mapping[str, Any], body: bytes | memoryview = b"", *, request_id: str | None = None
    ) -> Answer:
        """One verb of the runner, sent again after a cut.

        Under the same ``request_id`` the runner does it once, whoever asks and over whatever connection, and gives the
        first answer again. For verbs that read, and that are idempotent by themselves, it means nothing.

        Raises:
            SandboxLostError: the sandbox is gone, or cannot be reached any more.
            BackendUnavailableError: the platform does not answer; nothing was sent.
            OutcomeUnknownError: the platform went away between request and answer.
            EpochStaleError: another worker owns the sandbox now.
            ExecutorError: what the runner refused (see :func:`translate`).
        """
        if request_id is not None:
            arguments = {**arguments, "request_id": request_id}
        sent = False
        while True:
            connection = await self._reached(sent=sent, patience_s=self._reconnect_s)
            sent = True
            try:
                answer = await connection.request(verb, arguments, body)
            except RunnerError as error:
                raise translate(error) from None
            except (ConnectionClosedError, MalformedFrameError) as error:
                self._note(connection, error)
            else:
                self._progressed()
                return answer

    async def run(
        self, op_id: str, command: Command, *, index: int = 0, begun: bool = False, longest_s: float = inf
    ) -> AsyncGenerator[OutputChunk | ExecRecord, None]:
        """Start ``command`` under ``op_id``, or attach to it if it is known; its output, then how it ended.

        Once it was sent (``begun``: by an earlier owner) it goes on in its sandbox, so a platform that does not answer is waited for as
        long as the command may run (``longest_s``: if it has no time-out). Stopping the iteration does not stop the command.

        Raises: as :meth:`request`.
        """
        arguments = _start_arguments(op_id, command)
        patience_s = self._reconnect_s + command.grace_s + (longest_s if command.timeout_s is None else command.timeout_s)
        async with aclosing(self._follow("start", arguments, command.stdin, index, sent=begun, patience_s=patience_s)) as items:
            async for item in items:
                yield item

    async def start(self, op_id: str, command: Command) -> None:
        """Start ``command`` under ``op_id`` (or do nothing if it is known); returns as soon as it runs. Raises as :meth:`request`."""
        await self.request("start", {**_start_arguments(op_id, command), "attach": None}, command.stdin)

    async def attach(
        self, op_id: str, *, offsets: tuple[int, int] = (0, 0), index: int = 0, follow: bool = True
    ) -> AsyncGenerator[OutputChunk | ExecRecord, None]:
        """The output of a known command from ``offsets`` (stdout, stderr) on, then how it ended.

        Without ``follow``: what is there now, and no record while the command runs.

        Raises:
            InvalidRequestError: the runner does not know ``op_id``; else as :meth:`request`.
        """
        async with aclosing(self._follow("attach", {"op_id": op_id, "follow": follow}, b"", index, offsets)) as items:
            async for item in items:
                yield item

    def close(self) -> None:
        """Close the connection; the channel may be used again and then reconnects."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def connect(self) -> Mapping[str, Any]:
        """Make sure there is a connection; the runner's HELLO. Raises as :meth:`request`."""
        return (await self._connected()).hello

    async def _follow(
        self,
        verb: str,
        arguments: dict[str, Any],
        body: bytes,
        index: int,
        offsets: tuple[int, int] = (0, 0),
        *,
        sent: bool = False,
        patience_s: float = RECONNECT_S,
    ) -> AsyncGenerator[OutputChunk | ExecRecord, None]:
        seen = list(offsets)
        while True:
            connection = await self._reached(sent=sent, patience_s=patience_s)
            sent = True
            stream = connection.stream(verb, _with_offsets(verb, arguments, seen), body)
            try:
                async for item in stream:
                    if isinstance(item, Answer):
                        record = _record(item) if arguments.get("follow", True) else None
                        self._progressed()
                        if record is not None:
                            yield record
                        return
                    if (chunk := _chunk(item, seen, index)) is not None:
                        self._cuts = 0
                        yield chunk
            except RunnerError as error:
                raise translate(error) from None
            except (ConnectionClosedError, MalformedFrameError) as error:
                connection.close()
                self._note(connection, error)
            finally:
                await stream.aclose()

    def _progressed(self) -> None:
        self._malformed = self._cuts = 0

    def _note(self, connection: Connection | None, error: Exception) -> None:
        """Count a broken connection once, however many calls it had; a runner that keeps talking nonsense has been taken over.

        Raises:
            SandboxLostError: too many in a row.
        """
        if connection is not None and connection is self._counted:
            return
        self._counted = connection
        self._cuts += 1
        self._malformed += isinstance(error, MalformedFrameError)
        if self._malformed >= MAX_MALFORMED:
            raise SandboxLostError(f"the sandbox's runner sent malformed frames {self._malformed} times, the last: {error}")
        if self._cuts >= MAX_CUTS:
            raise SandboxLostError(f"the connection to the sandbox broke {self._cuts} times without an answer, the last: {error}")

    async def _reached(self, *, sent: bool, patience_s: float) -> Connection:
        """A connection, behind an outage of the platform that takes no longer than ``patience_s``.

        ``sent``: an answer is still due, so giving up means that nobody knows. Else a platform that is left alone is not waited for.

        Raises:
            BackendUnavailableError, OutcomeUnknownError: see :meth:`request`. Else as there.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + (patience_s if sent else min(patience_s, self._reconnect_s))
        while True:
            try:
                return await self._connected()
            except BackendUnavailableError as error:
                if not sent and (isinstance(error, CircuitOpenError) or clock() > deadline):
                    raise
                if clock() > deadline:
                    raise OutcomeUnknownError(
                        f"whether it was done is not known, because the answer could not be fetched: {error}"
                    ) from None
            await asyncio.sleep(AWAY_PAUSE_S)

    async def _connected(self) -> Connection:
        connection = self._connection
        if connection is not None and connection.closed_by is None:
            return connection
        async with self._connecting:
            connection = self._connection
            if connection is not None and connection.closed_by is None:
                return connection
            if connection is not None and isinstance(connection.closed_by, EpochStaleError):
                raise EpochStaleError(*connection.closed_by.args)
            self._connection = await self._reconnect()
            return self._connection

    async def _reconnect(self) -> Connection:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        pause_s = 0.02
        for attempt in count(1):
            try:
                connection = await Connection.open(await self._dial(), self._hello)
                return self._check_boot(connection)
            except (OSError, ConnectionClosedError, MalformedFrameError, TimeoutError) as error:
                if isinstance(error, MalformedFrameError):
                    self._note(None, error)
                inspection = await self._inspect()
                if not inspection.alive:
                    raise SandboxLostError(f"the sandbox is gone: {inspection.cause or error}") from None
                if attempt >= LEAST_ATTEMPTS and loop.time() + pause_s > begun + self._reconnect_s:
                    raise SandboxLostError(
                        f"the sandbox lives but its runner has not answered for {loop.time() - begun:.0f} s: {error}"
                    ) from None
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.5)
        raise AssertionError  # the counting has no end

    def _check_boot(self, connection: Connection) -> Connection:
        """A runner that was started anew has forgotten its commands: going on would run them twice."""
        boot_id = str(connection.hello.get("boot_id", ""))
        if self._boot_id not in (None, boot_id):
            connection.close()
            raise SandboxLostError("the sandbox's runner was restarted from outside; what ran in it is gone")
        self._boot_id = boot_id
        return connection


def _start_arguments(op_id: str, command: Command) -> dict[str, Any]:
    data = command.to_json()
    return {
        "op_id": op_id,
        "digest": payload_digest("start", data, command.stdin),
        "argv": list(command.argv),
        "env": dict(command.env),
        "cwd": command.cwd or "",
        "timeout_s": command.timeout_s,
        "grace_s": command.grace_s,
        "spool_limit_bytes": command.spool_limit_bytes,
        "stdin": "open" if command.stdin_open else "none",
    }


def _with_offsets(verb: str, arguments: dict[str, Any], seen: list[int]) -> dict[str, Any]:
    part = {"stdout_offset": seen[0], "stderr_offset": seen[1], "window_bytes": WINDOW_BYTES}
    return {**arguments, "attach": part} if verb == "start" else {**arguments, **part}


def _chunk(output: Output, seen: list[int], index: int) -> OutputChunk | None:
    """The part of ``output`` that is new; moves ``seen``."""
    known = seen[output.stream - 1]
    data = output.data[max(0, known - output.offset) :]
    if not data:
        return None
    end = output.offset + len(output.data)
    seen[output.stream - 1] = end
    return OutputChunk(stream=_STREAMS[output.stream], offset=end - len(data), data=data, index=index)


def _record(answer: Answer) -> ExecRecord:
    """The record of an answer, checked: it comes from a sandbox.

    Raises:
        MalformedFrameError: missing, or members of wrong types.
    """
    data = answer.document.get("record")
    if not isinstance(data, dict) or data.get("state") != "finished":
        raise MalformedFrameError("an answer has no finished record")
    for name, bound in _BOUNDS.items():
        value = data.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= bound):
            raise MalformedFrameError(f"a record has {name}={str(value)[:40]}")
    duration_s, signal = data.get("duration_s"), data.get("signal")
    if isinstance(duration_s, bool) or not isinstance(duration_s, (int, float)) or not 0 <= duration_s < 1e10:
        raise MalformedFrameError("a record has an impossible duration")
    if not isinstance(signal, str | None) or len(signal or "") > 32 or not isinstance(data.get("spool_truncated"), bool | None):
        raise MalformedFrameError("a record has a signal or flag of a wrong type")
    if data.get("status") not in _STATUSES:
        raise MalformedFrameError("a record has a status that no runner gives")
    data = {**data, "cause": str(data.get("cause") or "")[:MAX_CAUSE_CHARS]}
    try:
        record = ExecRecord.from_json(data)
    except ValueError as error:
        raise MalformedFrameError(f"a record is not usable: {error}") from None
    return _truthful(record)


def _truthful(record: ExecRecord) -> ExecRecord:
    """A sandbox may claim anything, but an exit without a code is not an exit."""
    if record.status is Status.EXITED and record.exit_code is None:
        raise MalformedFrameError("a record says exited, without an exit code")
    return record
