"""The Docker backend beyond the contract: whose containers, why one died, and what is said when something is missing."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest

from cifixer_exec import InvalidRequestError, create_sandbox
from cifixer_exec.backends.breaker import BreakerState
from cifixer_exec.backends.docker_local import Address, DockerBackend, DockerOptions, stream
from cifixer_exec.backends.docker_local import backend as module
from cifixer_exec.backends.docker_local.containers import Containers
from cifixer_exec.backends.docker_local.daemon import daemon_at
from cifixer_exec.errors import BackendUnavailableError, SandboxLostError, SandboxStartError
from cifixer_exec.model import MIB, Inspection, SandboxHandle, SandboxSpec
from tests.integration.conftest import Direct
from tests.support.docker_daemon import image_for_tests, left_on_daemon
from tests.support.docker_tcp import certificates, tcp_port_of


@pytest.fixture
def backend(host: str, namespace: str) -> Iterator[DockerBackend]:
    made = DockerBackend(address=Address(host=host), namespace=namespace, options=DockerOptions(image=image_for_tests(host)))
    yield made
    for owned in made.list_owned():
        made.destroy(owned.handle)
    assert left_on_daemon(namespace) == []


def spec(sandbox_id: str = "one", **members: Any) -> SandboxSpec:
    return SandboxSpec(backend="docker_local", sandbox_id=sandbox_id, **members)


def container_of(api: Any, namespace: str) -> dict[str, Any]:
    (found,) = api.containers(all=True, filters={"label": f"cifixer.namespace={namespace}"})
    return dict(api.inspect_container(found["Id"]))


def death_of(backend: DockerBackend, handle: SandboxHandle) -> Inspection:
    give_up = time.monotonic() + 20
    while (found := backend.inspect(handle)).alive:
        assert time.monotonic() < give_up, "it does not die"
        time.sleep(0.05)
    return found


def test_a_second_create_adopts_the_same_container(backend: DockerBackend, api: Any, namespace: str) -> None:
    backend.create(spec())
    first = container_of(api, namespace)["Id"]
    backend.create(spec())
    assert container_of(api, namespace)["Id"] == first


def test_a_container_whose_maker_died_before_the_start_is_started(
    backend: DockerBackend, api: Any, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Containers, "start", lambda self, container: None)
    backend.create(spec())
    assert container_of(api, namespace)["State"]["Status"] == "created"
    monkeypatch.undo()
    assert [o.handle.sandbox_id for o in backend.list_owned()] == ["one"]
    assert backend.inspect(backend.create(spec())).alive


def test_a_dead_one_of_the_same_id_is_made_anew(backend: DockerBackend, api: Any, namespace: str) -> None:
    handle = backend.create(spec())
    dead = container_of(api, namespace)["Id"]
    api.kill(dead)
    death_of(backend, handle)
    backend.create(spec())
    assert container_of(api, namespace)["Id"] != dead


def test_labels_are_there_and_tell_the_deadline(backend: DockerBackend, api: Any, namespace: str) -> None:
    backend.create(spec(lifetime_s=500))
    labels = container_of(api, namespace)["Config"]["Labels"]
    assert (labels["cifixer.sandbox_id"], labels["cifixer.placement"]) == ("one", backend.placement)
    assert abs(float(labels["cifixer.expires_at"]) - time.time() - 500) < 30


def test_a_container_of_somebody_else_is_never_touched(backend: DockerBackend, api: Any, host: str) -> None:
    name = backend._names.container("taken")
    foreign = api.create_container(image_for_tests(host), command=["sleep", "60"], name=name)["Id"]
    handle = SandboxHandle(backend="docker_local", sandbox_id="taken", placement=backend.placement)
    try:
        with pytest.raises(SandboxStartError, match="not one of ours"):
            backend.create(spec("taken"))
        with suppress(SandboxStartError):
            backend.destroy(handle)
        assert not backend.inspect(handle).alive
        assert backend.list_owned() == []
        assert api.inspect_container(foreign)["State"]["Status"] == "created"
    finally:
        api.remove_container(foreign, force=True)


def test_another_namespace_sees_nothing_of_it(backend: DockerBackend, host: str) -> None:
    backend.create(spec())
    other = DockerBackend(address=Address(host=host), namespace="another")
    assert other.list_owned() == []
    assert not other.inspect(SandboxHandle(backend="docker_local", sandbox_id="one", placement=other.placement)).alive


def test_an_image_that_cannot_be_pulled_is_said_within_seconds(backend: DockerBackend, namespace: str) -> None:
    begun = time.monotonic()
    with pytest.raises(SandboxStartError, match=r"127\.0\.0\.1:9/no/such.*could not be pulled.*docker (pull|login)"):
        backend.create(spec(image="127.0.0.1:9/no/such:image"))
    assert time.monotonic() - begun < 20
    assert left_on_daemon(namespace) == []


def test_an_image_name_that_is_none_is_refused(backend: DockerBackend) -> None:
    with pytest.raises((InvalidRequestError, SandboxStartError), match="UPPER"):
        backend.create(spec(image="UPPER case"))


def test_a_runtime_that_the_daemon_does_not_know_is_refused_by_name(host: str, namespace: str) -> None:
    options = DockerOptions(image=image_for_tests(host), runtime="runsc-not-here")
    with pytest.raises(SandboxStartError, match=r"runsc-not-here.*runc"):
        DockerBackend(address=Address(host=host), namespace=namespace, options=options).create(spec())
    assert left_on_daemon(namespace) == []


def test_more_cpus_than_there_are_leave_nothing_behind(backend: DockerBackend, namespace: str) -> None:
    with pytest.raises(InvalidRequestError, match="CPU"):
        backend.create(spec(cpus=100_000))
    assert left_on_daemon(namespace) == []


DEATHS: dict[str, tuple[Callable[[Any, str], object], str]] = {
    "killed": (lambda api, container: api.kill(container), "killed from outside"),
    "removed": (lambda api, container: api.remove_container(container, force=True), "removed"),
    "stopped": (lambda api, container: api.stop(container, timeout=0), "killed from outside"),
}


@pytest.mark.parametrize("how", DEATHS)
def test_the_cause_of_death_is_told(backend: DockerBackend, api: Any, namespace: str, how: str) -> None:
    die, cause = DEATHS[how]
    handle = backend.create(spec())
    die(api, container_of(api, namespace)["Id"])
    assert cause in death_of(backend, handle).cause


def test_the_end_of_the_lifetime_is_told(backend: DockerBackend) -> None:
    assert death_of(backend, backend.create(spec(lifetime_s=0.5))).cause == "its lifetime ended"


def test_a_container_that_is_out_of_memory_says_so(backend: DockerBackend, api: Any, namespace: str) -> None:
    handle = backend.create(spec(memory_bytes=64 * MIB))
    container = container_of(api, namespace)["Id"]
    api.update_container(container, mem_limit=6 * MIB, memswap_limit=6 * MIB)  # no room even for the runner
    with suppress(docker.errors.APIError):
        for _ in range(20):
            api.exec_start(api.exec_create(container, ["sh", "-c", "head -c 30000000 /dev/zero > /tmp/x"])["Id"])
            if not backend.inspect(handle).alive:
                break
    assert "out of memory" in death_of(backend, handle).cause


def test_a_deadline_that_was_moved_is_seen_by_every_process(backend: DockerBackend, host: str, namespace: str) -> None:
    handle = backend.create(spec(lifetime_s=500))
    for deadline in (time.time() + 5000, time.time() + 50):
        backend.extend(handle, deadline)
        (owned,) = DockerBackend(address=Address(host=host), namespace=namespace).list_owned()
        assert abs(owned.expires_at_s - deadline) < 0.01
    backend.destroy(handle)
    assert left_on_daemon(namespace) == []


def test_the_deadline_of_a_removed_container_is_owned_until_destroyed(backend: DockerBackend, api: Any, namespace: str) -> None:
    handle = backend.create(spec())
    backend.extend(handle, time.time() + 5000)
    api.remove_container(container_of(api, namespace)["Id"], force=True)
    (owned,) = backend.list_owned()
    assert (owned.handle.sandbox_id, owned.expires_at_s) == ("one", 0.0)
    with pytest.raises(SandboxLostError):
        backend.extend(handle, time.time() + 5000)
    backend.destroy(owned.handle)
    assert backend.list_owned() == []


def test_what_ended_long_ago_is_removed_by_the_next_create(backend: DockerBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = backend.create(spec("old", lifetime_s=0.5))
    death_of(backend, handle)
    monkeypatch.setattr(module, "LITTER_AGE_S", 0.0)
    monkeypatch.setattr(module, "LITTER_PAUSE_S", 0.0)
    backend.create(spec("new"))
    assert [o.handle.sandbox_id for o in backend.list_owned()] == ["new"]


def test_the_container_is_hardened(backend: DockerBackend, api: Any, namespace: str) -> None:
    backend.create(spec())
    host = container_of(api, namespace)["HostConfig"]
    assert (host["NetworkMode"], host["ReadonlyRootfs"], host["Privileged"], host["Init"]) == ("none", True, False, False)
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges:true"])
    assert host["Memory"] == host["MemorySwap"] == 2048 * MIB
    assert (host["NanoCpus"], host["PidsLimit"]) == (1_000_000_000, 512 + 1024)
    assert not host["Binds"]


def test_nothing_but_the_disk_can_be_written(direct: Direct) -> None:
    with create_sandbox(direct()) as sandbox:
        find = "find / -xdev -writable -not -type l -not -type c 2>/dev/null"
        assert sandbox.run_command(find).text.split() == ["/run/cifixer/spool"]  # a tmpfs
        assert sandbox.run_command("echo x > /var/tmp/f && cat /tmp/f").text == "x\n"


def test_the_user_has_a_name_among_those_of_the_image(direct: Direct) -> None:
    with create_sandbox(direct()) as sandbox:
        assert sandbox.run_command("whoami; id -un 0; id -un 65534").text.split() == ["sandbox", "root", "nobody"]
        assert not sandbox.run_command("echo evil >> /etc/passwd || mv /run/cifixer/etc/passwd /tmp/x || ln -sf /tmp /etc/passwd").ok


def test_the_channel_is_out_of_reach_of_commands(direct: Direct) -> None:
    with create_sandbox(direct()) as sandbox:
        assert not sandbox.run_command("ls /run/cifixer/channel").ok
        assert not sandbox.run_command(
            "mv /run/cifixer/channel /tmp/; rm -rf /run/cifixer/channel/*; test -e /run/cifixer/channel/socket"
        ).ok
        assert not sandbox.run_command(["/run/cifixer/runner", "bridge", "--socket", "/run/cifixer/channel/socket", "--wait", "0"]).ok
        assert sandbox.run_command("echo alive").text == "alive\n"


#: docker-py leaves the socket that it could not connect to the garbage collector.
LEAKS = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

ABSENT = {
    "no socket": ("unix:///no/such/docker.sock", "start the Docker daemon"),
    "nobody listens": ("tcp://127.0.0.1:9", "start the Docker daemon"),
}


@LEAKS
@pytest.mark.parametrize("how", ABSENT)
def test_without_a_daemon_everything_is_unavailable_and_nothing_is_known(how: str) -> None:
    address, mend = ABSENT[how]
    backend = DockerBackend(address=Address(host=address), namespace="x")
    handle = SandboxHandle(backend="docker_local", sandbox_id="one", placement="p")
    for ask in (lambda: backend.create(spec()), lambda: backend.inspect(handle), backend.list_owned, lambda: backend.destroy(handle)):
        with pytest.raises(BackendUnavailableError, match=mend):
            ask()
    health = backend.probe()
    assert not health.ok
    assert mend in health.remedy
    with pytest.raises(BackendUnavailableError, match="Docker daemon"):
        asyncio.run(_dial(backend, handle))
    gc.collect()


async def _dial(backend: DockerBackend, handle: SandboxHandle) -> None:
    await backend.dial(handle)()


@LEAKS
def test_a_daemon_that_goes_away_is_unavailable_and_no_death(backend: DockerBackend, host: str, namespace: str, tmp_path: Path) -> None:
    """Through a link to the socket, which is then taken away."""
    link = tmp_path / "docker.sock"
    link.symlink_to(host.removeprefix("unix://"))
    through = DockerBackend(address=Address(host=f"unix://{link}"), namespace=namespace, options=DockerOptions(image=image_for_tests(host)))
    handle = through.create(spec())
    link.unlink()
    daemon_at(Address(host=f"unix://{link}")).api.close()  # its open connections would go on
    with pytest.raises(BackendUnavailableError):
        through.inspect(handle)
    with pytest.raises(BackendUnavailableError):
        through.list_owned()
    link.symlink_to(host.removeprefix("unix://"))
    assert through.inspect(handle).alive
    gc.collect()


@pytest.mark.parametrize("address", ["ftp://here", "tcp://no-port", "tcp://host:x"])
def test_an_address_that_is_none_is_refused_by_name(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="docker_host"):
        DockerBackend(address=Address(host=address), namespace="x").list_owned()


def test_dialling_a_container_that_is_gone_is_an_os_error(backend: DockerBackend) -> None:
    handle = backend.create(spec())
    backend.destroy(handle)
    with pytest.raises(OSError, match="No such container"):
        asyncio.run(_dial(backend, handle))


def test_a_paused_container_is_not_dead_and_the_remedy_is_told(backend: DockerBackend, api: Any, namespace: str) -> None:
    handle = backend.create(spec())
    container = container_of(api, namespace)["Id"]
    api.pause(container)
    with pytest.raises(BackendUnavailableError, match="docker unpause cifixer-one-"):
        asyncio.run(_dial(backend, handle))
    assert backend.inspect(handle).alive
    api.unpause(container)


def test_a_handle_works_in_any_form(backend: DockerBackend) -> None:
    handle = backend.create(spec())
    assert backend.inspect(SandboxHandle.from_json(replace(handle, data={"boot_id": "x"}).to_json())).alive


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_daemon_at_a_tcp_port_works_the_same(host: str, direct: Direct, namespace: str, tmp_path: Path, secure: bool) -> None:
    if secure and shutil.which("openssl") is None:
        pytest.skip("certificates are made with openssl, which is not installed")
    context = certificates(tmp_path) if secure else None
    with tcp_port_of(host.removeprefix("unix://"), context) as port:
        config = direct(docker_host=f"tcp://127.0.0.1:{port}", docker_cert_path=str(tmp_path) if secure else "")
        with create_sandbox(config) as sandbox:
            data = bytes(range(256)) * 20_000
            sandbox.write_file("file", data)
            assert sandbox.read_file("file") == data
            assert len(sandbox.run_command("head -c 9000000 /dev/zero").stdout) == 9_000_000
        daemon_at(Address(host=config.docker_host, cert_path=config.docker_cert_path)).api.close()
    assert left_on_daemon(namespace) == []


#: Does what `ssh HOST docker system dial-stdio` does, and writes down what it was asked for.
SSH = """#!{python}
import os, socket, sys, threading
open({asked!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
daemon = socket.socket(socket.AF_UNIX)
daemon.connect({socket!r})
def copy(read, write):
    while data := read():
        write(data)
def there():
    copy(lambda: os.read(0, 65536), daemon.sendall)
    daemon.shutdown(socket.SHUT_WR)
threading.Thread(target=there, daemon=True).start()
copy(lambda: daemon.recv(65536), lambda data: sys.stdout.buffer.write(data) and sys.stdout.buffer.flush())
"""


def test_a_daemon_behind_ssh_works_the_same(
    host: str, direct: Direct, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    program = tmp_path / "ssh"
    program.write_text(SSH.format(python=sys.executable, asked=str(asked), socket=host.removeprefix("unix://")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = direct(docker_host="ssh://someone@far.example:2222")
    with create_sandbox(config) as sandbox:
        data = bytes(range(256)) * 20_000
        sandbox.write_file("file", data)
        assert sandbox.read_file("file") == data
    daemon = daemon_at(Address(host=config.docker_host))
    daemon.api.close()
    assert set(asked.read_text().splitlines()) == {"-o BatchMode=yes -p 2222 -- someone@far.example docker system dial-stdio"}
    assert left_on_daemon(namespace) == []


@LEAKS
def test_an_ssh_that_cannot_log_in_says_what_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ssh"
    program.write_text("#!/bin/sh\necho 'Permission denied (publickey).' >&2\nexit 255\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BackendUnavailableError, match="ssh HOST docker version"):
        DockerBackend(address=Address(host="ssh://nobody-lets-me-in"), namespace="x").list_owned()
    gc.collect()


def test_a_worker_without_its_daemon_ends_with_one_line(tmp_path: Path) -> None:
    variables = {"CIFIXER_DOCKER_HOST": "unix:///no/such/docker.sock", "CIFIXER_REDIS_URL": f"unix://{tmp_path}/redis.sock"}
    command = [str(Path(sys.executable).with_name("cifixer-exec")), "worker", "--backend", "docker_local"]
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False)
    critical = [line for line in ended.stderr.splitlines() if "CRITICAL" in line]
    assert (ended.returncode, len(critical), "Traceback" in ended.stderr) == (os.EX_CONFIG, 1, False)
    assert "start the Docker daemon" in critical[0]


def test_a_daemon_that_is_slow_to_open_a_channel_loses_no_sandbox(
    backend: DockerBackend, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it left alone for that: it answers."""
    dial = backend.dial(backend.create(spec()))
    monkeypatch.setattr(stream, "DIAL_TIMEOUT_S", 0.0)
    for _ in range(8):
        with pytest.raises(BackendUnavailableError, match="has not opened a channel"):
            asyncio.run(dial())  # type: ignore[arg-type]  # it is a coroutine function
    assert daemon_at(Address(host=host)).breaker.state is BreakerState.CLOSED


def test_the_bridge_does_not_bring_the_secret_where_commands_are_root(host: str, api: Any, namespace: str) -> None:
    options = DockerOptions(image=image_for_tests(host), commands_as_root=True)
    backend = DockerBackend(address=Address(host=host), namespace=namespace, options=options)
    handle = backend.create(spec())

    async def told(*without: str) -> str:
        container, command = container_of(api, namespace)["Id"], ["sh", "-c", "echo $CIFIXER_TOKEN."]
        channel = await stream.dial_exec(
            daemon_at(Address(host=host)).endpoint, api_version="1.41", container=container, user="0", command=command, without=without
        )
        try:
            return (await channel.receive()).decode().strip()
        finally:
            channel.close()

    try:
        assert asyncio.run(told()) == f"{backend.token(handle)}."
        assert asyncio.run(told("CIFIXER_TOKEN")) == "."
    finally:
        backend.destroy(handle)


def test_the_proxy_of_the_docker_command_is_not_told_to_sandboxes(
    host: str, api: Any, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its URL may have a password."""
    (tmp_path / "config.json").write_text('{"proxies": {"default": {"httpProxy": "http://me:secret@proxy"}}}')
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    other = host.replace("unix:///", "unix:////")  # a client that reads this configuration
    backend = DockerBackend(address=Address(host=other), namespace=namespace, options=DockerOptions(image=image_for_tests(host)))
    handle = backend.create(spec())
    try:
        assert "secret" not in str(container_of(api, namespace)["Config"]["Env"])
    finally:
        backend.destroy(handle)
        daemon_at(Address(host=other)).api.close()
