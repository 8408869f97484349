"""The end of a stand-in: nothing of it is left, however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.kubernetes.samples import ACCOUNT, pod_spec
from tests.support.kubernetes.stand_in import OwnStandIn
from tests.support.kubernetes.starting import NS, started
from tests.support.own_process import remove_groups


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
    def test_nothing_is_left_when_it_is_closed(self) -> None:
        word = f"word-{uuid4().hex}"
        with OwnStandIn() as cluster:
            cluster.namespace(NS, accounts=(ACCOUNT,))
            started(cluster, "one", pod_spec(["sh", "-c", f"sleep 60; echo {word}"]))
            assert running(word)
            left = cluster.order("left")
        assert [bool(left[key]) for key in ("jobs", "pods", "processes", "mounts")] == [True] * 4
        assert running(word) == []
        assert not cluster.directory.exists()
        assert [group for group in left["groups"] if Path(group).exists()] == []

    @pytest.mark.parametrize("victim", ["starter", "server"])
    def test_nothing_runs_on_when_its_starter_or_itself_is_killed(self, victim: str) -> None:
        word = f"word-{uuid4().hex}"
        script = (
            "import sys, time; from tests.integration.kubernetes_stand_in.test_end import *\n"
            "own = OwnStandIn(); cluster = own.start(); cluster.namespace(NS, accounts=(ACCOUNT,))\n"
            "started(cluster, 'one', pod_spec(['sh', '-c', f'sleep 60; echo word-' + sys.argv[1]]))\n"
            "print(own.pid, cluster.directory, flush=True); time.sleep(60)\n"
        )
        command = [sys.executable, "-c", script, word.removeprefix("word-")]
        starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert starter.stdout is not None
        with starter, starter.stdout:
            server, directory = starter.stdout.readline().split()
            assert running(word)
            os.kill(starter.pid if victim == "starter" else int(server), signal.SIGKILL)
            give_up = time.monotonic() + 10
            while running(word) or (victim == "starter" and Path(directory).exists()):
                assert time.monotonic() < give_up
                time.sleep(0.05)
            starter.kill()
        shutil.rmtree(directory, ignore_errors=True)
        remove_groups(f"stand-in-{Path(directory).name}")
