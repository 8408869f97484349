"""What is only allowed when it is asked for: networks, and commands that are root."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import docker
import pytest

from cifixer_exec import AppConfig, InvalidRequestError, SandboxEnvironment, SandboxStartError, Status, create_sandbox
from cifixer_exec import attach as attach_to
from cifixer_exec.backends.docker_local import Address, DockerBackend, layout
from cifixer_exec.backends.docker_local.networks import BRIDGE, INTERNAL
from tests.integration.conftest import Direct
from tests.support.docker_daemon import left_on_daemon

Make = Callable[..., SandboxEnvironment]
FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=3).read().decode())"


@pytest.fixture(scope="module", autouse=True)
def networks(api: Any) -> Iterator[None]:
    """Those that were made on the way are removed."""
    yield
    for name in (BRIDGE, INTERNAL):
        with suppress(docker.errors.APIError):
            api.remove_network(name)


@pytest.fixture
def make(direct: Direct, namespace: str) -> Iterator[Make]:
    made = []

    def create(**settings: Any) -> SandboxEnvironment:
        config = direct(**{"memory_bytes": 256 << 20, **settings})
        made.append(create_sandbox(config))
        made[-1].init()
        return made[-1]

    yield create
    for sandbox in made:
        sandbox.teardown()
    assert left_on_daemon(namespace) == []


@contextmanager
def web_server(address: str) -> Iterator[str]:
    """On the daemon's host; answers everything with its greeting."""

    class Greeting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello from the host")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((address, 0), Greeting)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://{address}:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def gateway(api: Any, network: str) -> str:
    return str(api.inspect_network(network)["IPAM"]["Config"][0]["Gateway"])


def interfaces(sandbox: SandboxEnvironment) -> list[str]:
    return sorted(sandbox.run_command("ls /sys/class/net").text.split())


def test_by_default_there_is_no_network_at_all(make: Make) -> None:
    assert interfaces(make()) == ["lo"]


def test_a_bridge_reaches_the_host(make: Make, api: Any) -> None:
    sandbox = make(network="bridge")
    assert "eth0" in interfaces(sandbox)
    with web_server(gateway(api, BRIDGE)) as url:
        assert sandbox.run_command(["python3", "-c", FETCH, url]).text == "hello from the host\n"


def test_sandboxes_on_the_bridge_are_kept_from_each_other(make: Make, api: Any) -> None:
    """The daemon does that with packet filters: with --iptables=false, as tests run it, only the setting can be seen."""
    make(network="bridge")
    assert api.inspect_network(BRIDGE)["Options"]["com.docker.network.bridge.enable_icc"] == "false"


def test_the_internal_network_has_no_way_out(make: Make, api: Any) -> None:
    """That, too, the daemon does with packet filters."""
    assert "eth0" in interfaces(make(network="internal"))
    assert api.inspect_network(INTERNAL)["Internal"] is True


def test_a_network_of_that_name_that_is_not_internal_is_refused(make: Make, api: Any) -> None:
    with suppress(docker.errors.NotFound):
        api.remove_network(INTERNAL)
    api.create_network(INTERNAL, driver="bridge")
    try:
        with pytest.raises(SandboxStartError, match=f"docker network rm {INTERNAL}"):
            make(network="internal")
    finally:
        api.remove_network(INTERNAL)


def test_a_network_that_is_not_there_is_named_with_the_remedy(make: Make) -> None:
    with pytest.raises(SandboxStartError, match="docker network create no-such-network"):
        make(network="bridge", docker_network="no-such-network")


def test_another_network_can_be_named(make: Make, api: Any, namespace: str) -> None:
    api.create_network(namespace, driver="bridge")
    try:
        sandbox = make(network="bridge", docker_network=namespace)
        with web_server(gateway(api, namespace)) as url:
            assert sandbox.run_command(["python3", "-c", FETCH, url]).ok
        sandbox.teardown()
    finally:
        api.remove_network(namespace)


def test_the_hosts_own_network_is_not_to_be_had(make: Make) -> None:
    with pytest.raises(InvalidRequestError, match="none, internal, bridge"):
        make(network="host")


def test_another_runtime_that_the_daemon_knows_is_used(make: Make, api: Any, namespace: str) -> None:
    other = next(name for name in api.info()["Runtimes"] if name not in ("runc", "io.containerd.runtime.v1.linux"))
    assert make(docker_runtime=other).run_command("echo there").text == "there\n"
    (container,) = api.containers(filters={"label": f"cifixer.namespace={namespace}/direct"})
    assert api.inspect_container(container["Id"])["HostConfig"]["Runtime"] == other


AS_ROOT = """
set -e
id -u; touch /usr/made; mkdir -p /opt/made; chown 1234:1234 /opt/made
python3 -c 'import os; os.setgid(1234); os.setuid(1234); open("/opt/made/by-another", "w")'
stat -c %u /opt/made/by-another
grep CapEff /proc/self/status
"""


