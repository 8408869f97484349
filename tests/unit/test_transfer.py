"""Files in pieces, and what a hostile sandbox sends instead."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifixer_exec import extraction, transfer
from cifixer_exec.channel.frames import Answer
from cifixer_exec.errors import BackendError, InvalidRequestError, SandboxFileError
from cifixer_exec.model import MAX_PIECE_BYTES
from tests.support.run import run


class Files:
    """A sandbox's files in memory, with the runner's verbs as far as transfers use them."""

    def __init__(self, **files: bytes) -> None:
        self.files = dict(files)
        self.directory_archive: bytes | None = None
        self.parts: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.fail_at: int | None = None

    async def __call__(self, verb: str, arguments: Mapping[str, Any], body: bytes = b"") -> Answer:
        self.calls.append(verb)
        assert len(body) <= MAX_PIECE_BYTES
        if verb == "write":
            return self._write(arguments, body)
        if verb == "read":
            data = self.files[arguments["path"]]
            piece = data[arguments["offset"] : arguments["offset"] + arguments["length"]]
            return Answer({"size": len(data), "etag": "e", "mode": 0o640}, piece)
        if verb == "stat":
            return Answer({"file": {"type": "directory" if self.directory_archive is not None else "file"}})
        if verb == "pack":
            assert self.directory_archive is not None
            self.files["/spool/a.tar"] = self.directory_archive
            return Answer({"archive": "/spool/a.tar", "size": len(self.directory_archive)})
        if verb == "remove":
            self.files.pop(arguments["path"], None)
        return Answer({})

    def _write(self, arguments: Mapping[str, Any], body: bytes) -> Answer:
        if self.fail_at == arguments["offset"]:
            raise SandboxFileError("disk full", "no_space")
        part = bytearray(self.parts.get(arguments["transfer_id"], b""))
        part.extend(bytes(max(0, arguments["offset"] - len(part))))  # pieces may come in any order
        part[arguments["offset"] : arguments["offset"] + len(body)] = body
        self.parts[arguments["transfer_id"]] = bytes(part)
        if commit := arguments["commit"]:
            assert commit == {"size": len(part), "sha256": hashlib.sha256(part).hexdigest()}
            self.files[arguments["path"]] = bytes(part)
        return Answer({"received_bytes": len(part)})


def archive(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info, data = member if isinstance(member, tuple) else (member, b"")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, mode
    return info


def download(data: bytes, destination: Path) -> Files:
    files = Files()
    files.directory_archive = data
    try:
        run(transfer.download(files, "dir", destination, ()))
    finally:
        assert files.files == {}, "the archive in the sandbox was removed"
    return files


@pytest.mark.parametrize("size", [0, 1, MAX_PIECE_BYTES - 1, MAX_PIECE_BYTES, MAX_PIECE_BYTES + 1, 3 * MAX_PIECE_BYTES])
def test_a_file_survives_there_and_back(size: int) -> None:
    files, data = Files(), os.urandom(size)
    run(transfer.write_bytes(files, "f", data))
    assert files.files["f"] == data
    assert run(transfer.read_bytes(files, "f", limit_bytes=1 << 62)) == data


def test_a_failed_write_is_taken_back() -> None:
    files = Files()
    files.fail_at = MAX_PIECE_BYTES
    with pytest.raises(SandboxFileError, match="disk full"):
        run(transfer.write_bytes(files, "f", bytes(2 * MAX_PIECE_BYTES)))
    assert files.calls[-1] == "abort_write"


HOSTILE: dict[str, tuple[Any, ...]] = {
    "dot dot": ((entry("../evil"), b"x"),),
    "dot dot within": ((entry("a/../../evil"), b"x"),),
    "absolute link": (entry("l", tarfile.SYMTYPE, "/etc/passwd"),),
    "link out": (entry("l", tarfile.SYMTYPE, "../../evil"),),
    "through a link": (entry("l", tarfile.SYMTYPE, "../.."), (entry("l/evil"), b"x")),
    "through a chain of links": (
        entry("a", tarfile.DIRTYPE, mode=0o755),
        entry("a/b", tarfile.SYMTYPE, "."),
        entry("c", tarfile.SYMTYPE, "a/b/../../.."),
        (entry("c/evil"), b"x"),
    ),
    "hard link out": (entry("l", tarfile.LNKTYPE, "../../evil"),),
    "absolute hard link": (entry("l", tarfile.LNKTYPE, "/etc/passwd"),),
    "absolute name": ((entry("/tmp/cifixer-evil"), b"x"),),
    "hard link to nothing": (entry("l", tarfile.LNKTYPE, "missing"),),
    "device": (entry("d", tarfile.CHRTYPE),),
    "block device": (entry("d", tarfile.BLKTYPE),),
    "fifo": (entry("d", tarfile.FIFOTYPE),),
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_cannot_leave_its_destination(tmp_path: Path, members: tuple[Any, ...]) -> None:
    with pytest.raises(SandboxFileError, match="cannot be unpacked"):
        download(archive(*members), tmp_path / "deep" / "here")
    assert [p for p in tmp_path.rglob("*") if "evil" in p.name] == []


def test_links_too_long_for_realpath_lead_nowhere(tmp_path: Path) -> None:
    """CVE-2025-4517: the filter of tarfile gave up on what resolves to more than PATH_MAX, and wrote through it."""
    members: list[Any] = []
    path, long = "", "d" * 247
    for step in "abcdefghijklmnop":
        members += [entry(path + long, tarfile.DIRTYPE, mode=0o755), entry(path + step, tarfile.SYMTYPE, long)]
        path += long + "/"
    deep = "/".join("abcdefghijklmnop") + "/" + "l" * 254
    members += [entry(deep, tarfile.SYMTYPE, "../" * 16), entry("escape", tarfile.SYMTYPE, deep + "/../../"), (entry("escape/evil"), b"x")]
    with pytest.raises(SandboxFileError, match="cannot be unpacked"):
        download(archive(*members), tmp_path / "a" / "b" / "here")
    assert [p for p in (tmp_path / "a").glob("**/evil") if len(str(p)) < 300] == []
    assert not (tmp_path / "evil").exists()


def test_nothing_is_written_through_a_link_that_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(SandboxFileError, match="cannot be unpacked"):
        download(archive((entry("sub/evil"), b"x")), tmp_path / "here")
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_file_takes_the_place_of_a_link_and_not_of_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"old")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "f").symlink_to(tmp_path / "precious")
    download(archive((entry("f"), b"new")), tmp_path / "here")
    assert (tmp_path / "precious").read_bytes() == b"old"
    assert (tmp_path / "here" / "f").read_bytes() == b"new"


def test_links_within_the_directory_arrive(tmp_path: Path) -> None:
    links = (
        entry("bin/tool", tarfile.SYMTYPE, "../pkg/tool"),
        entry("same", tarfile.SYMTYPE, "pkg"),
        entry("copy", tarfile.LNKTYPE, "pkg/tool"),
    )
    download(archive((entry("pkg/tool", mode=0o755), b"x"), *links), tmp_path)
    assert (tmp_path / "bin" / "tool").resolve() == (tmp_path / "pkg" / "tool").resolve()
    assert (tmp_path / "same").is_symlink()
    assert (tmp_path / "copy").read_bytes() == b"x"


def test_set_id_bits_do_not_arrive(tmp_path: Path) -> None:
    download(archive((entry("tool", mode=0o6755), b"x")), tmp_path)
    assert (tmp_path / "tool").stat().st_mode & 0o7777 == 0o755


BROKEN = [b"no archive at all" * 100, b"\0" * 100, archive((entry("f"), b"x" * 5000))[:1000], b"\x80" + b"\xff" * 511]


@pytest.mark.parametrize("data", BROKEN, ids=["text", "zeros", "cut", "noise"])
def test_a_broken_archive_is_a_clear_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SandboxFileError, match="sent"):
        download(data, tmp_path / "here")


@settings(max_examples=30)
@given(st.binary(max_size=3000))
def test_any_bytes_are_an_archive_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    with suppress(SandboxFileError):
        download(data, tmp_path_factory.mktemp("fuzz"))


@settings(max_examples=60)
@given(st.integers(0, 2047), st.integers(0, 255))
def test_a_damaged_header_is_an_archive_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, position: int, value: int) -> None:
    data = bytearray(archive((entry("file"), b"content"), entry("link", tarfile.SYMTYPE, "file")))
    data[position % len(data)] = value
    with suppress(SandboxFileError):
        download(bytes(data), tmp_path_factory.mktemp("fuzz"))


def test_an_archive_of_too_many_entries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "MAX_ARCHIVE_MEMBERS", 5)
    with pytest.raises(SandboxFileError, match="5 entries"):
        download(archive(*(entry(f"f{n}") for n in range(6))), tmp_path)


def test_an_archive_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_ARCHIVE_BYTES", 5000)
    with pytest.raises(SandboxFileError, match="take parts"):
        download(archive((entry("f"), bytes(8000))), tmp_path)


def answering(*answers: Answer) -> Callable[..., Any]:
    """A sandbox that answers thus, the last answer for ever."""
    left = list(answers)

    async def call(verb: str, arguments: Mapping[str, Any], body: bytes = b"") -> Answer:
        return left.pop(0) if len(left) > 1 else left[0]

    return call


ODD: dict[str, Any] = {"missing": ..., "text": "5", "none": None, "list": [5], "negative": -1, "float": 1.5, "bool": True, "huge": 1 << 70}


@pytest.mark.parametrize("member", ["size", "mode"])
@pytest.mark.parametrize("value", ODD.values(), ids=ODD.keys())
def test_an_impossible_answer_to_a_read_is_a_clear_error(member: str, value: Any) -> None:
    document = {"size": 5, "etag": "e", "mode": 0o644, member: value}
    if value is ...:
        del document[member]
    with pytest.raises(BackendError, match=member):
        run(transfer.read_bytes(answering(Answer(document, b"12345")), "f", limit_bytes=1 << 62))


def test_a_file_that_ends_early_is_an_error() -> None:
    call = answering(Answer({"size": 10, "etag": "e", "mode": 0}, b"12345"), Answer({"size": 10, "etag": "e", "mode": 0}, b""))
    with pytest.raises(SandboxFileError) as caught:
        run(transfer.read_bytes(call, "f", limit_bytes=1 << 62))
    assert caught.value.code == "changed"


def test_more_bytes_than_the_file_has_are_an_error() -> None:
    with pytest.raises(SandboxFileError) as caught:
        run(transfer.read_bytes(answering(Answer({"size": 3, "etag": "e", "mode": 0}, b"12345")), "f", limit_bytes=1 << 62))
    assert caught.value.code == "changed"


@pytest.mark.parametrize("document", [{}, {"file": None}, {"file": 5}, {"file": {}}])
def test_an_impossible_answer_to_a_stat_is_a_clear_error(tmp_path: Path, document: dict[str, Any]) -> None:
    with pytest.raises((SandboxFileError, BackendError)):
        run(transfer.download(answering(Answer(document)), "f", tmp_path / "x", ()))


def test_a_broken_download_of_a_file_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    call = answering(Answer({"file": {"type": "file"}}), Answer({"size": 10, "etag": "e", "mode": 0}, b"12345"), Answer({}))
    with pytest.raises(SandboxFileError, match="ended at byte 5"):
        run(transfer.download(call, "f", tmp_path / "f", ()))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"old")]


def test_a_file_of_the_longest_name_can_be_downloaded(tmp_path: Path) -> None:
    name = "n" * 255
    run(transfer.download(Files(**{name: b"x"}), name, tmp_path, ()))
    assert (tmp_path / name).read_bytes() == b"x"


def test_an_upload_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no-such"):
        run(transfer.upload(Files(), tmp_path / "no-such", "x", ()))


def test_the_uploaded_archive_names_no_user_of_this_host(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    files = Files()
    sent: list[bytes] = []

    async def call(verb: str, arguments: Mapping[str, Any], body: bytes = b"") -> Answer:
        if verb == "write":
            sent.append(body)
        return await files(verb, arguments, body)

    run(transfer.upload(call, tmp_path, "x", ()))
    with tarfile.open(fileobj=io.BytesIO(b"".join(sent))) as tar:
        assert {(m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, "", "")}
    assert files.calls[-2:] == ["unpack", "remove"]
