"""Files in and out, in pieces of at most 1 MiB, each an idempotent request of its own.

Memory stays flat, and a lost answer costs one piece.
"""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import io
import os
import stat
import tarfile
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import IO

from cifixer_exec.channel.frames import Answer
from cifixer_exec.errors import BackendError, InvalidRequestError, SandboxFileError
from cifixer_exec.extraction import MAX_ARCHIVE_BYTES, unpack
from cifixer_exec.model import MAX_BODY_BYTES

Call = Callable[..., Awaitable[Answer]]


def whole_number(answer: Answer, name: str) -> int:
    """A member of an answer that must be 0 or more: it comes from a sandbox, which may say anything.

    Raises:
        BackendError: it is missing or something else.
    """
    value = answer.document.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise BackendError(f"the sandbox's runner answered with {name}={str(value)[:40]}, which cannot be: it has been tampered with")
    return value


async def write_bytes(call: Call, path: str, data: bytes, *, mode: int | None = None) -> None:
    """Write ``data`` to ``path``, checked by size and sha256, put in place by rename."""
    await write_stream(call, path, io.BytesIO(data), mode=mode)


async def write_stream(call: Call, path: str, source: IO[bytes], *, mode: int | None = None) -> None:
    """As :func:`write_bytes`, from a file object, which is read once from where it stands."""
    transfer_id = uuid.uuid4().hex
    digest = hashlib.sha256()
    offset = 0
    piece = await asyncio.to_thread(source.read, MAX_BODY_BYTES)
    try:
        while True:
            following = await asyncio.to_thread(source.read, MAX_BODY_BYTES) if len(piece) == MAX_BODY_BYTES else b""
            digest.update(piece)
            commit = None if following else {"size": offset + len(piece), "sha256": digest.hexdigest()}
            arguments = {"path": path, "transfer_id": transfer_id, "offset": offset, "mode": mode, "mkdir": True, "commit": commit}
            await call("write", arguments, piece)
            if commit is not None:
                return
            offset += len(piece)
            piece = following
    except SandboxFileError:
        await call("abort_write", {"path": path, "transfer_id": transfer_id})
        raise


async def read_bytes(call: Call, path: str, *, limit_bytes: int) -> bytes:
    """The whole content of ``path``, if it has no more than ``limit_bytes``."""
    out = io.BytesIO()
    await read_stream(call, path, out, limit_bytes=limit_bytes)
    return out.getvalue()


async def read_stream(call: Call, path: str, out: IO[bytes], *, limit_bytes: int) -> int:
    """Write the content of ``path`` to ``out``; returns its permission bits. A file that changes meanwhile is an error."""
    offset, etag = 0, None
    while True:
        answer = await call("read", {"path": path, "offset": offset, "length": MAX_BODY_BYTES, "etag": etag})
        size, mode = whole_number(answer, "size"), whole_number(answer, "mode")
        if size > limit_bytes:
            raise SandboxFileError(f"{path!r} has {size} bytes, more than {limit_bytes}: allow more, or take parts of it", "too_large")
        if offset + len(answer.body) > size:
            raise SandboxFileError(f"{path!r} is longer than the {size} bytes it had: read it again", "changed")
        etag = answer.document.get("etag")
        await asyncio.to_thread(out.write, answer.body)
        offset += len(answer.body)
        if offset >= size:
            return mode & 0o7777
        if not answer.body:
            raise SandboxFileError(f"{path!r} ended at byte {offset} of {size}: read it again", "changed")


async def upload(call: Call, source: Path, path: str, exclude: Sequence[str]) -> None:
    """A local file to ``path``, or the content of a local directory into ``path``."""
    mode = await asyncio.to_thread(_mode_of, source)
    if stat.S_ISREG(mode):
        with open(source, "rb") as file:  # noqa: ASYNC230  # opening a local file does not wait
            await write_stream(call, path, file, mode=stat.S_IMODE(mode) & 0o777)
        return
    archive = f"/tmp/.cifixer-upload-{uuid.uuid4().hex}.tar"  # noqa: S108  # in the sandbox
    with tempfile.TemporaryFile() as file:
        await asyncio.to_thread(_pack, source, file, exclude)
        file.seek(0)
        await write_stream(call, archive, file)
    try:
        await call("unpack", {"archive": archive, "path": path})
    finally:
        await call("remove", {"path": archive, "recursive": False, "missing_ok": True})


async def download(call: Call, path: str, destination: Path, exclude: Sequence[str]) -> None:
    """A file to ``destination``, or the content of a directory into it."""
    found = (await call("stat", {"path": path})).document.get("file")
    if not isinstance(found, dict) or found.get("type") != "directory":
        await _download_file(call, path, destination)
        return
    packed = await call("pack", {"path": path, "excludes": list(exclude)})
    archive = str(packed.document.get("archive"))
    try:
        with tempfile.TemporaryFile() as file:
            await read_stream(call, archive, file, limit_bytes=MAX_ARCHIVE_BYTES)
            file.seek(0)
            await asyncio.to_thread(unpack, file, destination)
    finally:
        await call("remove", {"path": archive, "recursive": False, "missing_ok": True})


def _mode_of(source: Path) -> int:
    if not source.is_file() and not source.is_dir():
        raise InvalidRequestError(f"{str(source)!r} is no file or directory here: give an existing one")
    return source.stat().st_mode


def _target(path: str, destination: Path) -> Path:
    target = destination / os.path.basename(path) if destination.is_dir() else destination
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


async def _download_file(call: Call, path: str, destination: Path) -> None:
    """By a temporary name and rename, so that a broken transfer never looks like the file."""
    target = await asyncio.to_thread(_target, path, destination)
    temporary = target.with_name(f".cifixer-{uuid.uuid4().hex}")  # a name of the longest kind has no room for more
    try:
        with temporary.open("wb") as file:
            mode = await read_stream(call, path, file, limit_bytes=MAX_ARCHIVE_BYTES)
        temporary.chmod(mode & 0o777)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def _pack(source: Path, out: IO[bytes], exclude: Sequence[str]) -> None:
    def keep(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        names = Path(member.name).parts
        if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in exclude):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member if member.isfile() or member.isdir() or member.issym() or member.islnk() else None

    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(source, arcname=".", filter=keep)
