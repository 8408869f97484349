"""Images: prepared once, shared, and not piled up."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

import docker
import pytest

from cifixer_exec import AppConfig, create_sandbox
from cifixer_exec.backends.docker_local import Address, images
from cifixer_exec.backends.docker_local.daemon import Daemon, daemon_at
from cifixer_exec.errors import BackendUnavailableError, SandboxStartError
from cifixer_exec.model import MIB
from tests.support.contract_stack import check_daemon
from tests.support.docker_daemon import docker_host, image_for_tests
from tests.support.image_registry import Registry, image_registry


@pytest.fixture
def daemon() -> Daemon:
    check_daemon("docker_local")
    return daemon_at(Address(host=docker_host()))


@pytest.fixture
def reference(daemon: Daemon, namespace: str) -> Iterator[str]:
    """A tiny image that nobody else has."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        content = namespace.encode()
        member = tarfile.TarInfo("etc/whose")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    daemon.api.import_image_from_data(packed.getvalue(), repository=namespace, tag="tiny")
    yield f"{namespace}:tiny"
    for name in [*prepared(daemon, f"{namespace}:tiny"), f"{namespace}:tiny"]:
        with suppress(docker.errors.APIError):
            daemon.api.remove_image(name, force=True)


def prepared(daemon: Daemon, reference: str) -> list[str]:
    found: list[dict[str, Any]] = daemon.api.images(filters={"label": f"{images.BASE}={reference}"})
    return sorted(tag for image in found for tag in image.get("RepoTags") or [])


def test_an_image_is_prepared_once_however_many_want_it(daemon: Daemon, reference: str) -> None:
    names: list[str] = []
    wanting = [threading.Thread(target=lambda: names.append(images.prepared_image(daemon, reference))) for _ in range(8)]
    for thread in wanting:
        thread.start()
    for thread in wanting:
        thread.join()
    assert len(names) == 8
    assert [*set(names)] == prepared(daemon, reference)


def test_preparing_leaves_no_container_behind(daemon: Daemon, reference: str) -> None:
    before = {c["Id"] for c in daemon.api.containers(all=True, filters={"label": f"{images.BASE}={reference}"})}
    images.prepared_image(daemon, reference)
    assert {c["Id"] for c in daemon.api.containers(all=True, filters={"label": f"{images.BASE}={reference}"})} == before == set()


