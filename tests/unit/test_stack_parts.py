"""What the parts of a stack are started with, how `up` is found, and what is looked for at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifixer_exec.settings import AppConfig
from cifixer_exec.stack import parts
from cifixer_exec.stack.leftovers import Leftovers, find_directories, find_processes
from cifixer_exec.stack.running import announce, find_running, withdraw


def test_children_get_our_settings_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {"BROKER_URL": "redis://other", "CELERY_LOADER": "x", "FLOWER_PORT": "1", "CIFIXER_NAMESPACE": "other", "KEPT": "yes"}
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)

    environment = parts.child_environment(AppConfig(redis_url="unix:///x"), CIFIXER_STACK="s")

    assert {name: environment.get(name) for name in foreign} == {**dict.fromkeys(foreign), "KEPT": "yes"}
    assert (environment["CIFIXER_REDIS_URL"], environment["CIFIXER_STACK"]) == ("unix:///x", "s")


def test_flowers_secrets_are_not_in_its_command_line() -> None:
    flower = parts.flower(5555, "secret-word", "secret-cookie")

    assert "secret" not in " ".join(flower.command)
    assert "--read_only=True" in flower.command
    assert "--address=127.0.0.1" in flower.command
    assert flower.variables["FLOWER_BASIC_AUTH"] == "cifixer:secret-word"


def test_redis_listens_on_no_port(tmp_path: Path) -> None:
    command = parts.redis(Path("/bin/redis"), tmp_path).command

    assert command[command.index("--port") + 1] == "0"
    assert command[command.index("--unixsocketperm") + 1] == "700"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_redis_from_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    valkey = tmp_path / "valkey-server"
    valkey.write_text("#!/bin/sh\n")
    valkey.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert parts.find_redis() == valkey


def test_python_directories_are_not_below_usr() -> None:
    assert all(os.path.isdir(p) and not p.startswith("/usr/") for p in parts.python_directories())


def test_a_running_stack_is_found_until_it_is_withdrawn(tmp_path: Path) -> None:
    state = tmp_path / "state"
    config = AppConfig(redis_url="unix:///x", readonly_paths=("/a", "/b"), state_dir=tmp_path / "s")
    assert find_running(state) is None

    announce(config, state)

    found = find_running(state)
    assert found is not None
    assert (found.redis_url, found.readonly_paths, found.pid) == ("unix:///x", ("/a", "/b"), os.getpid())
    assert (state / "up.json").stat().st_mode & 0o777 == 0o600
    withdraw(state)
    assert not state.exists()


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"start_time": 1}])
def test_a_stack_whose_program_is_gone_is_forgotten(tmp_path: Path, change: dict[str, int]) -> None:
    announce(AppConfig(), tmp_path)
    file = tmp_path / "up.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))

    assert find_running(tmp_path) is None
    assert not file.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"readonly_paths": 1}', "\0"])
def test_a_broken_file_is_no_stack(tmp_path: Path, content: str) -> None:
    (tmp_path / "up.json").write_text(content)
    assert find_running(tmp_path) is None


def test_leftovers_are_found_by_environment_and_directory(tmp_path: Path) -> None:
    directory = tmp_path / "cifixer-test"
    directory.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, parts.STACK_VARIABLE: directory.name},
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        found = find_processes(directory)
        child.kill()

    assert found == (child.pid,)
    assert find_processes(directory) == ()
    assert find_directories(directory, ("sb-none",)) == (str(directory),)


def test_unknown_is_not_nothing() -> None:
    assert Leftovers(processes=(), directories=(), keys=0).nothing
    assert not Leftovers(processes=(), directories=(), keys=None).nothing
    assert not Leftovers(processes=(1,), directories=(), keys=0).nothing
    assert str(Leftovers(processes=(1,), directories=("/x",), keys=None)) == "1 processes, 1 directories, unknown Redis keys"
