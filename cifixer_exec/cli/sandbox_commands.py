"""Commands on sandboxes: run, create, exec, ls, logs, cp, rm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from cifixer_exec.blocking import SandboxEnvironment
from cifixer_exec.cli import copying, exits, journaled, listing, options, progress
from cifixer_exec.cli.live import run_live
from cifixer_exec.cli.reach import Reach, existing_stack, stack_for_run
from cifixer_exec.client import attach, create_sandbox
from cifixer_exec.errors import ExecutorError
from cifixer_exec.settings import AppConfig


@click.command()
@options.reach(backend_too=True, unsafe_too=True)
@click.option(
    "--upload", type=click.Path(exists=True), metavar="PATH", help="Copy this directory's content (or this file) into the workspace first."
)
@options.env
@options.cwd
@options.timeout
@options.output_limit
@options.stdin
@options.quiet
@options.command
def run(
    *,
    reach: Reach,
    upload: str | None,
    env: dict[str, str],
    cwd: str | None,
    timeout_s: float | None,
    output_limit_bytes: int,
    with_stdin: bool,
    quiet: bool,
    command: tuple[str, ...],
) -> int:
    """Run one COMMAND in a new sandbox with live output and end with its exit code.

    COMMAND is a program and its arguments; for a shell line give: sh -c 'a | b'

    128+n: ended by signal n. 124: timed out. 137: killed, or out of memory. 125: nobody knows. 2, 3: cifixer-exec itself failed.
    """
    stdin = sys.stdin.buffer.read() if with_stdin else b""
    with stack_for_run(reach, quiet=quiet) as config, new_sandbox(config, quiet=quiet) as sandbox:
        if upload is not None:
            with progress.step(f"uploading {upload}", quiet=quiet):
                copying.copy(sandbox, copying.Side(None, upload), copying.Side(sandbox.sandbox_id, "."))
        return run_live(sandbox, command, env=env, cwd=cwd, timeout_s=timeout_s, stdin=stdin, output_limit_bytes=output_limit_bytes)


@click.command()
@options.reach(backend_too=True, unsafe_too=True)
@click.option("--image", metavar="IMAGE", help="For backends with images.")
@click.option("--lifetime", "lifetime_s", type=float, metavar="SECONDS", help="It ends then by itself.")
@options.env
@options.quiet
def create(*, reach: Reach, image: str | None, lifetime_s: float | None, env: dict[str, str], quiet: bool) -> None:
    """Make a sandbox that stays, and print its id."""
    chosen = {"image": image, "lifetime_s": lifetime_s, "env": env or None}
    config = existing_stack(reach).with_(**{k: v for k, v in chosen.items() if v is not None})
    sandbox = create_sandbox(config)
    with progress.step("making a sandbox", quiet=quiet):
        sandbox.init()
    print(sandbox.sandbox_id)
    sandbox.close()


@click.command("exec")
@options.reach()
@options.env
@options.cwd
@options.timeout
@options.output_limit
@options.stdin
@options.op_id
@click.option("-d", "--detach", is_flag=True, help="Do not wait: print the op id, which `logs` takes.")
@click.argument("sandbox_id", metavar="ID")
@options.command
def execute(
    *,
    reach: Reach,
    env: dict[str, str],
    cwd: str | None,
    timeout_s: float | None,
    output_limit_bytes: int,
    with_stdin: bool,
    op_id: str | None,
    detach: bool,
    sandbox_id: str,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND in sandbox ID; exit codes as those of `run`."""
    if detach and with_stdin:
        raise click.UsageError("--detach and --stdin do not go together: nobody would be there to pass it on")
    stdin = sys.stdin.buffer.read() if with_stdin else b""
    with attached(reach, sandbox_id) as sandbox:
        if detach:
            print(
                sandbox.start_command(
                    list(command), env=env, cwd=cwd, timeout_s=timeout_s, op_id=op_id, output_limit_bytes=output_limit_bytes
                ).op_id
            )
            return 0
        return run_live(
            sandbox, command, env=env, cwd=cwd, timeout_s=timeout_s, stdin=stdin, op_id=op_id, output_limit_bytes=output_limit_bytes
        )


@click.command("ls")
@options.reach(backend_too=True)
@click.option("--json", "as_json", is_flag=True, help="For scripts; times are Unix seconds.")
def list_sandboxes(*, reach: Reach, as_json: bool) -> None:
    """List the sandboxes."""
    listing.show_rows(listing.find_rows(existing_stack(reach, with_worker=False)), as_json=as_json)


@click.command()
@options.reach(direct_too=False)
@click.option("-f", "--follow", is_flag=True, help="Go on until the command ends.")
@click.argument("sandbox_id", metavar="ID")
@click.argument("op_id", metavar="OP")
def logs(*, reach: Reach, follow: bool, sandbox_id: str, op_id: str) -> None:
    """Write the output of op OP of sandbox ID as the journal has it: from the first byte, up to the op's output limit."""
    journaled.show_output(existing_stack(reach, with_worker=False), sandbox_id, op_id, follow=follow)


@click.command("cp")
@options.reach()
@options.quiet
@click.argument("source")
@click.argument("destination")
def copy(*, reach: Reach, quiet: bool, source: str, destination: str) -> None:
    """Copy a file, or the content of a directory; one side is ID:path (a path within the workspace, or absolute)."""
    here_or_there = copying.parse_copy(source, destination)
    sandbox_id = next(side.sandbox_id for side in here_or_there if side.sandbox_id is not None)
    with attached(reach, sandbox_id) as sandbox, progress.step(f"copying {source} to {destination}", quiet=quiet):
        copying.copy(sandbox, *here_or_there)


@click.command("rm")
@options.reach()
@click.argument("sandbox_ids", metavar="ID…", nargs=-1, required=True)
def remove(*, reach: Reach, sandbox_ids: tuple[str, ...]) -> int:
    """End sandboxes with all that runs in them. All are tried; the worst failure is the exit code."""
    config, code = existing_stack(reach), 0
    for sandbox_id in sandbox_ids:
        try:
            with progress.step(f"removing {sandbox_id}"):
                attach(sandbox_id, config).teardown()
            print(sandbox_id)
        except ExecutorError as error:
            progress.tell(exits.error_line(error))
            code = max(code, exits.error_code(error))
    return code


@contextmanager
def new_sandbox(config: AppConfig, *, quiet: bool) -> Iterator[SandboxEnvironment]:
    """A sandbox for the block; ended also when making it was interrupted, because the queue may still make it."""
    sandbox = create_sandbox(config)
    try:
        with progress.step("making a sandbox", quiet=quiet):
            sandbox.init()
        yield sandbox
    except BaseException:
        with suppress(ExecutorError):  # the first error is the one to tell
            sandbox.teardown()
        raise
    sandbox.teardown()


@contextmanager
def attached(reach: Reach, sandbox_id: str) -> Iterator[SandboxEnvironment]:
    """A sandbox that is there; it stays."""
    sandbox = attach(sandbox_id, existing_stack(reach))
    try:
        yield sandbox
    finally:
        sandbox.close()