def test_as_root_commands_can_do_what_package_managers_do(make: Make) -> None:
    result = make(docker_commands_as_root=True).run_command(AS_ROOT)
    assert result.ok, result.stderr_text
    uid, owner, _, capabilities = result.text.split()
    assert (uid, owner) == ("0", "1234")
    assert int(capabilities, 16).bit_count() == len(layout.ROOT_CAPABILITIES)


def test_without_being_asked_commands_are_not_root(make: Make) -> None:
    result = make().run_command("id -u; touch /usr/made; grep -E 'Cap(Eff|Prm|Bnd)' /proc/self/status")
    assert int(result.text.split()[0]) != 0
    assert "Read-only file system" in result.stderr_text or "Permission denied" in result.stderr_text
    assert result.text.splitlines()[1:3] == ["CapPrm:\t" + "0" * 16, "CapEff:\t" + "0" * 16]


def test_processes_of_other_users_end_with_their_command(make: Make) -> None:
    sandbox = make(docker_commands_as_root=True)
    become = "import os, time; os.setsid(); os.setgid(1234); os.setuid(1234); time.sleep(1000)"
    result = sandbox.run_command(["sh", "-c", f"python3 -c '{become}' & sleep 1000"], timeout_s=2)
    assert result.status is Status.TIMED_OUT
    assert "1234" not in sandbox.run_command("for p in /proc/[0-9]*; do stat -c %u $p; done").text.split()


def test_even_root_cannot_speak_for_the_runner(make: Make) -> None:
    """It reaches the socket, so there is a secret; and neither the environment nor the memory of the runner can be read for it."""
    sandbox = make(docker_commands_as_root=True)
    assert not sandbox.run_command("cat /proc/1/environ").ok
    assert not sandbox.run_command("head -c 1 /proc/1/mem").ok
    assert sandbox.run_command("cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep -c CIFIXER_TOKEN || true").text == "0\n"
    assert not sandbox.run_command("kill -9 1; sleep 0.2; env | grep CIFIXER").ok
    assert sandbox.run_command("echo alive").text == "alive\n"


def test_a_sandbox_with_root_can_be_attached_to(make: Make, direct: Direct) -> None:
    sandbox = make(docker_commands_as_root=True)
    sandbox.write_file("file", b"content")
    with_secret = attach_to(sandbox.sandbox_id, direct())
    assert with_secret.read_file("file") == b"content"
    with_secret.close()


@pytest.mark.parametrize("asked", [True, False])
def test_a_writable_root_is_for_those_who_ask(make: Make, api: Any, namespace: str, asked: bool) -> None:
    sandbox = make(docker_writable_root=asked)
    (container,) = api.containers(filters={"label": f"cifixer.namespace={namespace}/direct"})
    assert api.inspect_container(container["Id"])["HostConfig"]["ReadonlyRootfs"] is not asked
    said = sandbox.run_command("echo x > /usr/made").stderr_text
    assert ("Permission denied" if asked else "Read-only file system") in said  # the user is not root in either


def test_a_disk_on_a_volume_is_not_memory_and_goes_with_the_sandbox(make: Make, api: Any, namespace: str) -> None:
    sandbox = make(docker_disk="volume", memory_bytes=64 << 20)
    fill = "head -c 200000000 /dev/zero > big && cp big $HOME/ && stat -c %s big /tmp /var/tmp"
    assert sandbox.run_command(fill, timeout_s=60).ok
    sandbox.extend(500)
    assert len(api.volumes(filters={"label": f"cifixer.namespace={namespace}/direct"})["Volumes"]) == 2
    sandbox.teardown()
    assert left_on_daemon(namespace) == []


def test_a_disk_on_a_volume_has_no_size_that_could_be_promised(make: Make) -> None:
    with pytest.raises(InvalidRequestError, match="disk_bytes"):
        make(docker_disk="volume", disk_bytes=1 << 30)


def test_the_disk_of_a_container_that_was_removed_by_hand_is_reaped(make: Make, host: str, api: Any, namespace: str) -> None:
    sandbox = make(docker_disk="volume")
    (container,) = api.containers(filters={"label": f"cifixer.namespace={namespace}/direct"})
    api.remove_container(container["Id"], force=True)
    assert [what.split()[0] for what in left_on_daemon(namespace)] == ["volume"]
    backend = DockerBackend(address=Address(host=host), namespace=f"{namespace}/direct")
    (owned,) = backend.list_owned()
    assert (owned.handle.sandbox_id, owned.expires_at_s) == (sandbox.sandbox_id, 0.0)
    backend.destroy(owned.handle)
    assert left_on_daemon(namespace) == []


def test_the_deadline_is_told_whatever_the_disk_is(make: Make, host: str, namespace: str) -> None:
    sandbox = make(docker_disk="volume", lifetime_s=500)
    backend = DockerBackend(address=Address(host=host), namespace=f"{namespace}/direct")
    deadlines = [backend.list_owned()[0].expires_at_s]
    sandbox.extend(5000)
    deadlines.append(backend.list_owned()[0].expires_at_s)
    assert [round(d - time.time(), -2) for d in deadlines] == [500, 5000]


def test_a_disk_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"docker_disk='floppy'.*memory, volume"):
        AppConfig(docker_disk="floppy")
