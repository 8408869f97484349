"""Running a command with its output passed on as it comes, byte by byte."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from cifixer_exec.blocking import SandboxEnvironment
from cifixer_exec.cli import exits
from cifixer_exec.cli.progress import tell
from cifixer_exec.model import OutputChunk, Stream
from cifixer_exec.operations import new_op_id


class LiveOutput:
    """Writes stdout to stdout and stderr to stderr, nothing decoded. What was cut out is told on stderr."""

    def __init__(self, stdout: BinaryIO | None = None, stderr: BinaryIO | None = None) -> None:
        self._files = {Stream.STDOUT: stdout or sys.stdout.buffer, Stream.STDERR: stderr or sys.stderr.buffer}
        self._ends = dict.fromkeys(Stream, 0)

    def __call__(self, chunk: OutputChunk) -> None:
        missing = chunk.offset - self._ends[chunk.stream]
        if missing > 0:
            tell(f"{missing} bytes of {chunk.stream} are left out here: give a higher --output-limit (CIFIXER_OUTPUT_LIMIT)")
        self._ends[chunk.stream] = chunk.offset + len(chunk.data)
        self._files[chunk.stream].write(chunk.data)
        self._files[chunk.stream].flush()


def run_live(
    sandbox: SandboxEnvironment,
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    timeout_s: float | None = None,
    stdin: bytes = b"",
    op_id: str | None = None,
    output_limit_bytes: int | None = None,
) -> int:
    """Run ``command``, pass its output on, and return the exit code that tells how it ended. Interrupted, it kills the command."""
    op_id = op_id or new_op_id()
    try:
        result = sandbox.run_command(
            list(command),
            env=env,
            cwd=cwd,
            timeout_s=timeout_s,
            stdin=stdin,
            on_output=LiveOutput(),
            op_id=op_id,
            output_limit_bytes=output_limit_bytes,
        )
    except (KeyboardInterrupt, SystemExit, BrokenPipeError):
        sandbox.command(op_id).kill()
        raise
    if line := exits.ending(result):
        tell(line)
    return exits.exit_code(result)
