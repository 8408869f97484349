"""Exec on the stand-in: the WebSocket protocol as a real API server and containerd have it."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import aiohttp
import pytest

from tests.integration.kubernetes_stand_in.conftest import Exec
from tests.support.kubernetes.exec_client import V4, V5, Done, drained, exec_socket, execute
from tests.support.kubernetes.samples import pod_spec
from tests.support.kubernetes.stand_in import StandIn
from tests.support.kubernetes.starting import NS, started

pytestmark = pytest.mark.parametrize("cluster", ["http", "https"], indirect=True, scope="module")
EXEC_ROLE = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]


def refused(cluster: StandIn, token: str, pod: str, *command: str, **options: Any) -> int:
    """The HTTP status of an exec that is not upgraded."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as error:
        execute(cluster, token, (NS, pod), list(command or ("true",)), **options)
    return error.value.status


class TestProtocol:
    @pytest.mark.parametrize("protocol", [V5, V4])
    def test_output_comes_after_an_empty_frame_and_the_exit_code_in_a_status(self, run: Exec, protocol: str) -> None:
        done = run("sh", "-c", "echo out; echo err >&2; exit 7", protocols=(protocol,))
        assert (done.protocol, done.first, bytes(done.stdout), bytes(done.stderr)) == (protocol, b"\x01", b"out\n", b"err\n")
        assert done.status is not None
        assert (done.status["status"], done.status["reason"]) == ("Failure", "NonZeroExitCode")
        assert done.status["details"]["causes"] == [{"reason": "ExitCode", "message": "7"}]
        assert done.close_code == 1000

    def test_success_is_a_status_too(self, run: Exec) -> None:
        assert run("true").status == {"metadata": {}, "status": "Success"}

    def test_a_signal_is_128_and_its_number(self, run: Exec) -> None:
        assert run("sh", "-c", "kill -9 $$").exit_code == 137

    def test_the_fifth_protocol_ends_stdin_and_the_fourth_cannot(self, run: Exec) -> None:
        assert bytes(run("cat", stdin=b"hello").stdout) == b"hello"
        with pytest.raises(TimeoutError):
            run("cat", stdin=b"hello", protocols=(V4,), timeout_s=1)
        assert bytes(run("head", "-c", "5", stdin=b"hello world", protocols=(V4,)).stdout) == b"hello"

    def test_every_byte_arrives_both_ways(self, run: Exec) -> None:
        data = os.urandom(4 << 20)
        done = run("cat", stdin=data)
        assert bytes(done.stdout) == data
        assert done.exit_code == 0

    def test_a_process_leads_its_session_as_the_containers_user_without_rights(self, run: Exec) -> None:
        script = "ps -o pid=,pgid=,sid= -p $$; id -u; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; cat /proc/1/comm"
        lines = run("sh", "-c", script).stdout.decode().splitlines()
        assert len(set(lines[0].split())) == 1
        assert lines[1] == "1234567890"
        assert [line.split()[1] for line in lines[2:5]] == ["0000000000000000", "0000000000000000", "1"]
        assert lines[5] == "runner"

    def test_the_runners_bridge_ends_with_its_stdin(self, run: Exec) -> None:
        done = run("/run/cifixer/bin/runner", "bridge", "--socket", "/run/cifixer/channel/socket")
        assert done.exit_code == 0

    def test_a_program_that_is_not_there_is_an_internal_error(self, run: Exec) -> None:
        status = run("nope").status
        assert status is not None
        assert (status["reason"], status["status"]) == ("InternalError", "Failure")
        assert 'exec: "nope": executable file not found in $PATH' in status["message"]

    def test_what_cannot_be_reached_is_an_http_status(self, cluster: StandIn, token: str, pod: str) -> None:
        assert refused(cluster, token, pod, protocols=("v9.channel.k8s.io",)) == 403
        assert refused(cluster, token, pod, container="other") == 400
        assert refused(cluster, token, "nobody") == 404
        assert refused(cluster, "wrong", pod) == 401
        assert refused(cluster, token, started(cluster, "over", pod_spec(["true"]))) == 500

    @pytest.mark.parametrize(("verbs", "status"), [(["get"], 403), (["create"], 403), (["get", "create"], 0)])
    def test_an_upgrade_needs_get_and_create(self, cluster: StandIn, pod: str, verbs: list[str], status: int) -> None:
        rules = [*EXEC_ROLE, {"apiGroups": [""], "resources": ["pods/exec"], "verbs": verbs}]
        limited = cluster.token(cluster.user("limited", rules, namespace=NS))
        if status:
            assert refused(cluster, limited, pod) == status
        else:
            assert execute(cluster, limited, (NS, pod), ["true"]).exit_code == 0


class TestStreams:
    def test_a_closed_socket_is_the_end_of_stdin_and_not_of_the_process(self, cluster: StandIn, token: str, pod: str, run: Exec) -> None:
        script = "cat > /dev/null; sleep 0.3; echo went on > /workspace/after"

        async def leave() -> None:
            async with exec_socket(cluster, token, (NS, pod), ["sh", "-c", script]) as socket:
                await socket.send_bytes(b"\x00x")

        asyncio.run(leave())
        time.sleep(0.1)
        assert run("cat", "/workspace/after").exit_code == 1
        time.sleep(0.6)
        assert bytes(run("cat", "/workspace/after").stdout) == b"went on\n"

    def test_a_stream_lasts_as_long_as_anybody_holds_it(self, run: Exec) -> None:
        began = time.monotonic()
        assert run("sh", "-c", "sleep 0.7 & exit 4").exit_code == 4
        assert time.monotonic() - began > 0.6

    def test_when_the_outputs_end_so_does_the_input(self, run: Exec) -> None:
        """Upload by a shell that is replaced: what is written after that is not there, and the exit code is 0."""
        command = ("sh", "-c", "exec head -c 3000000 > /workspace/cut 2>&1")
        run(*command, stdin=b"x" * 3_000_000)
        assert int(run("stat", "-c", "%s", "/workspace/cut").stdout) < 3_000_000
        kept = ("sh", "-c", "exec 3>&1; head -c 3000000 > /workspace/whole")
        assert run(*kept, stdin=b"x" * 3_000_000).exit_code == 0
        assert int(run("stat", "-c", "%s", "/workspace/whole").stdout) == 3_000_000

    def test_who_does_not_read_holds_the_process_up(self, cluster: StandIn, token: str, pod: str, run: Exec) -> None:
        script = "i=0; while :; do head -c 65536 /dev/zero; i=$((i+1)); echo $i > /workspace/count; done"

        async def count() -> int:
            done = await asyncio.to_thread(run, "cat", "/workspace/count")
            return int(done.stdout)

        async def stall() -> tuple[int, int]:
            async with exec_socket(cluster, token, (NS, pod), ["sh", "-c", script]) as socket:
                for _ in range(10):
                    await socket.receive()
                await asyncio.sleep(1)
                first = await count()
                await asyncio.sleep(0.5)
                return first, await count()

        first, second = asyncio.run(stall())
        assert first == second
        assert second < 1000

    def test_a_pod_that_ends_takes_its_execs_along(self, cluster: StandIn, token: str) -> None:
        name = started(cluster, "short", pod_spec())

        async def outlive() -> Done:
            async with exec_socket(cluster, token, (NS, name), ["sleep", "60"]) as socket:
                await socket.receive()
                await asyncio.sleep(0.2)
                await asyncio.to_thread(cluster.order, "kill", namespace=NS, pod=name, container="sandbox")
                return await drained(socket)

        assert asyncio.run(asyncio.wait_for(outlive(), 10)).exit_code == 137
