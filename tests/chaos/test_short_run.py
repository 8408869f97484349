"""The engine of ``make chaos`` for a minute: every kind of fault, and nothing lost, doubled, hung or left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifixer_exec import AppConfig
from tests.chaos.engine import run_chaos
from tests.chaos.plan import Options
from tests.support.contract_stack import check_present

_FEW = 8


@pytest.mark.timeout(400)
def test_a_minute_of_faults_loses_and_doubles_nothing(tmp_path: Path) -> None:
    check_present("local", AppConfig(state_dir=tmp_path / "state"))
    report = run_chaos(Options(seed=7, kills=1000, seconds=50.0), keep=tmp_path / "logs")
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
