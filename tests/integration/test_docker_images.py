"""Images: prepared once, shared, and not piled up."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import docker
import pytest

from cifixer_exec.backends.docker_local import Address, images
from cifixer_exec.backends.docker_local.daemon import Daemon, daemon_at
from cifixer_exec.errors import SandboxStartError
from tests.support.contract_stack import check_daemon
from tests.support.docker_daemon import docker_host
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
