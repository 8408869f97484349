"""One sandbox through its channel: what a worker does for an op, and what direct use does without a queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from cifixer_exec.backends.base import Backend
from cifixer_exec.backends.threads import asking, batches, creating
from cifixer_exec.channel.channel import Channel
from cifixer_exec.channel.frames import Answer
from cifixer_exec.errors import BackendError, InvalidRequestError, OutcomeUnknownError, SandboxLostError, SandboxNotFoundError
from cifixer_exec.model import (
    MAX_BODY_BYTES,
    NEVER_BEGUN,
    Command,
    Ended,
    ExecRecord,
    Inspection,
    OutputChunk,
    SandboxHandle,
    SandboxSpec,
    Status,
    Stream,
    with_env,
)
from cifixer_exec.operations import new_op_id
from cifixer_exec.output import OutputGate
from cifixer_exec.pieces import read_piece, write_piece

#: The runner's verbs that may be asked for from outside; start, kill and extend have ways of their own.
VERBS = frozenset(
    {
        "status",
        "stdin",
        "signal",
        "forget",
        "write",
        "abort_write",
        "read",
        "stat",
        "list_files",
        "mkdir",
        "remove",
        "pack",
        "unpack",
        "stats",
    }
)
#: Those of them that would lie or do something twice when asked again, so they are sent with an id: the runner does them once.
#: Stdin is not among them, it goes by offset.
ONCE_VERBS = frozenset({"signal", "forget", "write", "abort_write", "mkdir", "remove", "pack", "unpack"})
READ_OUTPUT = "read_output"
#: In a handle's data.
BOOT_ID = "boot_id"
CANCEL_RETRY_S = 0.05
#: Requests with a piece of a file that are on the channel at once: while one is written or sent, the next is on its way. A command
#: waits behind so many mebibytes at the most, whatever is copied beside it.
PIECES_AT_ONCE = 3
#: How long a cancel waits for the one who follows the op to see its end.
CANCEL_S = 10.0


class SandboxSession:
    """A live sandbox and the channel to it, on one event loop."""

    def __init__(
        self, backend: Backend, handle: SandboxHandle, spec: SandboxSpec, *, epoch: int, client: str, clock: Callable[[], float] = time.time
    ) -> None:
        self.backend = backend
        self.handle = handle
        self._env = spec.env
        self._lifetime_s = spec.lifetime_s
        self._clock = clock
        self._cancelled: set[str] = set()
        self._running: set[str] = set()
        self._pieces = asyncio.Semaphore(PIECES_AT_ONCE)
        self.channel = Channel(
            dial=backend.dial(handle),
            inspect=self.inspect,
            epoch=epoch,
            client=client,
            token=backend.token(handle),
            boot_id=handle.data.get(BOOT_ID),
        )

    async def inspect(self) -> Inspection:
        """Alive or not; asks the platform in a thread."""
        return await asking(self.backend.inspect, self.handle)

    async def run(self, op_id: str, commands: Sequence[Command], *, begun: bool = False) -> AsyncGenerator[OutputChunk | Ended, None]:
        """Run ``commands`` in order, stop behind the first that fails; output as it comes, bounded, then the records.

        Known commands are attached to, not started again. A sandbox that dies is a record ``sandbox_lost``, not an error; a platform that
        goes away for longer than the command may run is a record ``unknown``. ``begun``: an earlier owner may have started the first one.

        Raises:
            BackendUnavailableError: the platform does not answer, and nothing has started.
        """
        self._running.add(op_id)
        try:
            async with aclosing(self._run_all(op_id, commands, begun)) as items:
                async for item in items:
                    yield item
        finally:
            self._running.discard(op_id)
            self._cancelled.discard(op_id)

    async def _run_all(self, op_id: str, commands: Sequence[Command], begun: bool) -> AsyncGenerator[OutputChunk | Ended, None]:
        records: list[ExecRecord] = []
        for index, command in enumerate(commands):
            if index > 0 and op_id in self._cancelled:
                records.append(NEVER_BEGUN)
                break
            gate = OutputGate(command.output_limit_bytes)
            async with aclosing(self._run_one(op_id, index, with_env(command, self._env), begun or index > 0)) as items:
                async for item in items:
                    if isinstance(item, ExecRecord):
                        records.append(item)
                    elif (passed := gate.take(item)) is not None:
                        yield passed
            for chunk in gate.rest(index):
                yield chunk
            if not records[-1].ok:
                if records[-1].status is Status.UNKNOWN:  # its record was dropped, and one behind it may run that nobody would look after
                    with suppress(BackendError):
                        await self._kill(op_id, len(commands), 2.0)
                break
        yield Ended(records=tuple(records))

    async def start(self, op_id: str, commands: Sequence[Command]) -> None:
        """Start the first of ``commands``; :meth:`run` with the same ones goes on from there."""
        await self.channel.start(f"{op_id}:0", with_env(commands[0], self._env))

    async def call(self, verb: str, arguments: Mapping[str, Any], body: bytes = b"", *, request_id: str) -> Answer:
        """One of :data:`VERBS`, or ``read_output``. A repetition, by whomever, has the same ``request_id`` and is not done again.

        Raises:
            InvalidRequestError: another verb. OperationConflictError: the id names another request. Else as :meth:`Channel.request`.
        """
        if verb == READ_OUTPUT:
            return await self._read_output(arguments)
        if verb not in VERBS:
            raise InvalidRequestError(f"operation {verb!r} is not known: take one of {', '.join(sorted(VERBS))}")
        if verb == "write":
            return await write_piece(partial(self._request, verb), arguments, body, request_id)
        if verb == "read":
            return await read_piece(partial(self._request, verb), arguments, request_id)
        return await self._request(verb, arguments, body, request_id)

    async def _request(self, verb: str, arguments: Mapping[str, Any], body: bytes | memoryview, request_id: str) -> Answer:
        """``request_id`` is for those of :data:`ONCE_VERBS`. Pieces of files wait for their turn, so that little is ahead of a command."""
        once = request_id if verb in ONCE_VERBS else None
        if verb not in ("write", "read"):
            return await self.channel.request(verb, arguments, body, request_id=once)
        async with self._pieces:
            return await self.channel.request(verb, arguments, body, request_id=once)

    async def cancel(self, op_id: str, commands: int, *, grace_s: float = 2.0) -> None:
        """Kill what runs of an op and start no more of it; returns when it is dead.

        The kill may fall between two commands, or just before the first is started: so it is repeated until it hit one.
        """
        self._cancelled.add(op_id)
        deadline = self._clock() + CANCEL_S
        while True:
            stopped = await self._kill(op_id, commands, grace_s)
            if op_id not in self._running:
                self._cancelled.discard(op_id)  # nobody is there to heed it, now or later
                return
            if stopped or self._clock() > deadline:
                return
            await asyncio.sleep(CANCEL_RETRY_S)

    async def _kill(self, op_id: str, commands: int, grace_s: float) -> bool:
        """True when nothing of the op can run any more: a command of it was killed, or all have ended."""
        missing = False
        for index in range(commands):
            try:
                answer = await self.channel.request("kill", {"op_id": f"{op_id}:{index}", "grace_s": grace_s, "status": "killed"})
            except InvalidRequestError as error:
                if error.code not in ("op_unknown", "op_dropped"):
                    raise
                missing = missing or error.code == "op_unknown"
                continue
            record = answer.document.get("record")
            if not isinstance(record, dict) or record.get("status") != Status.EXITED or record.get("exit_code") != 0:
                return True  # run() starts nothing behind a command that did not succeed
        return not missing

    async def has_begun(self, op_id: str) -> bool:
        """Whether the runner knows the first command of the op. Asked by an owner: no older one can start it any more."""
        try:
            await self.channel.request("status", {"op_id": f"{op_id}:0"})
        except InvalidRequestError as error:
            if error.code not in ("op_unknown", "op_dropped"):
                raise
            return error.code == "op_dropped"
        return True

    def is_running(self, op_id: str) -> bool:
        """Whether :meth:`run` goes on for this op."""
        return op_id in self._running

    async def extend(self, lifetime_s: float) -> None:
        """Let both deadlines, the runner's and the platform's, be ``lifetime_s`` from now."""
        await self.channel.request("extend", {"expires_in_s": lifetime_s})
        await asking(self.backend.extend, self.handle, self._clock() + lifetime_s)

    def close(self) -> None:
        """Leave the sandbox as it is, for another owner."""
        self.channel.close()

    async def _run_one(self, op_id: str, index: int, command: Command, begun: bool) -> AsyncGenerator[OutputChunk | ExecRecord, None]:
        try:
            async with aclosing(
                self.channel.run(f"{op_id}:{index}", command, index=index, begun=begun, longest_s=self._lifetime_s)
            ) as items:
                async for item in items:
                    yield item
        except SandboxLostError as error:
            yield ExecRecord(status=Status.SANDBOX_LOST, cause=str(error))
        except OutcomeUnknownError as error:
            yield ExecRecord(status=Status.UNKNOWN, cause=str(error))

    async def _read_output(self, arguments: Mapping[str, Any]) -> Answer:
        """A piece of one stream's spool: ``{op_id, stream, offset, length}`` → body, with its true ``offset``."""
        stream, offset, length = Stream(arguments["stream"]), int(arguments["offset"]), int(arguments["length"])
        offsets = (offset, 1 << 61) if stream is Stream.STDOUT else (1 << 61, offset)
        found: list[OutputChunk] = []
        async with aclosing(self.channel.attach(str(arguments["op_id"]), offsets=offsets, follow=False)) as items:
            async for item in items:
                if isinstance(item, OutputChunk) and item.stream is stream:
                    found.append(item)
                    if sum(len(c.data) for c in found) >= min(length, MAX_BODY_BYTES):
                        break
        body = b"".join(c.data for c in found)[: min(length, MAX_BODY_BYTES)]
        return Answer({"offset": found[0].offset if found else offset}, body)


