"""Ways in which a sandbox of the local backend dies behind everyone's back."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

from cifixer_exec import AppConfig
from cifixer_exec.backends.local.processes import descendants


def _pid(config: AppConfig, sandbox_id: str, file: str) -> int:
    return int(json.loads((_directory(config, sandbox_id) / file).read_text())["pid"])


def _directory(config: AppConfig, sandbox_id: str) -> Path:
    return next(config.state_dir.glob(f"*/sandboxes/{sandbox_id}"))


def kill_init(config: AppConfig, sandbox_id: str) -> None:
    """The sandbox's PID 1, which is the runner: the kernel ends the rest."""
    os.kill(_pid(config, sandbox_id, "init.json"), signal.SIGKILL)


def kill_all(config: AppConfig, sandbox_id: str) -> None:
    """Every process of its directory, bubblewrap outside first, as an operator's ``pkill -f`` does it."""
    launched = _pid(config, sandbox_id, "launch.json")
    for pid in [launched, *descendants(launched), _pid(config, sandbox_id, "init.json")]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