def test_what_another_version_prepared_goes_when_it_is_old(daemon: Daemon, reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = images.prepared_image(daemon, reference)
    monkeypatch.setattr(images, "_archive_digest", lambda machine: f"another runner for {machine}")
    young = images.prepared_image(daemon, reference)
    assert prepared(daemon, reference) == sorted([old, young])  # a worker of the other version may still want it
    monkeypatch.setattr(images, "REPLACED_S", -60.0)
    monkeypatch.setattr(images, "_archive_digest", lambda machine: f"a third runner for {machine}")
    assert prepared(daemon, reference) == sorted([old, young])
    assert [images.prepared_image(daemon, reference)] == prepared(daemon, reference)


def test_a_prepared_image_that_is_in_use_stays(daemon: Daemon, reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = images.prepared_image(daemon, reference)
    container = daemon.api.create_container(used)["Id"]
    try:
        monkeypatch.setattr(images, "REPLACED_S", -60.0)
        monkeypatch.setattr(images, "_archive_digest", lambda machine: f"another runner for {machine}")
        images.prepared_image(daemon, reference)
        assert used in prepared(daemon, reference)
    finally:
        daemon.api.remove_container(container)


@pytest.fixture
def registry(daemon: Daemon, namespace: str) -> Iterator[Registry]:
    with image_registry() as made:
        made.fill(namespace.encode() + os.urandom(200_000))
        yield made
        for image in daemon.api.images():
            for tag in image.get("RepoTags") or []:
                if tag.startswith(made.address) or (image["Labels"] and image["Labels"].get(images.BASE, "").startswith(made.address)):
                    daemon.api.remove_image(tag, force=True)


def test_an_image_that_is_not_there_is_pulled_with_progress(
    daemon: Daemon, registry: Registry, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_PROGRESS_S", 0.0)
    registry.pause_s = 0.5
    wanted = f"{registry.address}/team/tools:1"
    with caplog.at_level("INFO"):
        name = images.prepared_image(daemon, wanted)
    assert prepared(daemon, wanted) == [name]
    said = [record.getMessage() for record in caplog.records if wanted in record.getMessage()]
    assert said[0] == f"pulling the image {wanted}"
    assert any("Downloading" in line or "Download complete" in line for line in said)


def test_an_image_is_pulled_once_however_many_want_it(daemon: Daemon, registry: Registry) -> None:
    registry.pause_s = 0.5
    wanting = [threading.Thread(target=lambda: images.prepared_image(daemon, f"{registry.address}/a:1")) for _ in range(4)]
    for thread in wanting:
        thread.start()
    for thread in wanting:
        thread.join()
    assert len([path for path in registry.asked if "/blobs/" in path]) == 2  # the layer and the configuration, once each


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_a_registry_that_refuses_is_told_within_seconds_with_a_remedy(daemon: Daemon, registry: Registry, status: int) -> None:
    registry.status = status
    begun = time.monotonic()
    with pytest.raises(SandboxStartError, match=rf"{registry.address}/private:1.*could not be pulled.*: .*(docker login|docker pull)"):
        images.prepared_image(daemon, f"{registry.address}/private:1")
    assert time.monotonic() - begun < 30


def test_a_slow_pull_does_not_hold_up_who_wants_another_image(daemon: Daemon, registry: Registry, reference: str) -> None:
    registry.pause_s = 5.0
    slow = threading.Thread(target=lambda: images.prepared_image(daemon, f"{registry.address}/slow:1"))
    slow.start()
    while not any("/blobs/" in path for path in registry.asked):
        time.sleep(0.02)
    begun = time.monotonic()
    images.prepared_image(daemon, reference)
    assert time.monotonic() - begun < 4
    slow.join()


class Ours:
    """docker-py's client, on a daemon where nobody else has containers."""

    def __init__(self, api: Any, namespace: str) -> None:
        self._api, self._namespace = api, namespace

    def containers(self, *, all: bool, filters: dict[str, str]) -> Any:  # noqa: A002  # docker-py's name
        return self._api.containers(all=all, filters={"label": [filters["label"], f"cifixer.namespace={self._namespace}"]})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)


def sandbox_config(namespace: str, image: str, **members: Any) -> AppConfig:
    return AppConfig(
        execution_backend="docker_local", dispatch="direct", docker_host=docker_host(), namespace=namespace, image=image, **members
    )


def test_preparing_an_image_ends_no_old_sandbox(daemon: Daemon, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the labels of its prepared image."""
    monkeypatch.setattr(images, "_PREPARING_S", -60.0)
    with create_sandbox(sandbox_config(namespace, image_for_tests(docker_host()))) as sandbox:
        images._remove_old(Ours(daemon.api, f"{namespace}/direct"))
        assert sandbox.run_command("echo alive").text == "alive\n"
        assert len(daemon.api.containers(filters={"label": f"cifixer.namespace={namespace}/direct"})) == 1


@pytest.fixture
def odd_image(daemon: Daemon, namespace: str) -> Iterator[Callable[[str], str]]:
    """The image for tests with another line of a Dockerfile, and a directory that anybody can write to."""

    def make(line: str) -> str:
        made = daemon.api.create_container(image_for_tests(docker_host()), command=["true"])
        try:
            with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w") as archive:
                member = tarfile.TarInfo("data")
                member.type, member.mode = tarfile.DIRTYPE, 0o1777
                archive.addfile(member)
            daemon.api.put_archive(made["Id"], "/", packed.getvalue())
            daemon.api.commit(made["Id"], repository=namespace, tag="odd", changes=line)
        finally:
            daemon.api.remove_container(made["Id"], v=True)
        return f"{namespace}:odd"

    yield make
    for name in [*prepared(daemon, f"{namespace}:odd"), f"{namespace}:odd"]:
        with suppress(docker.errors.APIError):
            daemon.api.remove_image(name, force=True)


def test_a_health_check_of_the_image_does_not_run(namespace: str, odd_image: Callable[[str], str]) -> None:
    """It would run as root and read what commands leave in its way."""
    image = odd_image("HEALTHCHECK --interval=1s CMD id > /tmp/who")
    with create_sandbox(sandbox_config(namespace, image)) as sandbox:
        assert not sandbox.run_command("sleep 3; cat /tmp/who").ok


@pytest.mark.parametrize("path", ["/data", "/tmp", "/workspace", "/workspace/deep/er"])  # in a sandbox
def test_a_volume_of_the_image_has_the_limit_of_the_disk(namespace: str, odd_image: Callable[[str], str], path: str) -> None:
    with create_sandbox(sandbox_config(namespace, odd_image(f"VOLUME {path}"), disk_bytes=20 * MIB)) as sandbox:
        written = sandbox.run_command(f"dd if=/dev/zero of={path}/big bs=1M count=40; wc -c < {path}/big || echo 0")
        assert int(written.text) <= 20 * MIB
        assert sandbox.run_command("touch /workspace/a /tmp/a ~/a").ok


def test_a_pull_that_is_cut_is_a_daemon_that_does_not_answer(tmp_path: Path) -> None:
    """docker-py hands on what its library says of an answer that is read piece by piece."""

    class Cut(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        client_address = ("", 0)

        def do_GET(self) -> None:
            content = b'{"ApiVersion": "1.41"}' if self.path.endswith("/version") else b'{"message": "no such image"}'
            self.send_response(200 if self.path.endswith("/version") else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b'400\r\n{"status": "Pul')
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingMixIn, UnixStreamServer):
        daemon_threads = True

    with Server(str(tmp_path / "d"), Cut) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        far = Daemon(Address(host=f"unix://{tmp_path / 'd'}"))
        with pytest.raises(BackendUnavailableError, match="does not answer"):
            images.prepared_image(far, "some:image")
        far.api.close()
        server.shutdown()
