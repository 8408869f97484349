"""What envd does with files, in a process within the sandbox: as root, for a user to whom new files are given.

A write is read from standard input until its end. The answer on standard output is a line of JSON, for a read with the content after it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NoReturn

Json = dict[str, Any]
_CHUNK_BYTES = 1 << 16
_TYPES = {stat.S_IFREG: "FILE_TYPE_FILE", stat.S_IFDIR: "FILE_TYPE_DIRECTORY", stat.S_IFLNK: "FILE_TYPE_SYMLINK"}


class RefusalError(Exception):
    """``code`` as Connect has it, or ``no_space``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def serve(request: Json, descriptors: list[int]) -> NoReturn:
    """``verb``, ``path``, ``home``, ``owner`` and what the verb needs besides; this process ends."""
    for target, descriptor in enumerate(descriptors[:2]):
        os.dup2(descriptor, target)
    os.closerange(2, os.sysconf("SC_OPEN_MAX"))
    os.umask(0o022)
    try:
        os.chdir(request["home"])
        _VERBS[request["verb"]](request)
    except RefusalError as refusal:
        _answer({"error": refusal.code, "message": str(refusal)})
    except BrokenPipeError:
        pass
    except OSError as error:
        _answer({"error": _code(error), "message": f"{request['verb']} {request['path']}: {(error.strerror or '').lower()}"})
    os._exit(0)


def _code(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no_space"
    return "not_found" if error.errno in (errno.ENOENT, errno.ENOTDIR) else "internal"


def _answer(answer: Json) -> None:
    _write_all(1, json.dumps(answer).encode() + b"\n")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _absolute(request: Json, key: str = "path") -> str:
    """``~`` and what is relative is in the user's home."""
    path = request[key]
    if path == "~" or path.startswith("~/"):
        path = request["home"] + path[1:]
    return os.path.normpath(os.path.join(request["home"], path))


def _read(request: Json) -> None:
    path = _absolute(request)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise RefusalError("not_found", f"path '{path}' does not exist") from None
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise RefusalError("invalid_argument", f"path '{path}' is a directory")
    os.set_blocking(descriptor, True)
    regular = stat.S_ISREG(status.st_mode) and status.st_size > 0
    _answer({"size": status.st_size if regular else None})
    while data := os.read(descriptor, _CHUNK_BYTES):
        _write_all(1, data)


def _write(request: Json) -> None:
    path = _absolute(request)
    if os.path.isdir(path):
        raise RefusalError("invalid_argument", f"path '{path}' is a directory")
    _make_directories(os.path.dirname(path), request["owner"])
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.fchown(descriptor, request["owner"], request["owner"])
    while data := os.read(0, _CHUNK_BYTES):
        _write_all(descriptor, data)
    _answer({"name": os.path.basename(path), "type": "file", "path": path})


def _make_directories(path: str, owner: int) -> None:
    """Each that is made is the owner's."""
    if os.path.isdir(path):
        return
    _make_directories(os.path.dirname(path), owner)
    with suppress(FileExistsError):
        os.mkdir(path, 0o755)
        os.chown(path, owner, owner)


def _stat(request: Json) -> None:
    _answer({"entry": _entry(_existing(request))})


def _existing(request: Json, key: str = "path") -> str:
    path = _absolute(request, key)
    if not os.path.lexists(path):
        raise RefusalError("not_found", f"file not found: {path}")
    return path


def _entry(path: str) -> Json:
    """As protobuf writes it in JSON: numbers of 64 bits are strings."""
    link = os.lstat(path)
    entry: Json = {"name": os.path.basename(path), "path": path, "size": str(link.st_size), "mode": link.st_mode & 0o7777}
    kind = stat.S_IFMT(link.st_mode)
    if kind == stat.S_IFLNK:
        entry |= {"symlinkTarget": os.readlink(path), "isSymlink": True}
        with suppress(OSError):
            kind = stat.S_IFMT(os.stat(path).st_mode)
    entry["type"] = _TYPES.get(kind, "FILE_TYPE_UNSPECIFIED")
    entry["permissions"] = stat.filemode(link.st_mode)
    entry |= {"owner": _name(link.st_uid), "group": _name(link.st_gid)}
    entry["modifiedTime"] = datetime.fromtimestamp(link.st_mtime, UTC).isoformat().replace("+00:00", "Z")
    return entry


def _name(number: int) -> str:
    """As the sandbox's own list of accounts has it; groups are called as their users."""
    with suppress(OSError), open("/etc/passwd", "rb") as accounts:  # no codec can be loaded in here
        for name, _, found, *_ in (line.split(b":") for line in accounts):
            if int(found) == number:
                return name.decode()
    return str(number)


def _list(request: Json) -> None:
    path = _existing(request)
    if not os.path.isdir(path):
        raise RefusalError("invalid_argument", f"path is not a directory: {path}")
    _answer({"entries": [_entry(found) for found in _below(path, request.get("depth") or 1)]})


def _below(path: str, depth: int) -> list[str]:
    found: list[str] = []
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            found.append(entry.path)
            if depth > 1 and entry.is_dir(follow_symlinks=False):
                found += _below(entry.path, depth - 1)
    return found


def _make(request: Json) -> None:
    path = _absolute(request)
    if os.path.isdir(path):
        raise RefusalError("already_exists", f"directory already exists: {path}")
    if os.path.lexists(path):
        raise RefusalError("invalid_argument", f"path already exists but it is not a directory: {path}")
    _make_directories(path, request["owner"])
    _answer({"entry": _entry(path)})


def _remove(request: Json) -> None:
    """Nothing there is no error: envd removes as Go's RemoveAll does."""
    path = _absolute(request)
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)
    _answer({})


def _move(request: Json) -> None:
    source, destination = _existing(request), _absolute(request, "destination")
    _make_directories(os.path.dirname(destination), request["owner"])
    os.rename(source, destination)
    _answer({"entry": _entry(destination)})


_VERBS = {
    "read": _read,
    "write": _write,
    "stat": _stat,
    "list": _list,
    "make": _make,
    "remove": _remove,
    "move": _move,
}
