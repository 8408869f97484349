"""The stack's file as the real docker-compose reads it, and its filter in front of the daemon against what the backend really asks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import docker
import pytest

from cifixer_exec import AppConfig, SandboxStartError, create_sandbox
from cifixer_exec.backends.registry import make_backend
from tests.support.contract_stack import check_daemon, required_backends
from tests.support.docker_daemon import docker_host, image_for_tests
from tests.support.docker_tcp import tcp_port_of
from tests.unit.test_compose import ROOT, SERVICES, read_yaml, required

#: In CIFIXER_TEST_REQUIRE: that there is no docker-compose is a failure then.
COMPOSE_TOOL = "compose"
GIVEN = dict.fromkeys(required(), "0")


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """The program: the docker command's own verb, or the older one that stands alone."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    said = "neither 'docker compose' nor docker-compose is installed (Debian: apt-get install docker-compose)"
    if COMPOSE_TOOL in required_backends():
        pytest.fail(said)
    pytest.skip(said)


def config(compose: list[str], directory: Path, given: Mapping[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """What ``config`` says of the file, with ``given`` as .env."""
    dotenv = directory / "env"
    dotenv.write_text("".join(f"{name}={value}\n" for name, value in given.items()))
    environ = {k: v for k, v in os.environ.items() if k not in GIVEN}
    command = [*compose, "-f", str(ROOT / "docker-compose.yml"), "--env-file", str(dotenv), *options, "config"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, cwd=directory, check=False)


def test_the_real_tool_accepts_the_file_and_sees_every_service(compose: list[str], tmp_path: Path) -> None:
    done = config(compose, tmp_path, GIVEN, "--profile", "monitoring")
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    read = tmp_path / "read.yml"
    read.write_text(done.stdout)
    assert set(read_yaml(read)["services"]) == set(SERVICES)


@pytest.mark.parametrize("missing", sorted(GIVEN))
def test_a_variable_that_is_not_given_is_an_error_that_names_it(compose: list[str], tmp_path: Path, missing: str) -> None:
    done = config(compose, tmp_path, {name: value for name, value in GIVEN.items() if name != missing})
    assert done.returncode != 0
    assert f"set {missing} in .env" in done.stderr


# ------------------------------------------------------------------------------------- the filter in front of the daemon


def allowed(method: str, path: str) -> bool:
    """As the filter decides: by method, the whole path has to match one of the expressions."""
    wanted = f"-allow{method}="
    patterns = [word.removeprefix(wanted) for word in SERVICES["docker-api"]["command"] if word.startswith(wanted)]
    return any(re.fullmatch(pattern, path) for pattern in patterns)


REFUSED = [
    ("POST", "/containers/a/attach"),
    ("POST", "/containers/a/kill"),
    ("POST", "/containers/a/update"),
    ("POST", "/v1.41/build"),
    ("POST", "/v1.41/swarm/init"),
    ("POST", "/v1.41/plugins/pull"),
    ("POST", "/v1.41/containers/create/../../build"),
    ("GET", "/v1.41/containers/a/export"),
    ("GET", "/v1.41/secrets"),
    ("DELETE", "/v1.41/networks/a"),
    ("DELETE", "/v1.41/images/redis:7"),
    ("PATCH", "/v1.41/containers/create"),
]


#: What the backend asks only where something is wrong, replaced or connected.
RARE = [
    ("GET", "/v1.41/events"),
    ("GET", "/v1.41/images/json"),
    ("GET", "/v1.41/networks/cifixer-bridge"),
    ("POST", "/v1.41/networks/create"),
    ("DELETE", f"/v1.41/images/sha256:{'0a' * 32}"),
]


@pytest.mark.parametrize(("method", "path"), RARE)
def test_the_filter_lets_the_rare_calls_pass_too(method: str, path: str) -> None:
    assert allowed(method, path)


@pytest.mark.parametrize(("method", "path"), REFUSED)
def test_the_filter_refuses_what_the_worker_has_no_use_for(method: str, path: str) -> None:
    assert not allowed(method, path)


def test_the_filter_lets_no_directory_of_the_host_be_mounted() -> None:
    below = [word.partition("=")[2] for word in SERVICES["docker-api"]["command"] if word.startswith("-allowbindmountfrom=")]
    assert len(below) == 1
    assert below[0].startswith("/")
    assert not Path("/", below[0].split("/")[1]).exists()


@pytest.fixture
def fresh_image() -> Iterator[str]:
    """An image that the daemon has prepared nothing for yet."""
    check_daemon("docker_local")
    client = docker.APIClient(base_url=docker_host(), version="auto")
    made = client.create_container(image_for_tests(docker_host()), command=["true"])
    name = f"cifixer-test-fresh:{uuid4().hex[:12]}"
    client.commit(made["Id"], repository=name.split(":", maxsplit=1)[0], tag=name.split(":")[1], conf={"Labels": {"fresh": name}})
    client.remove_container(made["Id"])
    yield name
    for image in client.images(filters={"label": f"cifixer.base={name}"}):
        client.remove_image(image["Id"], force=True)
    client.remove_image(name, force=True)
    client.close()


def test_the_filter_lets_pass_all_that_the_backend_asks(fresh_image: str, namespace: str) -> None:
    host = docker_host()
    assert host.startswith("unix://"), "the tests' daemon listens at a Unix socket"
    seen = bytearray()
    with tcp_port_of(host.removeprefix("unix://"), see=seen.extend) as port:
        config = AppConfig(
            execution_backend="docker_local",
            dispatch="direct",
            namespace=namespace,
            docker_host=f"tcp://127.0.0.1:{port}",
            docker_cert_path="",
            image=fresh_image,
        )
        use_everything(config)
    asked = {(m[1].decode(), unquote(m[2].decode())) for m in re.finditer(rb"\b([A-Z]{3,7}) (/[^ ?]*)(?:\?[^ ]*)? HTTP/1\.1\r\n", seen)}
    assert {method for method, _ in asked} >= {"GET", "POST", "PUT", "DELETE"}
    assert any(path.endswith("/commit") for _, path in asked), "the image was prepared through here"
    assert [(method, path) for method, path in sorted(asked) if not allowed(method, path)] == []


def use_everything(config: AppConfig) -> None:
    backend = make_backend(config)
    assert backend.probe().ok
    with create_sandbox(config) as sandbox:
        assert sandbox.run_command("echo here").text == "here\n"
        sandbox.write_file("a", b"a")
        sandbox.extend(600)
        found = list(backend.list_owned())
        assert [owned.handle.sandbox_id for owned in found] == [sandbox.sandbox_id]
        assert backend.inspect(found[0].handle).alive
        client: Any = docker.APIClient(base_url=docker_host(), version="auto")
        name = next(c["Id"] for c in client.containers(filters={"label": f"cifixer.sandbox_id={sandbox.sandbox_id}"}))
        client.kill(name)
        client.close()
        assert not backend.inspect(found[0].handle).alive
        backend.destroy(found[0].handle)
    with pytest.raises(SandboxStartError):  # the pull was asked for, and nobody is there
        create_sandbox(config.with_(image="127.0.0.1:1/nowhere:1")).init()
