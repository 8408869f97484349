"""Unpacking an archive that a sandbox made: nothing outside the destination is ever written.

The ``data`` filter of :mod:`tarfile` (PEP 706) is not relied on: before Python 3.11.13, 3.12.11 and 3.13.4 links that resolve to more than
PATH_MAX got around it (CVE-2025-4517). Here every directory on the way is opened by its parent's descriptor without following links,
files are always new, and links are made last, so that nothing can be written through one.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cifixer_exec.errors import SandboxFileError

#: These bound what a sandbox can do to the disk here.
MAX_ARCHIVE_BYTES = 8 * 1024**3
MAX_ARCHIVE_MEMBERS = 500_000
_MAX_NAME_BYTES = 4096
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def unpack(file: IO[bytes], destination: Path) -> None:
    """Extract the tar in ``file`` into ``destination``, which is made if it is missing. Modes are kept, owners are not.

    Raises:
        SandboxFileError: the archive is broken or too large, or a member cannot be placed; what came before it stays.
    """
    destination.mkdir(parents=True, exist_ok=True)
    root = os.open(destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _broken_is_ours("the archive"), tarfile.open(fileobj=file, mode="r:") as archive:
            _Unpacking(archive, root).run()
    finally:
        os.close(root)


class _Unpacking:
    def __init__(self, archive: tarfile.TarFile, root: int) -> None:
        self._archive = archive
        self._root = root
        self._links: list[tuple[tuple[str, ...], str]] = []
        self._total = 0

    def run(self) -> None:
        for count, member in enumerate(self._archive):
            self._total += member.size
            if count >= MAX_ARCHIVE_MEMBERS or self._total > MAX_ARCHIVE_BYTES:
                raise SandboxFileError(
                    f"the downloaded directory has over {MAX_ARCHIVE_MEMBERS} entries or {MAX_ARCHIVE_BYTES} bytes: download parts of it"
                )
            with _broken_is_ours(repr(member.name[:200])):
                self._place(member)
        for parts, target in self._links:
            with _broken_is_ours(repr("/".join(parts)[:200])):
                self._link(parts, target)

    def _place(self, member: tarfile.TarInfo) -> None:
        parts = _parts(member.name)
        if member.isdir():
            with self._opened(parts) as directory:
                os.fchmod(directory, (member.mode & 0o755) | 0o700)
        elif not parts:
            raise ValueError("it has no name")
        elif member.issym():
            self._links.append((parts, _checked_target(parts, member.linkname)))
        elif member.isreg() or member.islnk():
            self._write(parts, member)
        else:
            raise ValueError("it is a device or the like")

    def _write(self, parts: tuple[str, ...], member: tarfile.TarInfo) -> None:
        """A regular file; a hard link becomes a copy of the member it names."""
        source = self._archive.extractfile(member)
        if source is None:
            raise ValueError("it links to what is no file of the archive")
        with source, self._opened(parts[:-1]) as directory:
            _remove(parts[-1], directory)
            with open(os.open(parts[-1], _NEW_FILE, 0o600, dir_fd=directory), "wb") as out:
                shutil.copyfileobj(source, out, 1024 * 1024)
                self._total += out.tell() if member.islnk() else 0
                os.fchmod(out.fileno(), (member.mode & 0o755) | 0o600)

    def _link(self, parts: tuple[str, ...], target: str) -> None:
        with self._opened(parts[:-1]) as directory:
            _remove(parts[-1], directory)
            os.symlink(target, parts[-1], dir_fd=directory)

    @contextmanager
    def _opened(self, parts: tuple[str, ...]) -> Iterator[int]:
        """The directory ``parts`` below the root, made where it is missing; a link on the way is refused by O_NOFOLLOW."""
        current = os.dup(self._root)
        try:
            for part in parts:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=current)
                following = os.open(part, _DIRECTORY, dir_fd=current)
                os.close(current)
                current = following
            yield current
        finally:
            os.close(current)


def _parts(name: str) -> tuple[str, ...]:
    if name.startswith("/") or "\0" in name or len(os.fsencode(name)) > _MAX_NAME_BYTES:
        raise ValueError("its name is absolute, too long or has a NUL")
    parts = tuple(p for p in name.split("/") if p not in ("", "."))
    if ".." in parts:
        raise ValueError("its name leads out of the directory")
    return parts


def _checked_target(parts: tuple[str, ...], target: str) -> str:
    """``..`` only at the beginning and no more of them than the link lies deep: then no chain of such links leads out."""
    steps = [p for p in target.split("/") if p not in ("", ".")]
    up = next((n for n, step in enumerate(steps) if step != ".."), len(steps))
    if not target or target.startswith("/") or "\0" in target or ".." in steps[up:] or up > len(parts) - 1:
        raise ValueError(f"it links to {target[:200]!r}, which may lead out of the directory")
    return target


def _remove(name: str, directory: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


@contextmanager
def _broken_is_ours(what: str) -> Iterator[None]:
    """Whatever a hostile archive makes :mod:`tarfile` or the kernel say becomes one error."""
    try:
        yield
    except (tarfile.TarError, OSError, ValueError, KeyError, OverflowError, RecursionError, EOFError) as error:
        raise SandboxFileError(f"the sandbox sent {what}, which cannot be unpacked here: {error}") from None