def with_boot_id(handle: SandboxHandle, hello: Mapping[str, Any]) -> SandboxHandle:
    """The handle with the runner's own mark: whoever meets another runner there later knows that all commands are forgotten."""
    return replace(handle, data={**handle.data, BOOT_ID: str(hello.get("boot_id", ""))[:64]})


class DirectPort:
    """A sandbox made and used by this process alone, without Redis. Its epoch is 0: any queue worker would fence it."""

    def __init__(self, backend: Backend, spec: SandboxSpec, *, client: str, session: SandboxSession | None = None) -> None:
        self._backend = backend
        self._spec = spec
        self._client = client
        self._session = session
        self._commands: dict[str, tuple[Command, ...]] = {}
        self._ended = False

    @classmethod
    async def attached(cls, backend: Backend, sandbox_id: str, *, client: str) -> DirectPort:
        """A port to a sandbox that another process made directly.

        Raises:
            SandboxNotFoundError: none of this id lives here.
        """
        async for listed in batches(backend.list_owned):
            handle = next((owned.handle for owned in listed if owned.handle.sandbox_id == sandbox_id), None)
            if handle is not None and (await asking(backend.inspect, handle)).alive:
                spec = SandboxSpec(backend=backend.name, sandbox_id=sandbox_id)
                return cls(backend, spec, client=client, session=SandboxSession(backend, handle, spec, epoch=0, client=client))
        raise SandboxNotFoundError(f"no sandbox {sandbox_id!r} lives on backend {backend.name!r} here")

    async def create(self) -> None:
        if self._ended:
            raise SandboxNotFoundError(f"sandbox {self._spec.sandbox_id!r} was torn down: make a new one")
        making = asyncio.ensure_future(creating(self._backend.create, self._spec))
        try:
            handle = await asyncio.shield(making)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: what it makes has no user any more.
            making.add_done_callback(self._unmake)
            raise
        self._session = SandboxSession(self._backend, handle, self._spec, epoch=0, client=self._client)

    def _unmake(self, making: asyncio.Future[SandboxHandle]) -> None:
        if not making.cancelled() and making.exception() is None:
            threading.Thread(target=self._backend.destroy, args=(making.result(),)).start()

    async def destroy(self) -> None:
        session, self._session, self._ended = self._session, None, True
        if session is not None:
            session.close()
            await asking(self._backend.destroy, session.handle)

    async def start(self, op_id: str, commands: Sequence[Command]) -> None:
        self._commands[op_id] = tuple(commands)
        await self._live().start(op_id, commands)

    def run(self, op_id: str, commands: Sequence[Command]) -> AsyncGenerator[OutputChunk | Ended, None]:
        self._commands[op_id] = tuple(commands)
        return self._live().run(op_id, commands)

    async def follow(self, op_id: str) -> AsyncGenerator[OutputChunk | Ended, None]:
        """A known op again from its first byte; one of another process as far as the runner knows it."""
        if op_id in self._commands:
            async with aclosing(self._live().run(op_id, self._commands[op_id])) as items:
                async for item in items:
                    yield item
            return
        async with aclosing(self._live().channel.attach(f"{op_id}:0")) as parts:
            async for part in parts:
                yield Ended(records=(part,)) if isinstance(part, ExecRecord) else part

    async def call(self, verb: str, arguments: Mapping[str, Any], body: bytes = b"") -> Answer:
        return await self._live().call(verb, arguments, body, request_id=new_op_id())

    async def pending(self, op_id: str) -> bool:
        """While somebody here runs it: its command may be just about to start."""
        return self._live().is_running(op_id)

    async def cancel(self, op_id: str) -> None:
        commands = self._commands.get(op_id)
        await self._live().cancel(op_id, len(commands) if commands else 1)

    async def extend(self, lifetime_s: float) -> None:
        await self._live().extend(lifetime_s)

    async def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def _live(self) -> SandboxSession:
        if self._session is None:
            raise SandboxNotFoundError(f"sandbox {self._spec.sandbox_id!r} is not there: it was never initialised, or it was torn down")
        return self._session
