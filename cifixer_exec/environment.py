"""The sandbox as its user sees it: :class:`AsyncSandboxEnvironment` over a port (direct or through the queue).

The blocking face with the same names is in :mod:`cifixer_exec.blocking`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from cifixer_exec import transfer
from cifixer_exec.channel.frames import Answer
from cifixer_exec.errors import BackendError, ExecutorError, InvalidRequestError, SandboxFileError, SandboxLostError, SandboxNotFoundError
from cifixer_exec.model import (
    MAX_BODY_BYTES,
    MAX_PAYLOAD_BYTES,
    Command,
    Ended,
    ExecResult,
    FileInfo,
    OnOutput,
    OutputChunk,
    Stream,
    check_id,
    check_path,
    check_timeout_s,
)
from cifixer_exec.operations import new_op_id
from cifixer_exec.output import OutputCollector
from cifixer_exec.pieces import whole_number
from cifixer_exec.settings import AppConfig

#: Stdin up to this size travels with the command; more is sent beside it while it runs.
INLINE_STDIN_BYTES = MAX_PAYLOAD_BYTES


class SandboxPort(Protocol):
    """How a sandbox is reached. Every method may raise the errors of :mod:`cifixer_exec.errors`."""

    async def create(self) -> None:
        """Make the sandbox; returns when commands can run."""

    async def destroy(self) -> None:
        """End it; one that is gone is not an error."""

    async def start(self, op_id: str, commands: Sequence[Command]) -> None:
        """Begin (or queue) the commands; idempotent by ``op_id``."""

    def run(self, op_id: str, commands: Sequence[Command]) -> AsyncGenerator[OutputChunk | Ended, None]:
        """Begin and follow in one round trip; idempotent by ``op_id``."""

    def follow(self, op_id: str) -> AsyncGenerator[OutputChunk | Ended, None]:
        """All output of a known op from its first byte, then its end."""

    async def call(self, verb: str, arguments: Mapping[str, Any], body: bytes = b"") -> Answer:
        """One request with one answer."""

    async def pending(self, op_id: str) -> bool:
        """Whether an op that the runner does not know may still come to run."""

    async def cancel(self, op_id: str) -> None:
        """A queued op never starts; of a running one the process tree is dead on return."""

    async def extend(self, lifetime_s: float) -> None:
        """Let the sandbox live ``lifetime_s`` from now."""

    async def close(self) -> None:
        """Free what this process holds; the sandbox stays."""


class AsyncCommandHandle:
    """A command that was started. It needs nothing but the op id, so another process can make one for the same command."""

    def __init__(self, port: SandboxPort, op_id: str) -> None:
        self._port = port
        self.op_id = op_id
        self._sent_bytes: int | None = None
        self._sending = asyncio.Lock()

    async def stream(self) -> AsyncGenerator[OutputChunk | ExecResult, None]:
        """All output from the first byte on as it comes, and the result as the last item."""
        async for item in follow_one(self._port.follow(self.op_id), self.op_id):
            yield item

    async def wait(self, *, on_output: OnOutput | None = None) -> ExecResult:
        """Wait for the end; the result has the whole output from the first byte on (within the output limit)."""
        return await _deliver(self.stream(), on_output)

    async def output(self, stdout_offset: int = 0, stderr_offset: int = 0) -> AsyncIterator[OutputChunk]:
        """Output as it comes, from the given offsets on, until the command ends."""
        offsets = {Stream.STDOUT: stdout_offset, Stream.STDERR: stderr_offset}
        async for item in self._port.follow(self.op_id):
            if isinstance(item, OutputChunk) and (chunk := _behind(item, offsets[item.stream])) is not None:
                yield chunk

    async def read_output(self, stream: Stream | str, offset: int, length: int = MAX_BODY_BYTES) -> bytes:
        """Up to ``length`` bytes (at most 1 MiB) of what the sandbox keeps of a stream, also beyond the output limit."""
        if stream not in list(Stream):
            raise InvalidRequestError(f"stream {stream!r} is not known: take stdout or stderr")
        arguments = {"op_id": f"{self.op_id}:0", "stream": Stream(stream).value, "offset": offset, "length": length}
        return (await _when_there(self._port, self.op_id, "read_output", arguments)).body

    async def send_stdin(self, data: bytes | str, *, eof: bool = False) -> None:
        """Give the command more input; returns when all of it was taken over.

        Raises:
            SandboxFileError: code ``stdin_closed``: the command does not read (any more).
            InvalidRequestError: no such command runs, and none is waiting to.
        """
        raw = _as_bytes(data, "stdin")
        async with self._sending:
            if self._sent_bytes is None:  # another handle, perhaps in another process, may have sent something before
                self._sent_bytes = await _pump(self._port, self.op_id, b"", start=0, eof=False)
            self._sent_bytes = await _pump(self._port, self.op_id, raw, start=self._sent_bytes, eof=eof)

    async def close_stdin(self) -> None:
        """End of input."""
        await self.send_stdin(b"", eof=True)

    async def signal(self, name: str | int) -> None:
        """Send a signal (``INT``, ``SIGHUP``, 15, …) to every process of the command."""
        try:
            name = signal.Signals(name).name if isinstance(name, int) else str(name)
        except ValueError:
            raise InvalidRequestError(f"signal {name!r} is not known: take a name such as INT, or its number") from None
        await _when_there(self._port, self.op_id, "signal", {"op_id": f"{self.op_id}:0", "signal": name.upper().removeprefix("SIG")})

    async def kill(self) -> None:
        """End the command with its whole process tree; all dead on return. One that has ended is left as it is."""
        await self._port.cancel(self.op_id)


class AsyncSandboxEnvironment:
    """One sandbox. Use it as ``async with`` (init … teardown), or call both yourself."""

    def __init__(self, port: SandboxPort, config: AppConfig, sandbox_id: str) -> None:
        self._port = port
        self._config = config
        self.sandbox_id = sandbox_id

    async def init(self) -> None:
        """Make the sandbox.

        Raises:
            SandboxStartError, BackendUnavailableError, CapacityError: it could not be made; nothing is left of it.
            InvalidRequestError: the backend cannot enforce what was asked for.
        """
        await self._port.create()

    async def teardown(self) -> None:
        """End the sandbox with all that runs in it. A second call does nothing."""
        with suppress(SandboxNotFoundError):
            await self._port.destroy()
        await self._port.close()

    async def close(self) -> None:
        """Let go of it without ending it; :func:`cifixer_exec.attach` takes it up again."""
        await self._port.close()

    async def run_command(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
        stdin: bytes | str = b"",
        on_output: OnOutput | None = None,
        op_id: str | None = None,
        output_limit_bytes: int | None = None,
    ) -> ExecResult:
        """Run a command to its end.

        ``command``: a shell line, or a list of arguments. ``timeout_s`` None: the configured default. ``on_output`` gets each
        :class:`OutputChunk` as it comes. The same ``op_id`` again runs nothing twice, it gives the same result.

        A command that fails, is killed, or loses its sandbox is a result, never an exception.

        Raises:
            InvalidRequestError, OperationConflictError, SandboxNotFoundError, QueueUnavailableError, BackendError
        """
        source = self.stream_command(
            command, env=env, cwd=cwd, timeout_s=timeout_s, stdin=stdin, op_id=op_id, output_limit_bytes=output_limit_bytes
        )
        return await _deliver(source, on_output)

    async def stream_command(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
        stdin: bytes | str = b"",
        op_id: str | None = None,
        output_limit_bytes: int | None = None,
    ) -> AsyncGenerator[OutputChunk | ExecResult, None]:
        """As :meth:`run_command`, as an iterator: chunks of output, and the result as the last item."""
        raw = _as_bytes(stdin, "stdin")
        inline = len(raw) <= INLINE_STDIN_BYTES
        parsed = self._parse(
            command,
            env=env,
            cwd=cwd,
            timeout_s=timeout_s,
            stdin=raw if inline else b"",
            stdin_open=not inline,
            output_limit_bytes=output_limit_bytes,
        )
        op_id = check_id(op_id, "op id") if op_id is not None else new_op_id()
        source = self._port.run(op_id, [parsed])
        pump = None if inline else asyncio.create_task(_pump_all(self._port, op_id, raw))
        try:
            async for item in follow_one(source, op_id):
                if isinstance(item, ExecResult) and pump is not None and pump.done():
                    pump.result()  # what kept the input from the command is the truth, not what the command made of that
                yield item
        finally:
            if pump is not None:
                pump.cancel()
                await asyncio.gather(pump, return_exceptions=True)

    async def run_batch(
        self,
        commands: Sequence[str | Sequence[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
        op_id: str | None = None,
    ) -> list[ExecResult]:
        """Run commands in order, stop at the first that fails, in one round trip. One result per command that was started."""
        if isinstance(commands, str):
            raise InvalidRequestError(f"run_batch was given the str {commands[:60]!r}: give a list of commands")
        parsed = [self._parse(c, env=env, cwd=cwd, timeout_s=timeout_s) for c in commands]
        if not parsed:
            raise InvalidRequestError("run_batch was given no command: give at least one")
        op_id = check_id(op_id, "op id") if op_id is not None else new_op_id()
        collectors = [OutputCollector() for _ in parsed]
        async for item in self._port.run(op_id, parsed):
            if isinstance(item, Ended):
                return [collectors[i].result(record, op_id) for i, record in enumerate(item.records)]
            if item.index < len(collectors):
                collectors[item.index].add(item)
        raise SandboxLostError("the output ended without a result")

    async def start_command(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
        stdin_open: bool = False,
        op_id: str | None = None,
        output_limit_bytes: int | None = None,
    ) -> AsyncCommandHandle:
        """Start a command in the background. With ``stdin_open`` it waits for :meth:`AsyncCommandHandle.send_stdin`."""
        parsed = self._parse(command, env=env, cwd=cwd, timeout_s=timeout_s, stdin_open=stdin_open, output_limit_bytes=output_limit_bytes)
        op_id = check_id(op_id, "op id") if op_id is not None else new_op_id()
        await self._port.start(op_id, [parsed])
        return AsyncCommandHandle(self._port, op_id)

    def command(self, op_id: str) -> AsyncCommandHandle:
        """The handle of a command that was started before, perhaps by another process."""
        return AsyncCommandHandle(self._port, check_id(op_id, "op id"))

    async def write_file(self, path: str, data: bytes | str, *, mode: int | None = None) -> None:
        """Write a file whole: it is there complete, or as it was before. Parent directories are made.

        Raises:
            InvalidRequestError: the path is not usable or not allowed. SandboxFileError: disk full, is a directory, …
        """
        raw = _as_bytes(data, "the file's content")
        await transfer.write_bytes(self._port.call, check_path(path), raw, mode=mode)

    async def read_file(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """The content of a file of at most ``max_bytes`` (None: the configured ``read_limit_bytes``).

        A sandbox can make a file of any size at no cost, so a larger one is refused before anything is read; download it instead.

        Raises:
            SandboxFileError: ``not_found``, ``is_a_directory``, ``too_large``, ``changed`` while read, …
        """
        limit = self._config.read_limit_bytes if max_bytes is None else max_bytes
        return await transfer.read_bytes(self._port.call, check_path(path), limit_bytes=limit)

    async def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """The content of a text file."""
        return (await self.read_file(path)).decode(encoding)

    async def upload(self, source: str | Path, path: str = ".", *, exclude: Sequence[str] = ()) -> None:
        """Copy a local file to ``path``, or the content of a local directory into it. ``exclude``: glob patterns of names."""
        await transfer.upload(self._port.call, Path(source), check_path(path), exclude)

    async def download(self, path: str, destination: str | Path, *, exclude: Sequence[str] = ()) -> None:
        """Copy a file, or the content of a directory, from the sandbox.

        What comes is untrusted: links out of ``destination`` are refused.
        """
        await transfer.download(self._port.call, check_path(path), Path(destination), exclude)

    async def list_files(self, path: str = ".", *, recursive: bool = False, limit: int = 100_000) -> list[FileInfo]:
        """The entries of a directory, sorted by path.

        Raises:
            SandboxFileError: ``not_found``, …; ``too_many``: there are more than ``limit``. Nothing is left out silently.
        """
        found: list[FileInfo] = []
        more = True
        while more:
            after = found[-1].path if found else ""
            asked = {"path": check_path(path), "recursive": recursive, "limit": limit + 1 - len(found), "after": after}
            document = (await self._port.call("list_files", asked)).document
            files = document.get("files")
            page = [_file(f) for f in (files if isinstance(files, list) else [None])]
            found += page
            if len(found) > limit:
                raise SandboxFileError(f"{path!r} has more than {limit} entries: list parts of it, or give a higher limit", "too_many")
            more = document.get("truncated") is True and bool(page)
        return found

    async def stat(self, path: str) -> FileInfo:
        """One entry, links not followed. Raises SandboxFileError ``not_found``."""
        return _file((await self._port.call("stat", {"path": check_path(path)})).document.get("file"))

    async def exists(self, path: str) -> bool:
        """Whether there is anything at ``path``."""
        try:
            await self.stat(path)
        except SandboxFileError as error:
            if error.code in ("not_found", "not_a_directory"):
                return False
            raise
        return True

    async def mkdir(self, path: str) -> None:
        """Make a directory with its parents; one that is there is fine."""
        await self._port.call("mkdir", {"path": check_path(path), "parents": True})

    async def remove(self, path: str, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file or (``recursive``) a directory. Raises SandboxFileError ``not_found`` unless ``missing_ok``."""
        await self._port.call("remove", {"path": check_path(path), "recursive": recursive, "missing_ok": missing_ok})

    async def extend(self, lifetime_s: float) -> None:
        """Let the sandbox live ``lifetime_s`` from now, on the platform and in the registry."""
        if check_timeout_s(lifetime_s, "lifetime_s") is None:
            raise InvalidRequestError("lifetime_s=None is not usable: give seconds")
        await self._port.extend(lifetime_s)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.sandbox_id}>"

    async def __aenter__(self) -> Self:
        try:
            await self.init()
        except BaseException:
            await self._port.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.teardown()

    def _parse(self, command: str | Sequence[str], **options: Any) -> Command:
        """A checked command with the configured defaults for what was left out."""
        limit = options.pop("output_limit_bytes", None)
        timeout_s = options.pop("timeout_s", None)
        return Command.parse(
            command,
            **options,
            timeout_s=self._config.command_timeout_s if timeout_s is None else timeout_s,
            output_limit_bytes=self._config.output_limit_bytes if limit is None else limit,
            spool_limit_bytes=max(self._config.spool_limit_bytes, limit) if isinstance(limit, int) else self._config.spool_limit_bytes,
        )


