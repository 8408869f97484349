"""The blocking face of a sandbox: the same names as :mod:`cifixer_exec.environment`, for callers without an event loop.

Nothing is written twice: each method hands its async twin to the process's portal and waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cifixer_exec.channel.portal import Portal
from cifixer_exec.environment import AsyncCommandHandle, AsyncSandboxEnvironment
from cifixer_exec.errors import SandboxLostError
from cifixer_exec.model import MAX_BODY_BYTES, ExecResult, FileInfo, OnOutput, OutputChunk, Stream


class CommandHandle:
    """Blocking :class:`~cifixer_exec.environment.AsyncCommandHandle`."""

    def __init__(self, handle: AsyncCommandHandle, portal: Portal) -> None:
        self._handle = handle
        self._portal = portal
        self.op_id = handle.op_id

    def wait(self, *, on_output: OnOutput | None = None) -> ExecResult:
        """Wait for the end. ``on_output`` is called in this thread."""
        return _deliver(self._portal.iterate(self._handle.stream()), on_output)

    def output(self, stdout_offset: int = 0, stderr_offset: int = 0) -> Iterator[OutputChunk]:
        """Output as it comes, from the given offsets on, until the command ends."""
        return self._portal.iterate(self._handle.output(stdout_offset, stderr_offset))

    def read_output(self, stream: Stream | str, offset: int, length: int = MAX_BODY_BYTES) -> bytes:
        """A piece of what the sandbox keeps of a stream, also beyond the output limit."""
        return self._portal.call(self._handle.read_output(stream, offset, length))

    def send_stdin(self, data: bytes | str, *, eof: bool = False) -> None:
        """Give the command more input; returns when all of it was taken over."""
        self._portal.call(self._handle.send_stdin(data, eof=eof))

    def close_stdin(self) -> None:
        """End of input."""
        self._portal.call(self._handle.close_stdin())

    def signal(self, name: str | int) -> None:
        """Send a signal to every process of the command."""
        self._portal.call(self._handle.signal(name))

    def kill(self) -> None:
        """End the command with its whole process tree; all dead on return."""
        self._portal.call(self._handle.kill())


class SandboxEnvironment:
    """Blocking :class:`~cifixer_exec.environment.AsyncSandboxEnvironment`; every error is the same. Safe to use from many threads."""

    def __init__(self, environment: AsyncSandboxEnvironment, portal: Portal) -> None:
        self._environment = environment
        self._portal = portal
        self.sandbox_id = environment.sandbox_id

    def init(self) -> None:
        """Make the sandbox."""
        self._portal.call(self._environment.init())

    def teardown(self) -> None:
        """End the sandbox with all that runs in it. A second call does nothing."""
        self._portal.call(self._environment.teardown())

    def close(self) -> None:
        """Let go of it without ending it; :func:`cifixer_exec.attach` takes it up again."""
        self._portal.call(self._environment.close())

    def run_command(
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
        """Run a command to its end. ``on_output`` is called in this thread with each chunk as it comes."""
        if on_output is None:
            return self._portal.call(
                self._environment.run_command(
                    command, env=env, cwd=cwd, timeout_s=timeout_s, stdin=stdin, op_id=op_id, output_limit_bytes=output_limit_bytes
                )
            )
        source = self._environment.stream_command(
            command, env=env, cwd=cwd, timeout_s=timeout_s, stdin=stdin, op_id=op_id, output_limit_bytes=output_limit_bytes
        )
        return _deliver(self._portal.iterate(source), on_output)

    def run_batch(
        self,
        commands: Sequence[str | Sequence[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
        op_id: str | None = None,
    ) -> list[ExecResult]:
        """Run commands in order, stop at the first that fails, in one round trip."""
        return self._portal.call(self._environment.run_batch(commands, env=env, cwd=cwd, timeout_s=timeout_s, op_id=op_id))

    def start_command(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
        stdin_open: bool = False,
        op_id: str | None = None,
        output_limit_bytes: int | None = None,
    ) -> CommandHandle:
        """Start a command in the background."""
        started = self._environment.start_command(
            command, env=env, cwd=cwd, timeout_s=timeout_s, stdin_open=stdin_open, op_id=op_id, output_limit_bytes=output_limit_bytes
        )
        return CommandHandle(self._portal.call(started), self._portal)

    def command(self, op_id: str) -> CommandHandle:
        """The handle of a command that was started before, perhaps by another process."""
        return CommandHandle(self._environment.command(op_id), self._portal)

    def write_file(self, path: str, data: bytes | str, *, mode: int | None = None) -> None:
        """Write a file whole; parent directories are made."""
        self._portal.call(self._environment.write_file(path, data, mode=mode))

    def read_file(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """The content of a file of at most ``max_bytes``."""
        return self._portal.call(self._environment.read_file(path, max_bytes=max_bytes))

    def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """The content of a text file."""
        return self._portal.call(self._environment.read_text(path, encoding))

    def upload(self, source: str | Path, path: str = ".", *, exclude: Sequence[str] = ()) -> None:
        """Copy a local file to ``path``, or the content of a local directory into it."""
        self._portal.call(self._environment.upload(source, path, exclude=exclude))

    def download(self, path: str, destination: str | Path, *, exclude: Sequence[str] = ()) -> None:
        """Copy a file, or the content of a directory, from the sandbox."""
        self._portal.call(self._environment.download(path, destination, exclude=exclude))

    def list_files(self, path: str = ".", *, recursive: bool = False, limit: int = 100_000) -> list[FileInfo]:
        """The entries of a directory, sorted by path."""
        return self._portal.call(self._environment.list_files(path, recursive=recursive, limit=limit))

    def stat(self, path: str) -> FileInfo:
        """One entry, links not followed."""
        return self._portal.call(self._environment.stat(path))

    def exists(self, path: str) -> bool:
        """Whether there is anything at ``path``."""
        return self._portal.call(self._environment.exists(path))

    def mkdir(self, path: str) -> None:
        """Make a directory with its parents."""
        self._portal.call(self._environment.mkdir(path))

    def remove(self, path: str, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file or directory."""
        self._portal.call(self._environment.remove(path, recursive=recursive, missing_ok=missing_ok))

    def extend(self, lifetime_s: float) -> None:
        """Let the sandbox live ``lifetime_s`` from now."""
        self._portal.call(self._environment.extend(lifetime_s))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.sandbox_id}>"

    def __enter__(self) -> Self:
        try:
            self.init()
        except BaseException:
            self.close()  # __exit__ is not called for a block that was never entered
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.teardown()


def _deliver(items: Iterator[OutputChunk | ExecResult], on_output: OnOutput | None) -> ExecResult:
    for item in items:
        if isinstance(item, ExecResult):
            return item
        if on_output is not None:
            on_output(item)
    raise SandboxLostError("the output ended without a result")
