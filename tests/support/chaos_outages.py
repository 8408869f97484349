"""A platform that is away: how soon that is told, and that whoever uses it finds out when it is back."""

from __future__ import annotations

import time

import pytest

from cifixer_exec import AppConfig, ExecutorError, SandboxEnvironment
from cifixer_exec.cli.doctor import Finding, examine
from cifixer_exec.cli.reach import Reach
from tests.support.contract_probes import wait_until

#: Until whoever waits has noticed that the platform is back, and what came of its sandboxes.
NOTICED_S = 20.0
#: A new op may not wait for a platform that is away.
FAST_S = 10.0
#: A running one waits until its own deadline, and a grace behind it.
DEADLINE_S = 3.0
GRACE_S = 30.0


def check_doctor_tells(config: AppConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the worker has renewed its lease, with which it tells the state of its breaker."""
    monkeypatch.setenv("CIFIXER_NAMESPACE", config.namespace)

    def worker() -> Finding:
        return next(found for found in examine(Reach(redis_url=config.redis_url)) if found.name == "worker")

    wait_until(lambda: not worker().ok, "doctor finds the worker's breaker open")
    assert "breaker open" in worker().summary or "breaker half_open" in worker().summary


def eventually_works(sandbox: SandboxEnvironment, give_up: float) -> None:
    """The breaker closes by itself; until then it says so."""
    while True:
        try:
            assert sandbox.run_command("echo on").stdout == b"on\n"
            return
        except ExecutorError:
            if time.monotonic() > give_up:
                raise
        time.sleep(0.2)