async def follow_one(source: AsyncGenerator[OutputChunk | Ended, None], op_id: str) -> AsyncGenerator[OutputChunk | ExecResult, None]:
    """The output of an op with one command, then its result."""
    collector = OutputCollector()
    try:
        async for item in source:
            if isinstance(item, Ended):
                yield collector.result(item.records[0], op_id)
                return
            collector.add(item)
            yield item
    finally:
        await source.aclose()


async def _deliver(source: AsyncGenerator[OutputChunk | ExecResult, None], on_output: OnOutput | None) -> ExecResult:
    async for item in source:
        if isinstance(item, ExecResult):
            return item
        if on_output is not None:
            on_output(item)
    raise SandboxLostError("the output ended without a result")


def _as_bytes(data: bytes | str, what: str) -> bytes:
    if not isinstance(data, (str, bytes, bytearray, memoryview)):
        raise InvalidRequestError(f"{what} is a {type(data).__name__}: give bytes or str")
    try:
        return data.encode() if isinstance(data, str) else bytes(data)
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{what} has lone surrogates, which are no text: give bytes") from None


def _file(data: object) -> FileInfo:
    """Checked: it comes from a sandbox."""
    wanted = {"path": str, "name": str, "type": str, "size": int, "mode": int, "mtime_ns": int, "target": str | None}
    if not isinstance(data, dict) or not all(isinstance(data.get(name), kind) for name, kind in wanted.items()):
        raise BackendError("the sandbox's runner described a file in a way that cannot be: it has been tampered with")
    return FileInfo.from_json(data)


