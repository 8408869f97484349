"""Files in and out, in pieces of at most 2 MiB, each an idempotent request of its own, a few of them under way at once.

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
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import IO, Any

from cifixer_exec.channel.frames import Answer
from cifixer_exec.errors import InvalidRequestError, SandboxFileError
from cifixer_exec.extraction import MAX_ARCHIVE_BYTES, unpack
from cifixer_exec.model import MAX_PIECE_BYTES
from cifixer_exec.pieces import all_of, in_order, whole_number

Call = Callable[..., Coroutine[Any, Any, Answer]]
#: Pieces of one file under way: while some are on their way through Redis, those before are on their way to the runner.
OPS_AT_ONCE = 4


async def write_bytes(call: Call, path: str, data: bytes, *, mode: int | None = None) -> None:
    """Write ``data`` to ``path``, checked by size and sha256, put in place by rename."""
    await write_stream(call, path, io.BytesIO(data), mode=mode)


async def write_stream(call: Call, path: str, source: IO[bytes], *, mode: int | None = None) -> None:
    """As :func:`write_bytes`, from a file object, which is read once from where it stands."""
    upload = _Upload(call, path, source, mode)
    try:
        await all_of(upload.before_last(), OPS_AT_ONCE)
        await upload.last()
    except SandboxFileError:
        await call("abort_write", {"path": path, "transfer_id": upload.transfer_id})
        raise


class _Upload:
    """The pieces of one file. All but the last may be written in any order; the last one puts the file in its place."""

    def __init__(self, call: Call, path: str, source: IO[bytes], mode: int | None) -> None:
        self.transfer_id = uuid.uuid4().hex
        self._call = call
        self._constant = {"path": path, "transfer_id": self.transfer_id, "mode": mode, "mkdir": True}
        self._source = source
        self._digest = hashlib.sha256()
        self._offset = 0
        self._rest = b""

    async def before_last(self) -> AsyncGenerator[Coroutine[Any, Any, Answer], None]:
        """Each full piece, while the next one is read. The rest, which may be empty, is kept for :meth:`last`."""
        reading = asyncio.create_task(asyncio.to_thread(self._read))
        try:
            while len(piece := await reading) == MAX_PIECE_BYTES:
                reading = asyncio.create_task(asyncio.to_thread(self._read))
                yield self._write(piece, None)
                self._offset += len(piece)
            self._rest = piece
        finally:
            await asyncio.wait([reading])  # a thread cannot be stopped, and the file may be closed behind this

    async def last(self) -> None:
        await self._write(self._rest, {"size": self._offset + len(self._rest), "sha256": self._digest.hexdigest()})

    def _write(self, piece: bytes, commit: Mapping[str, Any] | None) -> Coroutine[Any, Any, Answer]:
        return self._call("write", {**self._constant, "offset": self._offset, "commit": commit}, piece)

    def _read(self) -> bytes:
        piece = self._source.read(MAX_PIECE_BYTES)
        self._digest.update(piece)
        return piece


async def read_bytes(call: Call, path: str, *, limit_bytes: int) -> bytes:
    """The whole content of ``path``, if it has no more than ``limit_bytes``."""
    out = io.BytesIO()
    await read_stream(call, path, out, limit_bytes=limit_bytes)
    return out.getvalue()


async def read_stream(call: Call, path: str, out: IO[bytes], *, limit_bytes: int) -> int:
    """Write the content of ``path`` to ``out``; returns its permission bits. A file that changes meanwhile is an error."""
    first = await _read(call, path, 0, None)
    size, mode = whole_number(first, "size"), whole_number(first, "mode")
    if size > limit_bytes:
        raise SandboxFileError(f"{path!r} has {size} bytes, more than {limit_bytes}: allow more, or take parts of it", "too_large")

    async def following() -> AsyncGenerator[Coroutine[Any, Any, Answer], None]:
        for offset in range(MAX_PIECE_BYTES, size, MAX_PIECE_BYTES):
            yield _read(call, path, offset, first.document.get("etag"))

    offset = await _put(out, path, first.body, 0, size)
    async with aclosing(in_order(following(), OPS_AT_ONCE)) as answers:
        async for answer in answers:
            offset = await _put(out, path, answer.body, offset, size)
    return mode & 0o7777


def _read(call: Call, path: str, offset: int, etag: object) -> Coroutine[Any, Any, Answer]:
    return call("read", {"path": path, "offset": offset, "length": MAX_PIECE_BYTES, "etag": etag})


async def _put(out: IO[bytes], path: str, body: bytes, offset: int, size: int) -> int:
    """The end of the piece at ``offset`` of a file of ``size`` bytes, now in ``out``."""
    end = offset + len(body)
    if end > size:
        raise SandboxFileError(f"{path!r} is longer than the {size} bytes it had: read it again", "changed")
    if end < min(offset + MAX_PIECE_BYTES, size):
        raise SandboxFileError(f"{path!r} ended at byte {end} of {size}: read it again", "changed")
    await asyncio.to_thread(out.write, body)
    return end


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
