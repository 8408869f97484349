"""A direct `docker exec`, where a daemon is there: docker-py against a container made from a static binary, no registry needed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cifixer_exec.backends.runner import runner_path


@contextmanager
def docker_exec() -> Iterator[Callable[[], None] | str]:
    """A function that runs one no-op program by `docker exec`, or a sentence why that cannot be measured here.

    The program is the runner's own ``version``, a static binary, so that no image with a ``true`` has to be pulled.
    """
    try:
        import docker

        client = docker.from_env(timeout=30)
        client.ping()
    except Exception as error:
        yield f"no Docker daemon: {type(error).__name__}"
        return
    image = _image(client)
    container = client.containers.run(
        image, ["/runner", "serve", "--socket", "/s", "--spool", "/spool", "--workspace", "/tmp"], detach=True, network_mode="none"
    )

    def run() -> None:
        code, _ = container.exec_run(["/runner", "version"])
        assert code == 0, code

    try:
        run()
        yield run
    finally:
        container.remove(force=True, v=True)
        with suppress(Exception):
            client.images.remove(image, force=True)
        client.close()


def _image(client: object) -> str:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("spool", "tmp"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(directory)
        tar.add(runner_path(), "runner")
    name = "cifixer-bench:latest"
    client.api.import_image_from_data(archive.getvalue(), repository="cifixer-bench", tag="latest")  # type: ignore[attr-defined]
    return name
