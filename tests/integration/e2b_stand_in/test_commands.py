"""envd's processes, its defects included."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.e2b.stand_in import Service
from tests.support.kubernetes.waiting import until

Create = Callable[..., Any]


class TestRun:
    def test_output_and_exit_code(self, sandbox: Any, e2b: Any) -> None:
        parts: list[str] = []
        done = sandbox.commands.run("echo out; echo err >&2; pwd", envs={"A": "b"}, on_stdout=parts.append)
        assert (done.stdout, done.stderr, done.exit_code) == ("out\n/home/user\n", "err\n", 0)
        assert "".join(parts) == done.stdout
        with pytest.raises(e2b.CommandExitException) as failed:
            sandbox.commands.run("echo $A; exit 7", envs={"A": "b"}, cwd="/tmp")
        assert (failed.value.exit_code, failed.value.stdout, failed.value.error) == (7, "b\n", "exit status 7")

    def test_a_signal(self, sandbox: Any, e2b: Any) -> None:
        with pytest.raises(e2b.CommandExitException) as failed:
            sandbox.commands.run("kill -TERM $$")
        assert (failed.value.exit_code, failed.value.error) == (-1, "signal: terminated")

    def test_output_is_text_even_when_it_is_not(self, sandbox: Any) -> None:
        assert sandbox.commands.run("printf 'a\\xff\\x00b'").stdout == "a\ufffd\x00b"

    def test_much_output_is_whole(self, sandbox: Any) -> None:
        assert len(sandbox.commands.run("head -c 3000000 /dev/zero | tr '\\0' x").stdout) == 3_000_000

    def test_a_directory_that_is_not_there(self, sandbox: Any, e2b: Any) -> None:
        with pytest.raises(e2b.InvalidArgumentException):
            sandbox.commands.run("true", cwd="/nowhere")

    def test_users(self, sandbox: Any, e2b: Any) -> None:
        assert sandbox.commands.run("id -u; cd; pwd", user="root").stdout == "0\n/root\n"
        assert sandbox.commands.run("id -un; touch /x 2>/dev/null || echo no").stdout == "user\nno\n"
        with pytest.raises(e2b.AuthenticationException, match="nobody"):
            sandbox.commands.run("true", user="nobody")

    def test_the_pid_is_the_one_inside(self, sandbox: Any) -> None:
        handle = sandbox.commands.run("echo $$", background=True)
        assert handle.wait().stdout == f"{handle.pid}\n"

    def test_a_hundred_short_ones_at_once(self, service: Service, e2b: Any) -> None:
        async def run() -> list[str]:
            made = await e2b.AsyncSandbox.create("base", timeout=60, **service.connection)
            done = await asyncio.gather(*(made.commands.run(f"echo {n}") for n in range(100)))
            return [d.stdout for d in done]

        assert asyncio.run(run()) == [f"{n}\n" for n in range(100)]


class TestBackground:
    def test_list_kill_and_wait(self, sandbox: Any, e2b: Any) -> None:
        handle = sandbox.commands.run("sleep 100", background=True)
        assert [(p.pid, p.cmd, p.args[-1]) for p in sandbox.commands.list()] == [(handle.pid, "/bin/bash", "sleep 100")]
        assert sandbox.commands.kill(handle.pid) is True
        with pytest.raises(e2b.CommandExitException) as failed:
            handle.wait()
        assert failed.value.error == "signal: killed"
        until(lambda: sandbox.commands.list() == [])
        assert sandbox.commands.kill(handle.pid) is False

    def test_who_connects_sees_only_what_comes(self, sandbox: Any) -> None:
        handle = sandbox.commands.run("echo first; read x; echo $x", background=True, stdin=True)
        until(lambda: next(iter(handle))[0] == "first\n")
        handle.disconnect()
        other = sandbox.commands.connect(handle.pid)
        sandbox.commands.send_stdin(handle.pid, "second\n")
        assert other.wait().stdout == "second\n"

    def test_output_without_a_subscriber_is_dropped(self, sandbox: Any) -> None:
        handle = sandbox.commands.run("read x; echo lost; touch /tmp/told; read x; echo kept", background=True, stdin=True)
        handle.disconnect()
        time.sleep(0.3)  # the server hears of it a moment later
        sandbox.commands.send_stdin(handle.pid, "\n")
        until(lambda: sandbox.files.exists("/tmp/told"))
        other = sandbox.commands.connect(handle.pid)
        sandbox.commands.send_stdin(handle.pid, "\n")
        assert other.wait().stdout == "kept\n"

    def test_an_end_is_told_for_a_while(self, sandbox: Any, e2b: Any) -> None:
        handle = sandbox.commands.run("exit 5", background=True)
        until(lambda: sandbox.commands.list() == [])
        with pytest.raises(e2b.CommandExitException) as failed:
            sandbox.commands.connect(handle.pid).wait()
        assert failed.value.exit_code == 5
        with pytest.raises(e2b.NotFoundException):
            sandbox.commands.connect(99999)

    def test_a_timeout_kills_the_child_only(self, sandbox: Any, e2b: Any) -> None:
        began = time.monotonic()
        with pytest.raises(e2b.TimeoutException):
            sandbox.commands.run("sleep 100 & echo $! > /tmp/grandchild; echo $$ > /tmp/child; wait", timeout=1)
        assert time.monotonic() - began < 30
        until(lambda: not self.alive(sandbox, "child"))
        assert self.alive(sandbox, "grandchild")

    def alive(self, sandbox: Any, name: str) -> bool:
        return bool(sandbox.commands.run(f"kill -0 $(cat /tmp/{name}) 2>/dev/null && echo yes; true").stdout)

    def test_the_end_waits_for_who_holds_the_output(self, sandbox: Any, e2b: Any) -> None:
        handle = sandbox.commands.run("sleep 100 & echo $! > /tmp/grandchild; echo $$ > /tmp/child; exit 3", background=True)
        until(lambda: sandbox.files.exists("/tmp/child") and not self.alive(sandbox, "child"))
        assert [p.pid for p in sandbox.commands.list()] == [handle.pid]
        sandbox.commands.run("kill $(cat /tmp/grandchild)")
        with pytest.raises(e2b.CommandExitException) as failed:
            handle.wait()
        assert failed.value.exit_code == 3

    def test_who_does_not_read_holds_the_command_up(self, service: Service, sandbox: Any) -> None:
        before = service.order("memory_bytes")
        script = "for i in $(seq 150); do head -c 1000000 /dev/zero; echo $i > /tmp/count; done"
        handle = sandbox.commands.run(script, background=True, retain_output=False)

        def count() -> str:
            return str(sandbox.files.read("/tmp/count"))

        until(lambda: sandbox.files.exists("/tmp/count"))
        seen = [""]

        def stands() -> bool:
            seen.append(count())
            time.sleep(0.5)
            return count() == seen[-1]

        until(stands, 40)
        assert int(count()) < 120
        assert service.order("memory_bytes") - before < 100_000_000
        handle.disconnect()
        until(lambda: count() == "150\n", 60)


class TestInput:
    def test_all_three_ways(self, sandbox: Any) -> None:
        handle = sandbox.commands.run("cat", background=True, stdin=True)
        sandbox.commands.send_stdin(handle.pid, "one\n")
        sandbox.commands.stream_input(handle.pid, (f"{n}\n" for n in range(3)))
        handle.send_stdin(b"bytes\n")
        handle.close_stdin()
        assert handle.wait().stdout == "one\n0\n1\n2\nbytes\n"

    def test_a_stream_arrives_as_it_is_sent(self, sandbox: Any) -> None:
        handle = sandbox.commands.run("cat > /tmp/got", background=True, stdin=True)
        go = threading.Event()

        def parts() -> Any:
            yield "first"
            assert go.wait(30)
            yield "second"

        sender = threading.Thread(target=sandbox.commands.stream_input, args=(handle.pid, parts()))
        sender.start()
        until(lambda: sandbox.files.exists("/tmp/got") and sandbox.files.read("/tmp/got") == "first")
        go.set()
        sender.join()
        until(lambda: sandbox.files.read("/tmp/got") == "firstsecond")

    def test_megabytes(self, service: Service, e2b: Any) -> None:
        async def run() -> str:
            made = await e2b.AsyncSandbox.create("base", timeout=60, **service.connection)
            handle = await made.commands.run("cksum", background=True, stdin=True)
            stream = made.commands.stream_input(handle.pid)
            stream = await stream if asyncio.iscoroutine(stream) else stream
            async with stream:
                for _ in range(50):
                    await stream.send(b"x" * 100_000)
            await handle.close_stdin()
            return str((await handle.wait()).stdout.split()[1])

        assert asyncio.run(run()) == "5000000"

    def test_nobody_there(self, sandbox: Any, e2b: Any) -> None:
        with pytest.raises(e2b.NotFoundException):
            sandbox.commands.send_stdin(99999, "x")
        with pytest.raises(e2b.NotFoundException):
            sandbox.commands.stream_input(99999, ["x"])
        handle = sandbox.commands.run("sleep 100", background=True)
        with pytest.raises(e2b.SandboxException, match="stdin not enabled or closed"):
            sandbox.commands.send_stdin(handle.pid, "x")

    def test_an_old_envd_has_no_streams(self, service: Service, e2b: Any, create: Create) -> None:
        service.set(envd_version="0.5.1")
        made = create()
        handle = made.commands.run("cat", background=True, stdin=True)
        with pytest.raises(e2b.NotFoundException):
            made.commands.stream_input(handle.pid, ["x"])
        with pytest.raises(e2b.SandboxException, match=r"0\.5\.1"):
            handle.close_stdin()
        made.commands.send_stdin(handle.pid, "works\n")
        assert next(iter(handle))[0] == "works\n"
