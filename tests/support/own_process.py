"""A stand-in of a service in a process of its own, which ends with the one that has started it, however that ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_STOP_S = 30.0


class NotHereError(Exception):
    """Why the stand-in cannot be had on this machine."""


class OwnProcess:
    """``python -m module directory …`` that writes one line of JSON when it is ready, and ends when its standard input does."""

    def __init__(self, module: str, *arguments: str, prefix: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=prefix))  # short: a socket's path has at most 107 bytes
        self._command = [sys.executable, "-m", module, str(self.directory), *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> dict[str, Any]:
        """What it said. Raises NotHereError."""
        self.directory.chmod(0o711)
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"error": self.log[-2000:]}
        if "error" in told:
            self.close()
            raise NotHereError(told["error"])
        return told

    @property
    def pid(self) -> int:
        """0 when there is none."""
        return 0 if self._process is None else self._process.pid

    @property
    def log(self) -> str:
        """What it has written."""
        return (self.directory / "log").read_text()

    def close(self) -> None:
        """Raises RuntimeError when it does not end by itself."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"the stand-in did not end: {self.log[-2000:]}") from None
        finally:
            process.stdout.close()
            remove_groups(f"stand-in-{self.directory.name}")
            shutil.rmtree(self.directory, ignore_errors=True)


def remove_groups(name: str) -> None:
    """Those of a stand-in that could not do it itself: ``name`` is ``stand-in-`` and its directory's."""
    from cifixer_exec.backends.local.cgroups import detect, kill_all, remove

    cgroups = detect()
    groups = [] if cgroups is None else [p for base in set(cgroups.bases.values()) for p in base.glob(f"cifixer-exec/{name}-*")]
    kill_all(groups)
    remove(groups)
