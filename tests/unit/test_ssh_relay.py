"""The relay to a daemon behind SSH, with another program in ssh's place."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cifixer_exec.backends.docker_local import ssh
from tests.support.contract_probes import wait_until


def said_over(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(10)
        end.connect(path)
        return end.recv(100)


def test_a_failure_that_passes_by_does_not_end_the_relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_PAUSE_S", 0.01)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program, away = tmp_path / "ssh", tmp_path / "away"
    program.write_text("#!/bin/sh\necho here\n")
    program.chmod(0o755)
    relay = ssh.SshRelay("far", None)
    try:
        monkeypatch.setenv("PATH", str(away))
        assert said_over(relay.path) == b""
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert said_over(relay.path) == b"here\n"
        wait_until(lambda: bool(relay._started), "the program written down")  # its program may have spoken before it was written down
        relay._started[-1].wait(10)
    finally:
        relay.close()
