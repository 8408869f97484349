"""Faults to order, as the SDK sees them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2b.stand_in import Service
from tests.support.kubernetes.waiting import until

Create = Callable[..., Any]
httpx: Any = pytest.importorskip("httpx", reason="the SDK is not installed")


class TestRequests:
    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (401, "AuthenticationException"),
            (403, "SandboxException"),
            (429, "RateLimitException"),
            (500, "SandboxException"),
            (503, "ServiceBusyException"),
        ],
    )
    def test_a_status_before_anything_is_done(self, service: Service, create: Create, e2b: Any, status: int, error: str) -> None:
        service.fault(method="POST", path="^/v2/sandboxes$", status=status)
        with pytest.raises(getattr(e2b.exceptions, error), match=str(status)):
            create(retries=0)
        assert service.left()["sandboxes"] == []
        assert service.asked()["faults"] == {str(status): 1}
        create(retries=0)

    def test_a_status_after_it_is_done(self, service: Service, sandbox: Any, e2b: Any) -> None:
        service.fault(method="DELETE", status=500, after=True)
        with pytest.raises(e2b.SandboxException, match="500"):
            sandbox.kill()
        assert service.left()["sandboxes"] == []

    def test_what_is_no_json(self, service: Service, create: Create) -> None:
        service.fault(method="POST", path="^/v2/sandboxes$", status=503, html="<html>busy</html>", headers={"Should-Retry": "false"})
        with pytest.raises(ValueError, match="Expecting value"):
            create()

    def test_retry_after_is_kept(self, service: Service, create: Create) -> None:
        service.fault(method="POST", path="^/v2/sandboxes$", status=429, headers={"Retry-After": "1"})
        began = time.monotonic()
        create()
        assert time.monotonic() - began >= 1

    def test_a_delay(self, service: Service, sandbox: Any) -> None:
        service.fault(path="^/sandboxes/", delay_s=0.7)
        began = time.monotonic()
        sandbox.get_info()
        assert time.monotonic() - began >= 0.7

    @pytest.mark.parametrize("after", [False, True])
    def test_a_dropped_connection(self, service: Service, create: Create, after: bool) -> None:
        service.fault(method="POST", path="^/v2/sandboxes$", drop=True, after=after)
        with pytest.raises(httpx.TransportError):
            create()
        until(lambda: len(service.left()["sandboxes"]) == int(after))

    def test_only_the_one_that_is_meant_and_later(self, service: Service, create: Create, e2b: Any) -> None:
        one, other = create(), create()
        service.fault(path="Start$", sandbox=one.sandbox_id, status=503, skip=1)
        one.commands.run("true")
        other.commands.run("true")
        with pytest.raises(e2b.SandboxException):
            one.commands.run("true")
        one.commands.run("true")

    def test_a_start_that_was_done_and_not_told(self, service: Service, sandbox: Any, e2b: Any) -> None:
        service.fault(path="Start$", status=502, after=True)
        with pytest.raises(e2b.SandboxException):
            sandbox.commands.run("touch /tmp/done")
        until(lambda: sandbox.files.exists("/tmp/done"))

    def test_a_write_that_was_done_and_not_told(self, service: Service, sandbox: Any) -> None:
        service.fault(method="POST", path="^/files", drop=True, after=True)
        with pytest.raises(httpx.TransportError):
            sandbox.files.write("/tmp/x", "1")
        assert sandbox.files.read("/tmp/x") == "1"


class TestStreams:
    @pytest.mark.parametrize(
        ("how", "error"),
        [("frame", "unexpected EOF"), ("reset", "reset by peer"), ("clean", "without an end event"), ("error", "was cut")],
    )
    def test_a_cut_loses_the_end_and_not_the_command(self, service: Service, sandbox: Any, e2b: Any, how: str, error: str) -> None:
        handle = sandbox.commands.run("echo started; read x; exit 4", background=True, stdin=True)
        until(lambda: next(iter(handle))[0] == "started\n")
        assert service.order("cut_streams", sandbox=sandbox.sandbox_id, how=how) == 1
        with pytest.raises(Exception, match=error) as failed:
            handle.wait()
        assert not isinstance(failed.value, e2b.CommandExitException)
        other = sandbox.commands.connect(handle.pid)
        sandbox.commands.send_stdin(handle.pid, "\n")
        with pytest.raises(e2b.CommandExitException) as ended:
            other.wait()
        assert ended.value.exit_code == 4

    @pytest.mark.parametrize("how", ["error", "reset"])
    def test_a_kill_ends_them(self, service: Service, sandbox: Any, e2b: Any, how: str) -> None:
        service.set(killed_streams=how)
        handle = sandbox.commands.run("sleep 100", background=True)
        sandbox.kill()
        with pytest.raises(e2b.exceptions.SandboxNotRunningException):
            handle.wait()


class TestSandbox:
    def test_one_that_vanishes(self, service: Service, sandbox: Any, e2b: Any) -> None:
        handle = sandbox.commands.run("sleep 100", background=True)
        service.order("vanish", sandbox=sandbox.sandbox_id)
        with pytest.raises(e2b.exceptions.SandboxNotRunningException):
            handle.wait()
        assert service.left()["processes"] == []
        assert sandbox.is_running() is False
        assert sandbox.kill() is False

    def test_one_that_is_frozen(self, service: Service, sandbox: Any) -> None:
        handle = sandbox.commands.run("for i in 1 2 3; do read x; echo $i; touch /tmp/$i; done", background=True, stdin=True)
        sandbox.commands.send_stdin(handle.pid, "\n")
        events = iter(handle)
        assert next(events)[0] == "1\n"
        service.order("freeze", sandbox=sandbox.sandbox_id)
        got: list[Any] = []
        inside = Path(f"/proc/{service.order('pids', sandbox=sandbox.sandbox_id)[0]}/root/tmp")
        reader = threading.Thread(target=lambda: got.append(sandbox.files.make_dir("/tmp/made")))
        reader.start()
        assert sandbox.get_info().state.value == "running"  # the API is another server
        reader.join(1)
        assert (got, (inside / "made").exists(), (inside / "1").exists()) == ([], False, True)
        service.order("thaw", sandbox=sandbox.sandbox_id)
        reader.join(30)
        assert got == [True]
        sandbox.commands.send_stdin(handle.pid, "\n\n")
        assert [e[0] for e in events if e[0]] in (["2\n", "3\n"], ["2\n3\n"])

    @pytest.mark.parametrize("port", ["api", "sandbox"])
    def test_a_server_that_is_down_for_a_while(self, service: Service, sandbox: Any, e2b: Any, port: str) -> None:
        handle = sandbox.commands.run("read x; exit 6", background=True, stdin=True)
        service.order("stop", port=port)
        try:
            with pytest.raises(Exception, match=r"(?i)connect|unreachable|error"):
                sandbox.get_info(request_timeout=2) if port == "api" else sandbox.files.read("/etc/passwd", request_timeout=2)
        finally:
            service.order("start", port=port)
        other = sandbox.commands.connect(handle.pid)
        sandbox.commands.send_stdin(handle.pid, "\n")
        with pytest.raises(e2b.CommandExitException):
            other.wait()
        assert sandbox.get_info().sandbox_id == sandbox.sandbox_id

    def test_a_wrong_token(self, service: Service, sandbox: Any, e2b: Any) -> None:
        headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983", "X-Access-Token": "wrong"}
        assert httpx.get(f"{service.sandbox_url}/health", headers=headers).status_code == 204
        assert httpx.get(f"{service.sandbox_url}/files", params={"path": "/etc/passwd"}, headers=headers).status_code == 401
        answer = httpx.get(f"{service.sandbox_url}/health", headers={**headers, "E2b-Sandbox-Port": "8080"})
        assert (answer.status_code, answer.json()["message"]) == (502, "The sandbox is running but port is not open")
        answer = httpx.get(f"{service.sandbox_url}/health", headers={**headers, "E2b-Sandbox-Id": "nobody"})
        assert (answer.status_code, answer.json()["message"]) == (502, "The sandbox was not found")
