"""The end of a stand-in: nothing of it is left, however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.support.contract_stack import absent
from tests.support.e2b.stand_in import Service, StandIn
from tests.support.kubernetes.waiting import until
from tests.support.own_process import NotHereError, remove_groups

_SCRIPT = """
import sys, time
from e2b import Sandbox
from tests.support.e2b.stand_in import StandIn
own = StandIn()
service = own.start()
made = Sandbox.create("base", timeout=60, **service.connection)
made.commands.run(f"sleep 60; echo word-{sys.argv[1]}", background=True)
print(own.pid, service.directory, flush=True)
time.sleep(60)
"""


def running(word: str) -> list[str]:
    """Processes of this machine with that word in their command line."""
    found = [path for path in Path("/proc").iterdir() if path.name.isdigit() and path.name != str(os.getpid())]
    return [path.name for path in found if _has(path, word)]


def _has(path: Path, word: str) -> bool:
    try:
        return word.encode() in (path / "cmdline").read_bytes()
    except OSError:
        return False


class TestEnd:
    def test_nothing_is_left_when_it_is_closed(self, e2b: Any) -> None:
        word = f"word-{uuid4().hex}"
        own = StandIn()
        try:
            service = own.start()
        except NotHereError as error:
            absent("e2b", str(error))
        try:
            made = e2b.Sandbox.create("base", timeout=60, **service.connection)
            made.commands.run(f"sleep 60; echo {word}", background=True)
            assert running(word)
            left = service.left()
        finally:
            own.close()
        assert [bool(left[key]) for key in ("sandboxes", "processes", "mounts")] == [True] * 3
        assert bool(left["groups"]) == service.limited
        assert running(word) == []
        assert not service.directory.exists()
        assert [group for group in left["groups"] if Path(group).exists()] == []

    @pytest.mark.parametrize("victim", ["starter", "server"])
    def test_nothing_runs_on_when_its_starter_or_itself_is_killed(self, running_here: None, victim: str) -> None:
        word = uuid4().hex
        command = [sys.executable, "-c", _SCRIPT, word]
        starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert starter.stdout is not None
        with starter, starter.stdout:
            server, directory = starter.stdout.readline().split()
            groups = Service.at(Path(directory)).left()["groups"]
            assert running(f"echo word-{word}")
            os.kill(starter.pid if victim == "starter" else int(server), signal.SIGKILL)
            until(lambda: running(f"echo word-{word}") == [])
            if victim == "starter":
                until(lambda: not Path(directory).exists())
                assert [group for group in groups if Path(group).exists()] == []
            starter.kill()
        remove_groups(f"stand-in-{Path(directory).name}")
        shutil.rmtree(directory, ignore_errors=True)

    @pytest.fixture
    def running_here(self, e2b: Any) -> None:
        try:
            with StandIn():
                pass
        except NotHereError as error:
            absent("e2b", str(error))
