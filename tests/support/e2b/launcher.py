"""The process that starts sandboxes and what runs in them: that of the Kubernetes stand-in, and file operations by a mere fork."""

from __future__ import annotations

import os
from typing import Any

from tests.support.e2b import inside_files
from tests.support.kubernetes import inside
from tests.support.kubernetes.launcher import Launcher


class SandboxLauncher(Launcher):
    """A fourth descriptor is told the process id as the sandbox has it: nobody outside can ask once the process has ended."""

    def _enter(self, request: dict[str, Any], descriptors: list[int]) -> None:
        if "file_operation" in request:
            inside_files.serve(request["file_operation"], descriptors)
        if len(descriptors) > 3:
            os.write(descriptors[3], str(os.getpid()).encode())
        inside.become(request, descriptors[:3])
