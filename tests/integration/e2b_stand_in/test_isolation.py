"""A sandbox is a place of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.e2b.stand_in import Service
from tests.support.kubernetes.images import runner_binary
from tests.support.kubernetes.waiting import until

Create = Callable[..., Any]


class TestPlace:
    def test_it_sees_its_own_processes_and_files_only(self, create: Create) -> None:
        one, other = create(), create()
        one.commands.run("sleep 100", background=True)
        one.files.write("/tmp/mine", "1")
        assert "sleep 100" in one.commands.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
        assert "sleep 100" not in other.commands.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
        assert not other.files.exists("/tmp/mine")

    @pytest.mark.parametrize("place", ["/", "/home/user", "/tmp", "/run", "/workspace", "/etc", "/root", "/var/tmp", "/dev/shm"])
    def test_root_writes_everywhere_but_in_the_system(self, sandbox: Any, place: str) -> None:
        assert sandbox.commands.run(f"echo 1 > {place}/x; cat {place}/x", user="root").stdout == "1\n"
        assert sandbox.commands.run("touch /usr/x 2>/dev/null || echo no", user="root").stdout == "no\n"

    def test_root_makes_namespaces_and_other_users(self, sandbox: Any) -> None:
        inner = "mount -t tmpfs none /mnt && setpriv --reuid 4242 --regid 4242 --clear-groups sh -c 'id -u; echo $$; ls -d /proc/[0-9]*'"
        out = sandbox.commands.run(f'unshare -pfm --mount-proc sh -c "{inner}"', user="root").stdout
        assert out.split()[:1] == ["4242"]
        assert "/proc/1" in out.split()

    def test_the_runner_serves(self, sandbox: Any) -> None:
        sandbox.files.write("/run/runner", runner_binary().read_bytes(), user="root")
        who = "--user $(id -u user):$(id -g user)"
        serve = f"/run/runner serve --socket /run/socket --spool /run/spool --workspace /workspace {who} --allow-root /workspace"
        setup = "chmod 755 /run/runner; mkdir /run/spool"
        handle = sandbox.commands.run(f"{setup}; exec {serve}", user="root", background=True)
        until(lambda: sandbox.files.exists("/run/socket"))
        assert [p.pid for p in sandbox.commands.list()] == [handle.pid]
        assert "supervise" in sandbox.commands.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout

    def test_what_is_left_behind_is_reaped(self, sandbox: Any) -> None:
        sandbox.commands.run("(sleep 0.1 &) ; (sleep 0.1 &)")
        until(lambda: "Z" not in sandbox.commands.run("cat /proc/[0-9]*/stat | sed 's/.*) //' | cut -c1").stdout)

    @pytest.mark.parametrize("allowed", [True, False])
    def test_the_network(self, create: Create, allowed: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            threading.Thread(target=_greet, args=(server,), daemon=True).start()
            done = create(allow_internet_access=allowed).commands.run(
                f"(read x < /dev/tcp/127.0.0.1/{port}; echo $x) 2>/dev/null || true", timeout=20
            )
        assert done.stdout.strip() == ("hello" if allowed else "")


def _greet(server: socket.socket) -> None:
    try:
        connection, _ = server.accept()
    except OSError:
        return
    with connection:
        connection.sendall(b"hello\n")


class TestLimits:
    def test_the_kernel_ends_who_takes_too_much_memory(self, service: Service, create: Create, e2b: Any) -> None:
        if not service.limited:
            pytest.skip("no control groups here")
        service.set(memory_bytes=64 << 20)
        made = create()
        with pytest.raises(e2b.CommandExitException) as failed:
            made.commands.run("exec python3 -c 'x = bytearray(200 << 20)'")
        assert failed.value.error == "signal: killed"
        assert made.commands.run("echo alive").stdout == "alive\n"

    def test_a_hundred_at_once(self, service: Service, create: Create) -> None:
        with ThreadPoolExecutor(20) as pool:
            made = list(pool.map(lambda _: create(), range(100)))
            assert list(pool.map(lambda m: m.commands.run("echo $E2B_SANDBOX_ID").stdout.strip(), made)) == [m.sandbox_id for m in made]
            assert len(service.left()["sandboxes"]) == 100
            assert all(pool.map(lambda m: m.kill(), made))
        assert not any(service.left().values())
