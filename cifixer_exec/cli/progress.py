"""What a person sees while something takes its time: always on stderr, so that stdout stays the command's own."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

#: In a pipe only what takes longer than this is worth a line.
SLOW_S = 1.0


def tell(text: str) -> None:
    """One line."""
    print(f"cifixer-exec: {text}", file=sys.stderr, flush=True)


@contextmanager
def step(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Show ``text`` while the block runs: a spinner on a terminal; in a pipe two lines, and only if it takes long."""
    if quiet:
        yield
    elif sys.stderr.isatty():
        with Console(stderr=True).status(f"{text} …"):
            yield
    else:
        yield from _plain(text)


def _plain(text: str) -> Iterator[None]:
    began = time.monotonic()
    timer = threading.Timer(SLOW_S, tell, (f"{text} …",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (took_s := time.monotonic() - began) > SLOW_S:
        tell(f"{text}: done in {took_s:.1f} s")
