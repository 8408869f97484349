"""What container images are here: this machine's own system read-only, an empty root, or the runner's image."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tests.support.kubernetes.knobs import Knobs

Json = dict[str, Any]
_NAME = re.compile(r"^([a-z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$")
_SYSTEM = ("bin", "lib", "lib32", "lib64", "libx32", "opt", "sbin", "usr")
#: What an image would have of it, and nothing that tells of this machine's users and services.
_ETC = (
    "alternatives",
    "debian_version",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "nsswitch.conf",
    "os-release",
    "profile",
    "ssl",
)
_EMPTY = ("etc", "var", "home", "media", "mnt", "root", "run", "srv", "tmp")
#: Images of this machine's own system, whatever their tag.
_HOST = ("nikolaik/python-nodejs", "busybox", "debian", "python", "cifixer-test", "ci-fixer-sandbox")
RUNNER_IMAGE = "cifixer-runner:test"
NO_SHELL_IMAGE = "no-shell:test"
MISSING_IMAGE = "missing:test"
_RUNNERS = Path(__file__).parents[3] / "cifixer_exec" / "_runner"


class PullError(Exception):
    """``reason`` as in a waiting container."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def runner_binary() -> Path:
    """For this machine."""
    return _RUNNERS / f"runner-linux-{ {'x86_64': 'amd64', 'aarch64': 'arm64'}[os.uname().machine] }"


def image(name: str, knobs: Knobs) -> Json:
    """What :func:`tests.support.kubernetes.inside.build` needs of it.

    Raises:
        PullError: a bad name, or no such image.
    """
    if not _NAME.match(name):
        words = f'Failed to apply default image tag "{name}": couldn\'t parse image name "{name}": invalid reference format'
        raise PullError("InvalidImageName", words)
    kind = knobs.images.get(name) or _kind(name)
    if kind == "host":
        names = (*_SYSTEM, *(f"etc/{name}" for name in _ETC))
        binds = {name: f"/{name}" for name in names if os.path.lexists(f"/{name}")}
        return {"binds": binds, "directories": [*_EMPTY]}
    if kind == "empty":
        return {"binds": {"runner": str(runner_binary())}, "directories": []}
    words = f'failed to pull and unpack image "docker.io/library/{name}": failed to resolve reference "docker.io/library/{name}": '
    words += "pull access denied, repository does not exist or may require authorization"
    raise PullError("ErrImagePull", f'rpc error: code = NotFound desc = failed to pull image "{name}": {words}')


def _kind(name: str) -> str:
    if name in (RUNNER_IMAGE, NO_SHELL_IMAGE):
        return "empty"
    base = name.partition("@")[0]
    base = base[: base.rindex(":")] if ":" in base.rpartition("/")[2] else base
    return "host" if base.removeprefix("docker.io/").removeprefix("library/") in _HOST else "missing"
