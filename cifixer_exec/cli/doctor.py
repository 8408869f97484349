"""``doctor``: what is there, what is missing, and the line that mends it."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from cifixer_exec.backends.breaker import BreakerState
from cifixer_exec.backends.registry import backend_names, make_backend
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.cli.exits import error_line
from cifixer_exec.cli.reach import Reach, check_workers, known_config
from cifixer_exec.errors import ExecutorError
from cifixer_exec.settings import AppConfig
from cifixer_exec.stack.parts import find_redis


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. ``needed``: without it nothing works here."""

    name: str
    ok: bool
    summary: str
    remedy: str = ""
    needed: bool = True


def examine(reach: Reach) -> Iterator[Finding]:
    """Look at everything, one finding after the other (a backend's probe makes a real sandbox and removes it)."""
    config = reach.settings()
    yield _python()
    yield _runner()
    yield from _queue(reach)
    yield _flower()
    for name in backend_names():
        yield from _backend(config.with_(execution_backend=name), needed=name == config.execution_backend)


def healthy(findings: Sequence[Finding]) -> bool:
    """True if nothing that is needed is missing."""
    return all(f.ok for f in findings if f.needed)


def show(finding: Finding) -> None:
    """One line, and one for the remedy."""
    console = Console(highlight=False, soft_wrap=True)
    mark = "[green]ok[/]     " if finding.ok else ("[red]missing[/]" if finding.needed else "[yellow]absent[/] ")
    console.print(f"{mark} {finding.name:<18} {escape(finding.summary)}")
    if finding.remedy and not finding.ok:
        console.print(f"        {'':<18} → {escape(finding.remedy)}")


def to_json(findings: Sequence[Finding]) -> str:
    """For scripts."""
    return json.dumps([asdict(f) for f in findings], indent=2)


def _python() -> Finding:
    ok = sys.version_info >= (3, 11) and sys.platform == "linux"
    summary = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding(name="python", ok=ok, summary=summary, remedy="use Python 3.11 or newer on Linux")


def _runner() -> Finding:
    return _tried("runner", lambda: str(runner_path()))


def _queue(reach: Reach) -> Iterator[Finding]:
    """A stack that is known must work; if none is, one must be possible."""
    config = known_config(reach)
    named = config is not None and config.dispatch == "queue"
    yield _tried("embedded redis", lambda: str(find_redis()), needed=config is None)
    if config is None or not named:
        summary = "none: commands start one of their own" if config is None else "not used: --direct"
        yield Finding(name="stack", ok=True, summary=summary, needed=False)
        return
    try:
        workers = check_workers(config, needed=False)
    except ExecutorError as error:
        yield Finding(
            name="redis", ok=False, summary=error.message, remedy="start it, or unset CIFIXER_REDIS_URL and run `cifixer-exec up`"
        )
        return
    yield Finding(name="redis", ok=True, summary=f"answers; namespace {config.namespace!r}")
    if not workers:
        yield Finding(name="workers", ok=False, summary="no worker holds a lease", remedy="start one with `cifixer-exec worker`")
    for worker in workers:
        told = ", ".join(f"{key} {worker.info.get(key)}" for key in ("backend", "placement", "sandboxes", "active", "breaker"))
        away = worker.info.get("breaker", BreakerState.CLOSED) != BreakerState.CLOSED
        remedy = "its backend does not answer: mend that, and the worker goes on by itself"
        yield Finding(name="worker", ok=not away, summary=f"{worker.worker_id}: {told}", remedy=remedy)


def flower_installed() -> bool:
    """Whether Flower can be started here."""
    return find_spec("flower") is not None


def _flower() -> Finding:
    there = flower_installed()
    remedy = "pip install 'cifixer-exec[flower]'"
    return Finding(name="flower", ok=there, summary="installed" if there else "not installed", remedy=remedy, needed=False)


def _backend(config: AppConfig, *, needed: bool) -> Iterator[Finding]:
    name = f"backend {config.execution_backend}"
    with tempfile.TemporaryDirectory(prefix="cifixer-doctor-") as directory:
        try:
            health = make_backend(config.with_(state_dir=Path(directory))).probe()
        except ExecutorError as error:
            yield Finding(name=name, ok=False, summary=error_line(error), remedy=error.code, needed=needed)
            return
    yield Finding(name=name, ok=health.ok, summary=health.summary, remedy=health.remedy, needed=needed)
    if limits := health.details.get("limits"):
        remedy = health.details.get("limits_remedy", "")
        yield Finding(name="limits", ok="NOT limited" not in limits, summary=limits, remedy=remedy, needed=False)
    for wish in ("runner image", "network policies"):
        if wish in health.details:
            yield Finding(name=wish, ok=False, summary=health.details[wish], remedy=health.details[f"{wish}_remedy"], needed=False)


def _tried(name: str, look: Callable[[], str], *, needed: bool = True) -> Finding:
    try:
        return Finding(name=name, ok=True, summary=look(), needed=needed)
    except ExecutorError as error:
        return Finding(name=name, ok=False, summary=error.message, needed=needed)
