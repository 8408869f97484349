"""The explicit way without a sandbox: what it says of itself, that it works, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cifixer_exec import AppConfig, InvalidRequestError, create_sandbox
from cifixer_exec.backends.registry import make_backend


@pytest.fixture
def config(tmp_path: Path) -> AppConfig:
    return AppConfig(dispatch="direct", state_dir=tmp_path, unsafe_no_isolation=True)


def test_the_probe_says_loudly_that_there_is_no_isolation(config: AppConfig) -> None:
    assert "NO ISOLATION" in make_backend(config).probe().summary


def test_commands_files_and_time_outs_work_and_nothing_is_left(config: AppConfig, tmp_path: Path) -> None:
    with create_sandbox(config) as sandbox:
        sandbox.write_file("f", "here")
        assert sandbox.run_command("cat f; sleep 876543 & exit 5").exit_code == 5
        assert sandbox.run_command("sleep 876543", timeout_s=0.5).status == "timed_out"
    assert list(tmp_path.rglob("sandboxes/*")) == []
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert [c for c in commands if b"876543" in c] == []


@pytest.mark.parametrize("limit", [{"disk_bytes": 1 << 20}, {"network": "none"}, {"readonly_paths": ("/usr",)}])
def test_what_it_cannot_enforce_is_refused(config: AppConfig, limit: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(limit))), create_sandbox(config, **limit):
        pass
