"""Where the runner binaries are that the package build made (``runner/hatch_build.py``)."""

from __future__ import annotations

import platform
from pathlib import Path

from cifixer_exec.errors import BackendUnavailableError

_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_DIRECTORY = Path(__file__).resolve().parent.parent / "_runner"


def runner_path(machine: str | None = None) -> Path:
    """The static Linux binary for ``machine`` (as ``uname -m`` says it; None: this machine).

    Raises:
        BackendUnavailableError: no binary for it, or the installation has none.
    """
    machine = platform.machine() if machine is None else machine
    architecture = _ARCHITECTURES.get(machine.lower())
    if architecture is None:
        raise BackendUnavailableError(f"there is no runner for machine {machine!r}: use linux/amd64 or linux/arm64")
    path = _DIRECTORY / f"runner-linux-{architecture}"
    if not path.is_file():
        raise BackendUnavailableError(f"the runner binary {path} is missing: install from a wheel, or run 'make runner' in a checkout")
    return path
