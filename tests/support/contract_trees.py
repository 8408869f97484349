"""A directory with all kinds of entries, and what makes two of them equal."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def make_tree(root: Path) -> None:
    """Files, an empty file, an empty directory, an executable, links to a file and to a directory, an odd name, a read-only file."""
    (root / "deep" / "er").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "run.sh").write_bytes(b"#!/bin/sh\necho ran\n")
    (root / "run.sh").chmod(0o755)
    (root / "deep" / "data.bin").write_bytes(os.urandom(100_000))
    (root / "deep" / "er" / "nothing").touch()
    (root / "odd name\n").write_bytes(b"odd\n")
    (root / "locked").write_bytes(b"r")
    (root / "locked").chmod(0o444)
    (root / "link").symlink_to("deep")
    (root / "deep" / "back").symlink_to("../run.sh")


def snapshot(root: Path) -> dict[str, tuple[str, object]]:
    """Every entry below ``root``: its kind, and its content and whether it is executable, or its target."""
    found: dict[str, tuple[str, object]] = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("directory", None)
        else:
            found[name] = ("file", (path.read_bytes(), stat.S_IMODE(path.stat().st_mode) & 0o100))
    return found
