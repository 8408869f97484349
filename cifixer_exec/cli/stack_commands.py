"""Commands on stacks: up, worker, beat, flower, reap, doctor."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys

import click

from cifixer_exec.cli import doctor as examination
from cifixer_exec.cli import exits, options, progress
from cifixer_exec.cli.reach import Reach, ask, existing_stack, known_config
from cifixer_exec.errors import InvalidRequestError, QueueUnavailableError
from cifixer_exec.settings import AppConfig
from cifixer_exec.stack import parts
from cifixer_exec.stack.embedded import EmbeddedStack
from cifixer_exec.stack.parts import Part
from cifixer_exec.stack.running import announce, find_running, withdraw
from cifixer_exec.wiring import make_reaper

FLOWER_PORT = 5555


@click.command()
@click.option("--redis-url", metavar="URL", help="Use this Redis instead of starting one.")
@options.backend
@click.option("--flower", is_flag=True, help="Start Flower too (read-only, behind a password that is printed).")
@click.option("--port-flower", type=click.IntRange(1, 65535), default=FLOWER_PORT, show_default=True)
@options.loglevel
@options.unsafe
def up(*, redis_url: str | None, backend: str | None, flower: bool, port_flower: int, loglevel: str, unsafe_no_isolation: bool) -> int:
    """Keep a stack running in the foreground: Redis, a worker, beat. Ctrl-C drains it, a second one does not wait."""
    config = Reach(backend=backend, unsafe_no_isolation=unsafe_no_isolation).settings()
    if (other := find_running(config.state_dir)) is not None:
        raise InvalidRequestError(f"a stack of this user is up already (pid {other.pid}): use it, or end it with Ctrl-C or SIGTERM")
    if flower:
        require_flower()
    # A shell without job control starts background programs with SIGINT ignored; this one is ended by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stack = EmbeddedStack(config, redis_url=redis_url, flower_port=port_flower if flower else 0, loglevel=loglevel)
    with progress.step("starting the stack"):
        stack.start()
    try:
        announce(stack.config, config.state_dir)
        print_welcome(stack)
        return keep(stack)
    finally:
        withdraw(config.state_dir)
        stack.stop()


def keep(stack: EmbeddedStack) -> int:
    """Wait for Ctrl-C, SIGTERM or the death of a part, then stop; the exit code."""
    obituary = None
    try:
        obituary = stack.wait()
    except (KeyboardInterrupt, SystemExit):
        progress.tell("draining (Ctrl-C again: do not wait)")
    leftovers = stack.stop(drain=obituary is None)
    if obituary is not None:
        raise QueueUnavailableError(f"the stack is of no use any more and was stopped: {obituary}")
    progress.tell(f"stopped; left behind: {leftovers}")
    return 0 if not leftovers.processes and not leftovers.directories and not leftovers.keys else exits.FAILED


def print_welcome(stack: EmbeddedStack) -> None:
    """The lines to use it."""
    print(f"# up: worker for backend {stack.config.execution_backend!r}, logs in {stack.directory}; Ctrl-C drains and ends it")
    for variable in ("CIFIXER_BACKEND", "CIFIXER_REDIS_URL", "CIFIXER_NAMESPACE", "CIFIXER_READONLY_PATHS"):
        if variable in (given := stack.config.to_env()):
            print(f"export {variable}={shlex.quote(given[variable])}")
    if stack.flower_port:
        print(f"# Flower: http://127.0.0.1:{stack.flower_port}/ user {parts.FLOWER_USER}, password {stack.flower_password}")
    sys.stdout.flush()


@click.command()
@options.reach(direct_too=False, backend_too=True, unsafe_too=True)
@click.option(
    "--concurrency", type=click.IntRange(1, 10_000), metavar="N", help="How many ops at once; left out: CIFIXER_WORKER_CONCURRENCY."
)
@options.loglevel
def worker(*, reach: Reach, concurrency: int | None, loglevel: str) -> None:
    """Run a worker in the foreground (celery worker with the right options)."""
    config = named_stack(reach)
    if concurrency is not None:
        config = config.with_(worker_concurrency=concurrency)
    become(parts.worker(loglevel), config)


@click.command()
@options.reach(direct_too=False)
@options.loglevel
def beat(*, reach: Reach, loglevel: str) -> None:
    """Run beat, the reaper's clock, in the foreground. One per installation is enough; two do no harm."""
    become(parts.beat(loglevel), named_stack(reach))


@click.command()
@options.reach(direct_too=False)
@click.option("--address", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=FLOWER_PORT, show_default=True)
@click.option("--password", envvar="CIFIXER_FLOWER_PASSWORD", show_envvar=True, help="Left out: a new one, which is printed.")
@click.option(
    "--cookie-secret", envvar="CIFIXER_FLOWER_COOKIE_SECRET", show_envvar=True, help="Left out: a new one; who is logged in is out then."
)
def flower(*, reach: Reach, address: str, port: int, password: str | None, cookie_secret: str | None) -> None:
    """Run Flower, read-only, in the foreground."""
    require_flower()
    chosen = password or secrets.token_urlsafe(18)
    progress.tell(f"http://{address}:{port}/ user {parts.FLOWER_USER}, password {'as given' if password else chosen}")
    become(parts.flower(port, chosen, cookie_secret or secrets.token_urlsafe(32), address=address), named_stack(reach))


@click.command()
@options.reach(direct_too=False, backend_too=True)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def reap(*, reach: Reach, dry_run: bool) -> int:
    """Destroy orphaned and expired sandboxes that can be reached from here, now."""
    config = existing_stack(reach, with_worker=False)
    with progress.step("reaping"):
        reaped = ask(config, lambda journal: make_reaper(config, journal).reap(dry_run=dry_run))
    would = "would be " if reaped.dry_run else ""
    for word, ids in (("destroyed", reaped.destroyed), ("closed", reaped.closed), ("not removed, try again", reaped.failed)):
        for sandbox_id in ids:
            print(f"{sandbox_id}: {would}{word}")
    progress.tell(f"{len(reaped.destroyed)} {would}destroyed, {len(reaped.closed)} {would}closed, {len(reaped.failed)} failed")
    return exits.FAILED if reaped.failed else 0


@click.command()
@options.reach(backend_too=True, unsafe_too=True)
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def doctor(*, reach: Reach, as_json: bool) -> int:
    """Say what is there, what is missing, and the line that mends it. Exit code 1 if something needed is missing."""
    findings = []
    for finding in examination.examine(reach):
        findings.append(finding)
        if not as_json:
            examination.show(finding)
    if as_json:
        print(examination.to_json(findings))
    return 0 if examination.healthy(findings) else 1


def named_stack(reach: Reach) -> AppConfig:
    """What was named or is running, else the default Redis. The part itself waits for a Redis that is not there yet."""
    config = known_config(reach)
    return reach.settings() if config is None else config


def require_flower() -> None:
    """Raises InvalidRequestError if Flower is not installed."""
    if not examination.flower_installed():
        raise InvalidRequestError("Flower is not installed: pip install 'cifixer-exec[flower]'")


def become(part: Part, config: AppConfig) -> None:
    """Be that part from now on: signals, output and exit code are its own."""
    sys.stdout.flush()
    os.execve(part.command[0], part.command, parts.child_environment(config, **part.variables))  # noqa: S606
