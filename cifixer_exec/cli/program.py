"""The program: its commands, and how every error ends it with one clear line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from cifixer_exec.cli import exits, health_commands, sandbox_commands, stack_commands
from cifixer_exec.cli.progress import tell
from cifixer_exec.errors import ExecutorError

PROGRAM = "cifixer-exec"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": None})
@click.version_option(package_name=PROGRAM, prog_name=PROGRAM)
def program() -> None:
    """Run untrusted commands in sandboxes, through a queue or directly."""


for _command in (
    *(sandbox_commands.run, sandbox_commands.create, sandbox_commands.execute, sandbox_commands.list_sandboxes),
    *(sandbox_commands.logs, sandbox_commands.copy, sandbox_commands.remove),
    *(stack_commands.up, stack_commands.worker, stack_commands.beat, stack_commands.flower, stack_commands.reap, stack_commands.doctor),
    health_commands.healthy,
):
    program.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(outcome(arguments))


def outcome(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    try:
        code = program.main(args=None if arguments is None else list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ExecutorError as error:
        tell(f"error: {exits.error_line(error)}")
        return exits.error_code(error)
    except (click.Abort, KeyboardInterrupt):
        tell("interrupted")
        return exits.INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return 128 + signal.SIGPIPE
    return int(code or 0)


def _terminated(number: int, _: FrameType | None) -> None:
    """SIGTERM unwinds as Ctrl-C does, so that sandboxes and stacks end in order."""
    raise SystemExit(128 + number)


def _forget_stdout() -> None:
    """Whoever read our output is gone; the interpreter would complain when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
