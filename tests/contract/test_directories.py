"""Directories: looking, making, removing, and copying whole trees both ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cifixer_exec import InvalidRequestError, SandboxEnvironment, SandboxFileError
from tests.support.contract_trees import make_tree, snapshot


def test_a_listing_is_sorted_and_says_what_is_there(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(f"mkdir {name}; cd {name}; printf 12345 > file; mkdir dir; ln -s file link; mkfifo pipe; chmod 640 file")
    listed = {f.name: f for f in sandbox.list_files(name)}
    assert list(listed) == ["dir", "file", "link", "pipe"]
    assert [f.type for f in listed.values()] == ["directory", "file", "symlink", "other"]
    assert (listed["file"].size, listed["file"].mode) == (5, 0o640)
    assert (listed["link"].target, listed["file"].target) == ("file", None)


def test_a_listing_has_absolute_paths(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(f"{name}/file", b"x")
    workspace = sandbox.run_command("pwd").text.strip()
    assert [f.path for f in sandbox.list_files(name)] == [f"{workspace}/{name}/file"]


def test_a_recursive_listing_has_every_entry(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(f"mkdir -p {name}/a/b {name}/c; touch {name}/a/b/f {name}/g; ln -s / {name}/c/root")
    workspace = sandbox.run_command("pwd").text.strip()
    listed = [f.path.removeprefix(f"{workspace}/{name}/") for f in sandbox.list_files(name, recursive=True)]
    assert listed == ["a", "a/b", "a/b/f", "c", "c/root", "g"]


def test_a_listing_beyond_its_limit_is_refused_instead_of_cut(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(f"mkdir {name}; cd {name}; touch $(seq -w 1 50)")
    assert len(sandbox.list_files(name, limit=50)) == 50
    with pytest.raises(SandboxFileError, match="more than 5 entries"):
        sandbox.list_files(name, limit=5)


def test_many_entries_are_listed(fresh: SandboxEnvironment) -> None:
    fresh.run_command("mkdir many; cd many; seq 1 3000 | xargs touch")
    assert len(fresh.list_files("many")) == 3000


def test_a_modification_time_is_in_nanoseconds(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(f"touch -d @1700000000.25 {name}")
    assert sandbox.stat(name).mtime_ns == 1_700_000_000_250_000_000


def test_stat_does_not_follow_links(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(["ln", "-s", "nowhere", name])
    assert (sandbox.stat(name).type, sandbox.stat(name).target) == ("symlink", "nowhere")


def test_stat_of_nothing_is_not_found(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(SandboxFileError, match="nothing-here") as caught:
        sandbox.stat("nothing-here")
    assert caught.value.code == "not_found"


def test_exists(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, b"")
    assert [sandbox.exists(p) for p in (name, f"{name}/below", "nothing-here", "no/where/at/all", ".")] == [True, False, False, False, True]


def test_mkdir_makes_parents_and_may_be_repeated(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.mkdir(f"{name}/a/b")
    sandbox.mkdir(f"{name}/a/b")
    assert sandbox.stat(f"{name}/a/b").type == "directory"


def test_mkdir_over_a_file_is_a_clear_error(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, b"")
    with pytest.raises(SandboxFileError, match=name):
        sandbox.mkdir(name)


def test_remove_takes_one_file(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(name, b"")
    sandbox.remove(name)
    assert not sandbox.exists(name)


def test_remove_takes_a_tree_only_when_told(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.write_file(f"{name}/a/b", b"")
    with pytest.raises(SandboxFileError):
        sandbox.remove(name)
    assert sandbox.exists(f"{name}/a/b")
    sandbox.remove(name, recursive=True)
    assert not sandbox.exists(name)


def test_remove_takes_the_link_and_not_what_it_points_at(sandbox: SandboxEnvironment, name: str) -> None:
    sandbox.run_command(f"mkdir {name} {name}/kept; touch {name}/kept/file; ln -s kept {name}/link")
    sandbox.remove(f"{name}/link", recursive=True)
    assert sandbox.exists(f"{name}/kept/file")


def test_remove_of_nothing_is_not_found_unless_that_is_fine(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(SandboxFileError) as caught:
        sandbox.remove("nothing-here")
    assert caught.value.code == "not_found"
    sandbox.remove("nothing-here", missing_ok=True)


@pytest.mark.parametrize("path", [".", "/tmp"])
def test_the_roots_themselves_cannot_be_removed(sandbox: SandboxEnvironment, path: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sandbox.remove(path, recursive=True)
    assert caught.value.code == "path_not_allowed"


def test_a_tree_survives_up_and_down(sandbox: SandboxEnvironment, name: str, tmp_path: Path) -> None:
    make_tree(tmp_path / "here")
    sandbox.upload(tmp_path / "here", name)
    sandbox.download(name, tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "here")


def test_an_uploaded_tree_is_there_for_commands(sandbox: SandboxEnvironment, name: str, tmp_path: Path) -> None:
    make_tree(tmp_path)
    sandbox.upload(tmp_path, name)
    script = "./run.sh && cat link/data.bin | wc -c && ls -A empty && cat 'odd name\n'"
    assert sandbox.run_command(script, cwd=name).text.split() == ["ran", "100000", "odd"]


def test_an_upload_goes_into_an_existing_directory(sandbox: SandboxEnvironment, name: str, tmp_path: Path) -> None:
    sandbox.write_file(f"{name}/kept", b"kept")
    sandbox.write_file(f"{name}/run.sh", b"old")
    make_tree(tmp_path)
    sandbox.upload(tmp_path, name)
    assert sandbox.read_file(f"{name}/kept") == b"kept"
    assert sandbox.read_file(f"{name}/run.sh") == b"#!/bin/sh\necho ran\n"


def test_uploads_leave_out_what_is_excluded(sandbox: SandboxEnvironment, name: str, tmp_path: Path) -> None:
    make_tree(tmp_path)
    sandbox.upload(tmp_path, name, exclude=["*.bin", "empty"])
    names = {f.name for f in sandbox.list_files(name, recursive=True)}
    assert "run.sh" in names
    assert not names & {"data.bin", "empty"}


def test_downloads_leave_out_what_is_excluded(sandbox: SandboxEnvironment, name: str, tmp_path: Path) -> None:
    sandbox.run_command(f"mkdir -p {name}/.git/objects {name}/src; touch {name}/.git/config {name}/src/a.py {name}/src/a.pyc")
    sandbox.download(name, tmp_path, exclude=[".git", "*.pyc"])
    assert set(snapshot(tmp_path)) == {"src", "src/a.py"}


def test_one_file_goes_up_and_down_with_its_mode(sandbox: SandboxEnvironment, name: str, tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "tool").chmod(0o750)
    sandbox.upload(tmp_path / "tool", name)
    sandbox.download(name, tmp_path / "back")
    assert sandbox.stat(name).mode == 0o750
    assert snapshot(tmp_path)["back"] == snapshot(tmp_path)["tool"]


def test_one_file_downloads_into_an_existing_directory(sandbox: SandboxEnvironment, name: str, tmp_path: Path) -> None:
    sandbox.write_file(name, b"content")
    sandbox.download(name, tmp_path)
    assert (tmp_path / name).read_bytes() == b"content"


def test_non_utf8_names_survive_up_and_down(sandbox: SandboxEnvironment, name: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / os.fsdecode(b"caf\xe9")).write_bytes(b"x")
    sandbox.upload(tmp_path / "here", name)
    sandbox.download(name, tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "here")


def test_transfers_leave_nothing_in_the_sandbox(fresh: SandboxEnvironment, tmp_path: Path) -> None:
    make_tree(tmp_path / "here")
    fresh.upload(tmp_path / "here", "tree")
    fresh.download("tree", tmp_path / "back")
    assert fresh.list_files("/tmp", recursive=True) == []


def test_an_upload_of_nothing_is_refused_by_name(sandbox: SandboxEnvironment, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no-such"):
        sandbox.upload(tmp_path / "no-such", "x")


def test_a_download_of_nothing_is_not_found(sandbox: SandboxEnvironment, tmp_path: Path) -> None:
    with pytest.raises(SandboxFileError) as caught:
        sandbox.download("nothing-here", tmp_path / "x")
    assert caught.value.code == "not_found"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../../../outside", "../sibling"])
def test_a_link_in_a_download_cannot_lead_out(sandbox: SandboxEnvironment, name: str, tmp_path: Path, target: str) -> None:
    sandbox.run_command(["sh", "-c", f"mkdir {name} && ln -s {target} {name}/link && mkdir {name}/z && touch {name}/z/file"])
    with pytest.raises(SandboxFileError, match="link"):
        sandbox.download(name, tmp_path / "deep" / "here")
    assert not (tmp_path / "deep" / "here" / "link").is_symlink()


def test_an_upload_cannot_leave_its_target(sandbox: SandboxEnvironment, name: str, tmp_path: Path) -> None:
    sandbox.run_command(f"mkdir {name}; ln -s /tmp {name}/out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{name}-escaped").write_bytes(b"x")
    with pytest.raises((InvalidRequestError, SandboxFileError)):
        sandbox.upload(tmp_path, name)
    assert not sandbox.exists(f"/tmp/{name}-escaped")
