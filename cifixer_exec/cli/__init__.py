"""``cifixer-exec``: the command line. Each command is thin; what it does is in the module it is named after."""

from cifixer_exec.cli.program import main

__all__ = ["main"]
