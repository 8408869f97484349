"""Docker without us: a container of the same image with the same limits and hardening, used by docker-py and by the docker command."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker

from cifixer_exec.backends.docker_local import images, layout
from cifixer_exec.backends.docker_local.daemon import Address, daemon_at
from cifixer_exec.model import SandboxSpec

LABEL = "cifixer.bench"
#: Where files go in a container whose root can be written.
DIRECTORY = "/root"


class Yardstick:
    """Direct use of one daemon. ``spec``: what the sandboxes beside it are made of."""

    def __init__(self, host: str, image: str, spec: SandboxSpec) -> None:
        self.api: Any = docker.APIClient(base_url=host, version="auto", timeout=120)
        self._host = host
        self._spec = spec
        self._daemon = daemon_at(Address(host=host))
        self._image = images.prepared_image(self._daemon, image)

    def create(self, *, writable_root: bool = False) -> str:
        """A started container that does nothing; its id."""
        host = layout.host_config(self._spec, facts=self._daemon.facts, network_mode="none", read_only=not writable_root)
        made = self.api.create_container(
            self._image,
            command=["infinity"],
            entrypoint=["sleep"],
            host_config=self.api.create_host_config(**host),
            hostname="sandbox",
            labels={LABEL: "yes"},
            name=f"cifixer-bench-{uuid.uuid4().hex[:12]}",
            user=layout.BRIDGE_USER,
            working_dir="/",
        )
        self.api.start(made["Id"])
        return str(made["Id"])

    def execute(self, container: str, command: list[str]) -> bytes:
        """What docker-py's ``exec_run`` does. Raises RuntimeError when the command fails."""
        made = self.api.exec_create(container, command)
        output: bytes = self.api.exec_start(made["Id"])
        if self.api.exec_inspect(made["Id"])["ExitCode"] != 0:
            raise RuntimeError(f"{command} failed: {output!r}")
        return output

    def remove(self, container: str) -> None:
        """With all that is in it."""
        self.api.remove_container(container, force=True, v=True)

    @contextmanager
    def container(self, *, writable_root: bool = False) -> Iterator[str]:
        """One for the block."""
        made = self.create(writable_root=writable_root)
        try:
            yield made
        finally:
            self.remove(made)

    def first_command(self, command: list[str]) -> Callable[[], None]:
        """Create, start, run; gives the function that removes it."""
        made = self.create()
        self.execute(made, command)
        return lambda: self.remove(made)

    def put(self, container: str, name: str, data: bytes) -> None:
        """The archive API, from memory."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        self.api.put_archive(container, DIRECTORY, out.getvalue())

    def get(self, container: str, name: str) -> bytes:
        """The archive API, into memory."""
        pieces, _ = self.api.get_archive(container, f"{DIRECTORY}/{name}", chunk_size=2 * 1024 * 1024)
        with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as archive:
            member = archive.next()
            content = archive.extractfile(member) if member is not None else None
            return content.read() if content is not None else b""

    def copy_in(self, source: Path, container: str, name: str) -> None:
        """``docker cp`` from a file of the host."""
        self._docker("cp", "-q", str(source), f"{container}:{DIRECTORY}/{name}")

    def copy_out(self, container: str, name: str, target: Path) -> None:
        """``docker cp`` to a file of the host."""
        self._docker("cp", "-q", f"{container}:{DIRECTORY}/{name}", str(target))

    def cat_in(self, source: Path, container: str, path: str) -> None:
        """The only raw way into memory of a container whose root is read-only: standard input of an exec."""
        with source.open("rb") as file:
            self._docker("exec", "-i", container, "sh", "-c", f"cat > {path}", stdin=file)

    def cat_out(self, container: str, path: str, target: Path) -> None:
        """As :meth:`cat_in`, back."""
        with target.open("wb") as file:
            self._docker("exec", container, "cat", path, stdout=file)

    def close(self) -> None:
        """Nothing is left of it."""
        for found in self.api.containers(all=True, filters={"label": LABEL}):
            self.remove(found["Id"])
        self.api.close()

    def _docker(self, *arguments: str, **streams: Any) -> None:
        streams = {"stdout": subprocess.DEVNULL, **streams}
        done = subprocess.run(["docker", "-H", self._host, *arguments], stderr=subprocess.PIPE, check=False, **streams)
        if done.returncode != 0:
            raise RuntimeError(f"docker {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")


def has_docker_command() -> bool:
    """Whether there is a ``docker`` to compare with."""
    return shutil.which("docker") is not None
