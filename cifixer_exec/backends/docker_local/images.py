"""The image of a sandbox: pulled if it is not there, and prepared once per daemon.

A prepared image is the asked-for one with the runner and the links of layout.py on top: a layer of some megabytes, made by a
commit. So a sandbox's root can be read-only, creating one copies nothing, and nothing is needed in the image itself.
"""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from docker.errors import APIError, NotFound

from cifixer_exec.backends.docker_local import layout
from cifixer_exec.backends.docker_local.daemon import Daemon
from cifixer_exec.backends.docker_local.vendor_errors import VENDOR_ERRORS, explanation, remedy
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.errors import SandboxStartError

log = logging.getLogger(__name__)

DEFAULT_IMAGE = "nikolaik/python-nodejs:python3.11-nodejs20-bullseye"
REPOSITORY = "cifixer-exec/prepared"
#: When one was begun, on containers that are only there to be committed. Empty on what is made of them: labels of an image come down to
#: its containers, so every sandbox has it, too.
PREPARING = "cifixer.preparing"
BASE = "cifixer.base"
#: One that is older was left by a crash.
_PREPARING_S = 600.0
_PREPARING_NAME = "cifixer-preparing-"
_PROGRESS_S = 5.0
_MAX_PASSWD_BYTES = 512 * 1024

#: A prepared image that a newer one of the same reference has replaced so long ago is no worker's any more.
REPLACED_S = 86_400.0

_locks: dict[str, threading.Lock] = {}


def _alone(what: str) -> threading.Lock:
    """One pull or preparation of the same thing at a time in this process; different ones do not wait for each other."""
    return _locks.setdefault(what, threading.Lock())


def prepared_image(daemon: Daemon, reference: str) -> str:
    """The name of the prepared image for ``reference``, which is there now.

    Raises:
        SandboxStartError: it is not there and cannot be pulled, or is for another machine. BackendUnavailableError.
    """
    with daemon.asked(f"looking for the image {reference!r}"):
        base = _find(daemon, reference)
        if base is None:
            with _alone(reference):
                base = _find(daemon, reference) or _pull(daemon, reference)
        name = _name_for(base)
        if name not in daemon.images and _find(daemon, name) is None:
            with _alone(name):
                if _find(daemon, name) is None:
                    _prepare(daemon, reference, base, name)
        daemon.images[name] = tuple((base.get("Config") or {}).get("Volumes") or ())
        return name


def forget(daemon: Daemon, name: str) -> None:
    """A prepared image turned out to be gone: look again the next time."""
    daemon.images.pop(name, None)


def volumes_of(daemon: Daemon, name: str) -> tuple[str, ...]:
    """Where containers of a prepared image would get volumes of their own, for which no limit holds."""
    return daemon.images.get(name, ())


def is_there(daemon: Daemon, reference: str) -> bool:
    """Whether nothing needs to be pulled."""
    with daemon.asked(f"looking for the image {reference!r}"):
        return _find(daemon, reference) is not None


def _find(daemon: Daemon, reference: str) -> dict[str, Any] | None:
    try:
        return dict(daemon.api.inspect_image(reference))
    except NotFound:
        return None


def _pull(daemon: Daemon, reference: str) -> dict[str, Any]:
    log.info("pulling the image %s", reference)
    told_at = time.monotonic()
    try:
        for event in daemon.api.pull(reference, stream=True, decode=True):
            if "error" in event:
                raise _not_pulled(reference, str(event["error"]))
            if time.monotonic() - told_at > _PROGRESS_S:
                told_at = time.monotonic()
                log.info("pulling the image %s: %s %s", reference, event.get("status", ""), event.get("progress", ""))
    except APIError as error:
        raise _not_pulled(reference, explanation(error)) from None
    found = _find(daemon, reference)
    if found is None:
        raise _not_pulled(reference, "the daemon pulled it and does not have it")
    return found


def _not_pulled(reference: str, said: str) -> SandboxStartError:
    mend = remedy(said) or (
        "check its name, log in (docker login) where it is private, or bring it to the daemon (docker pull, docker load) and try again"
    )
    return SandboxStartError(f"the image {reference!r} is not on the daemon and could not be pulled: {said.strip()}: {mend}", mend)


def _name_for(base: dict[str, Any]) -> str:
    seal = hashlib.sha256(f"{base['Id']}:{_archive_digest(_machine(base))}".encode())
    return f"{REPOSITORY}:{seal.hexdigest()[:24]}"