def _behind(chunk: OutputChunk, offset: int) -> OutputChunk | None:
    known = offset - chunk.offset
    if known <= 0:
        return chunk
    data = chunk.data[known:]
    return OutputChunk(stream=chunk.stream, offset=offset, data=data, index=chunk.index) if data else None


async def _pump(port: SandboxPort, op_id: str, data: bytes, *, start: int, eof: bool) -> int:
    """Send ``data`` as stdin from offset ``start`` on; returns how many bytes the command was given in all."""
    sent = 0
    while True:
        piece = data[sent : sent + MAX_BODY_BYTES // 4]
        last = sent + len(piece) == len(data)
        arguments = {"op_id": f"{op_id}:0", "offset": start + sent, "eof": eof and last}
        answer = await _when_there(port, op_id, "stdin", arguments, piece)
        accepted = whole_number(answer, "accepted_bytes")  # the runner counts from the first byte of all
        sent = accepted - start
        if sent >= len(data):
            return accepted


async def _when_there(port: SandboxPort, op_id: str, verb: str, arguments: Mapping[str, Any], body: bytes = b"") -> Answer:
    """A request about a command, repeated while that is still on its way to the runner.

    Raises:
        InvalidRequestError: there is no such command, and none will come.
    """
    while True:
        try:
            return await port.call(verb, arguments, body)
        except InvalidRequestError as error:
            if error.code != "op_unknown" or not await port.pending(op_id):
                raise
        await asyncio.sleep(0.02)


async def _pump_all(port: SandboxPort, op_id: str, data: bytes) -> None:
    """All of stdin and its end. A command that does not read it all, or ends before, is no error; any other trouble ends the command."""
    try:
        await _pump(port, op_id, data, start=0, eof=True)
    except (SandboxFileError, SandboxNotFoundError, SandboxLostError):
        return
    except ExecutorError:
        with suppress(ExecutorError):
            await port.cancel(op_id)
        raise
