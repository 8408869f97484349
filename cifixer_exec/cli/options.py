"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from cifixer_exec.cli.reach import Reach
from cifixer_exec.model import MIB

F = TypeVar("F", bound=Callable[..., Any])

redis_url = click.option(
    "--redis-url",
    envvar="CIFIXER_REDIS_URL",
    show_envvar=True,
    metavar="URL",
    help="The Redis of the stack to use. Left out: the stack that `cifixer-exec up` of this user keeps.",
)
direct = click.option("--direct", is_flag=True, help="Without a queue: this process and the backend alone.")
backend = click.option("--backend", metavar="NAME", help="Which backend; left out: CIFIXER_BACKEND, else local.")
unsafe = click.option(
    "--unsafe-no-isolation", is_flag=True, help="Run commands WITHOUT a sandbox, as this user on this host. Only for code you trust."
)
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
loglevel = click.option("--loglevel", default="INFO", show_default=True, metavar="LEVEL")
env = click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", callback=lambda _c, _p, pairs: parse_env(pairs), help="Repeatable.")
cwd = click.option("--cwd", metavar="PATH", help="Where to run it; left out: the workspace.")
timeout = click.option("--timeout", "timeout_s", type=float, metavar="SECONDS", help="Then its process tree is killed (exit code 124).")
stdin = click.option("-i", "--stdin", "with_stdin", is_flag=True, help="Read stdin to its end and pass it to the command.")
output_limit = click.option(
    "--output-limit",
    "output_limit_bytes",
    type=click.IntRange(0, 1 << 30),
    default=256 * MIB,
    show_default=True,
    metavar="BYTES",
    help="Of each stream this much is passed on, and of what is beyond the last MiB.",
)
op_id = click.option("--op-id", metavar="ID", help="The same id again does not run the command again, it gives the same result.")
command = click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)  # a list, no shell line


def reach(*, direct_too: bool = True, backend_too: bool = False, unsafe_too: bool = False) -> Callable[[F], F]:
    """The options that say which stack; the command gets them as one ``reach`` argument."""

    def decorate(function: F) -> F:
        @wraps(function)
        def with_reach(*args: Any, **options: Any) -> Any:
            names = ("redis_url", "direct", "backend", "unsafe_no_isolation")
            said = {name: options.pop(name) for name in names if name in options}
            return function(*args, reach=Reach(**said), **options)

        made: Any = redis_url(with_reach)
        for wanted, option in ((direct_too, direct), (backend_too, backend), (unsafe_too, unsafe)):
            made = option(made) if wanted else made
        result: F = made
        return result

    return decorate


def parse_env(pairs: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE`` texts as a dict. Raises click.BadParameter without showing a value."""
    wrong = next((p for p in pairs if "=" not in p[1:]), None)
    if wrong is not None:
        raise click.BadParameter(f"{wrong!r} is not NAME=VALUE")
    return dict(p.split("=", 1) for p in pairs)