def _machine(base: dict[str, Any]) -> str:
    return str(base.get("Architecture") or "amd64")


@cache
def _archive_digest(machine: str) -> str:
    return hashlib.sha256(_archive(machine)).hexdigest()


def _prepare(daemon: Daemon, reference: str, base: dict[str, Any], name: str) -> None:
    api = daemon.api
    _remove_old(api)
    config = base.get("Config") or {}
    labels = {PREPARING: f"{time.time():.0f}", BASE: reference}
    # The archive API cannot put a link where a volume is mounted; where a tmpfs is to be, none is.
    host = api.create_host_config(network_mode="none", tmpfs=dict.fromkeys(config.get("Volumes") or (), ""))
    made = api.create_container(
        base["Id"],
        entrypoint=[layout.RUNNER],
        command=["version"],
        environment=layout.environment(list(config.get("Env") or [])),
        host_config=host,
        labels=labels,
        name=f"{_PREPARING_NAME}{uuid.uuid4().hex[:12]}",
        use_config_proxy=False,  # a password for a proxy would be in the image
        user="0:0",
        working_dir="/",
    )
    try:
        users = _passwd_of(api, made["Id"])
        api.put_archive(made["Id"], "/", _archive(_machine(base)))
        api.put_archive(made["Id"], "/", _packed([(_member(layout.IMAGE_PASSWD, mode=0o644, size=len(users)), users)]))
        repository, _, tag = name.partition(":")
        api.commit(made["Id"], repository=repository, tag=tag, conf={"Labels": {PREPARING: ""}}, pause=False)
        _remove_replaced(api, reference, name)
    except VENDOR_ERRORS as error:
        raise SandboxStartError(
            f"the image {reference!r} could not be prepared: {explanation(error)}", remedy(explanation(error))
        ) from None
    finally:
        with suppress(*VENDOR_ERRORS):
            api.remove_container(made["Id"], force=True, v=True)


def _remove_replaced(api: Any, reference: str, name: str) -> None:
    """What was prepared for the same reference before, by another version of us or of the image; the daemon keeps what is in use."""
    for found in api.images(name=REPOSITORY, filters={"label": f"{BASE}={reference}"}):
        if name not in (found.get("RepoTags") or ()) and time.time() - float(found["Created"]) > REPLACED_S:
            with suppress(APIError):
                api.remove_image(found["Id"])


def _remove_old(api: Any) -> None:
    for found in api.containers(all=True, filters={"label": PREPARING}):
        is_one = found["Labels"].get(PREPARING) and any(name.startswith(f"/{_PREPARING_NAME}") for name in found["Names"] or ())
        if is_one and time.time() - float(found["Created"]) > _PREPARING_S:
            with suppress(NotFound, APIError):
                api.remove_container(found["Id"], force=True, v=True)


def _passwd_of(api: Any, container: str) -> bytes:
    """The image's /etc/passwd; empty where it has none, or none that can be one."""
    try:
        pieces, _ = api.get_archive(container, "/etc/passwd")
        packed = b""
        for piece in pieces:
            packed += piece
            if len(packed) > _MAX_PASSWD_BYTES:
                return b""
    except NotFound:
        return b""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        member = archive.next()
        content = archive.extractfile(member) if member is not None and member.isfile() else None
        return content.read() if content is not None else b""


def _archive(machine: str) -> bytes:
    return _packed(_members(runner_path(machine).read_bytes()))


def _packed(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member, content in members:
            archive.addfile(member, io.BytesIO(content) if content else None)
    return out.getvalue()


def _members(runner: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Root's, all of it. Parents that are missing are made by the daemon."""
    # runc gives a tmpfs the mode of the directory below it, whatever its mount options say
    for path, mode in (("/run/cifixer", 0o755), (layout.SPOOL, 0o755), (layout.ETC, 0o755), (layout.CHANNEL, 0o700), (layout.DISK, 0o755)):
        yield _member(path, type=tarfile.DIRTYPE, mode=mode), b""
    yield _member(layout.RUNNER, mode=0o755, size=len(runner)), runner
    for path, target in layout.LINKS.items():
        yield _member(path, type=tarfile.SYMTYPE, mode=0o777, linkname=target), b""


def _member(path: str, **attributes: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path.lstrip("/"))
    for name, value in attributes.items():
        setattr(member, name, value)
    return member
