"""The engine of ``make chaos`` for a minute: every kind of fault, and nothing lost, doubled, hung or left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifixer_exec import AppConfig
from tests.chaos.engine import run_chaos
from tests.chaos.plan import Options
from tests.chaos.report import Report
from tests.support.contract_stack import on_present_backend
from tests.support.kubernetes_cluster import is_real

_FEW = 8
#: What differs with containers is what a worker does with them; the rest has its minute on the other backend.
SECONDS = {"local": 50.0, "docker_local": 40.0, "kubernetes": 40.0, "e2b": 40.0}


@pytest.mark.timeout(400)
def test_a_minute_of_faults_loses_and_doubles_nothing(backend: str, tmp_path: Path) -> None:
    on_present_backend(backend, AppConfig(state_dir=tmp_path / "state"))
    report = run_chaos(Options(backend=backend, seed=7, kills=1000, seconds=SECONDS[backend]), keep=tmp_path / "logs")
    print(report.table())
    assert report.violations == []
    assert report.killed >= _FEW
    assert report.points.total() > 0
    assert report.terms > 0
    assert report.pauses.total() > 0
    assert report.cuts.total() >= _FEW
    assert report.bells.total() > 0
    assert report.redis_restarts > 0
    assert report.adoptions >= _FEW
    assert report.commands >= 5 * _FEW
    if backend == "docker_local":
        _check_containers(report)
    if backend == "kubernetes" and not is_real():
        _check_jobs(report)


def _check_jobs(report: Report) -> None:
    """The API server saw it all, by way of rights that the Role grants."""
    assert report.platform["delete jobs"] >= report.sandboxes > 0
    assert report.platform["create jobs"] > report.sandboxes / 2


def _check_containers(report: Report) -> None:
    """The daemon saw it all: what was made was destroyed, and channels were opened again and again."""
    assert report.platform["create"] == report.platform["destroy"] >= report.sandboxes > 0
    assert report.platform["exec_start"] > report.platform["create"]
