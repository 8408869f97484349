"""envd's files."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.e2b.stand_in import Service

_BIG = os.urandom(5 << 20)


class TestContent:
    @pytest.mark.parametrize("streamed", [False, True])
    def test_five_mebibytes_both_ways(self, sandbox: Any, streamed: bool) -> None:
        sandbox.files.write("/tmp/big", io.BytesIO(_BIG) if streamed else _BIG)
        assert sandbox.commands.run("sha256sum < /tmp/big").stdout.split()[0] == hashlib.sha256(_BIG).hexdigest()
        if streamed:
            with sandbox.files.read("/tmp/big", format="stream") as chunks:
                assert b"".join(chunks) == _BIG
        else:
            assert bytes(sandbox.files.read("/tmp/big", format="bytes")) == _BIG

    def test_by_the_asynchronous_sdk(self, service: Service, e2b: Any) -> None:
        async def copy() -> bytes:
            made = await e2b.AsyncSandbox.create("base", timeout=60, **service.connection)
            await made.files.write("big", _BIG)
            return bytes(await made.files.read("/home/user/big", format="bytes"))

        assert asyncio.run(copy()) == _BIG

    def test_several_at_once_with_their_directories(self, sandbox: Any) -> None:
        written = sandbox.files.write_files(
            [{"path": "/tmp/a/b/one", "data": "1"}, {"path": "two", "data": b"2"}, {"path": "e", "data": ""}]
        )
        assert [w.path for w in written] == ["/tmp/a/b/one", "/home/user/two", "/home/user/e"]
        assert sandbox.commands.run("cat /tmp/a/b/one two e; stat -c %U /tmp/a/b two").stdout == "12user\nuser\n"

    def test_what_is_not_there(self, sandbox: Any, e2b: Any) -> None:
        with pytest.raises(e2b.FileNotFoundException):
            sandbox.files.read("/tmp/nothing")
        with pytest.raises(e2b.InvalidArgumentException, match="is a directory"):
            sandbox.files.read("/tmp")

    def test_what_root_writes_is_roots(self, sandbox: Any) -> None:
        sandbox.files.write("/root/x", "1", user="root")
        assert sandbox.commands.run("stat -c %U /root/x", user="root").stdout == "root\n"

    def test_no_space(self, service: Service, create: Callable[..., Any], e2b: Any) -> None:
        service.set(disk_bytes=4 << 20)
        with pytest.raises(e2b.NotEnoughSpaceException):
            create().files.write("/tmp/big", _BIG)


class TestTree:
    def test_list_stat_make_move_remove(self, sandbox: Any) -> None:
        files = sandbox.files
        assert files.make_dir("/tmp/d/e") is True
        assert files.make_dir("/tmp/d/e") is False
        files.write("/tmp/d/f", "12345")
        sandbox.commands.run("ln -s f /tmp/d/l")
        assert [(e.name, e.type.value) for e in files.list("/tmp/d")] == [("e", "dir"), ("f", "file"), ("l", "symlink")]
        info = files.get_info("/tmp/d/f")
        assert (info.size, info.owner, info.permissions, info.mode) == (5, "user", "-rw-r--r--", 0o644)
        assert files.get_info("/tmp/d/l").symlink_target == "f"
        assert files.rename("/tmp/d/f", "/tmp/new/g").path == "/tmp/new/g"
        assert (files.exists("/tmp/d/f"), files.read("/tmp/new/g")) == (False, "12345")
        files.remove("/tmp/d")
        assert [e.path for e in files.list("/tmp", depth=2)] == ["/tmp/new", "/tmp/new/g"]

    def test_a_link_leads_nowhere_outside(self, sandbox: Any, tmp_path: Any) -> None:
        secret = tmp_path / "secret"
        secret.write_text("host")
        sandbox.commands.run(f"mkdir -p {tmp_path}; echo inside > {secret}; ln -s {secret} /tmp/link")
        assert sandbox.files.read("/tmp/link") == "inside\n"
        assert secret.read_text() == "host"
