"""The process that starts sandboxes and what runs in them: that of the Kubernetes stand-in, and file operations by a mere fork."""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn

from tests.support.e2b import inside_files
from tests.support.kubernetes import inside, kernel
from tests.support.kubernetes.launcher import Launcher


class SandboxLauncher(Launcher):
    """A fourth descriptor is told the process id as the sandbox has it: nobody outside can ask once the process has ended."""

    def _enter(self, request: dict[str, Any], descriptors: list[int]) -> None:
        if request["verb"] == "run":
            _begin(request)
        if "file_operation" in request:
            inside_files.serve(request["file_operation"], descriptors)
        if len(descriptors) > 3:
            os.write(descriptors[3], str(os.getpid()).encode())
        inside.become(request, descriptors[:3])


def _begin(request: dict[str, Any]) -> NoReturn:
    """PID 1. It reaps what the others leave behind, as a system's own does: the kernel does that for who ignores SIGCHLD."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    nothing = os.open("/dev/null", os.O_RDWR)
    for target in range(3):
        os.dup2(nothing, target)
    kernel.die_with_parent(signal.SIGKILL)
    os.execve(request["command"][0], request["command"], request["environment"])
