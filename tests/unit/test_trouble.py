"""Why a sandbox did not start, and the line that mends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifixer_exec.backends.local import trouble
from cifixer_exec.backends.local.backend import LocalBackend
from cifixer_exec.backends.registry import find_bwrap
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.errors import BackendUnavailableError, InvalidRequestError

SWITCHES = {
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    "/proc/sys/user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=15000"),
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": ("1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
}
REFUSED = "bwrap: No permissions to create new namespace, likely because the kernel does not allow non-privileged user namespaces."


@pytest.mark.parametrize("path", SWITCHES)
def test_the_switch_that_forbids_namespaces_is_named_with_its_mend(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidding, command = SWITCHES[path]
    monkeypatch.setattr(trouble, "_content", lambda asked: forbidding if asked == path else "")
    assert path in trouble.remedy(REFUSED)
    assert command in trouble.remedy(REFUSED)


def test_a_container_that_forbids_namespaces_is_told_how_to_allow_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trouble, "_content", lambda asked: "")
    said = trouble.remedy("bwrap: setting up uid map: Permission denied")
    assert "--security-opt seccomp=unconfined" in said
    assert "WITHOUT a sandbox" in said


def test_what_is_not_known_gets_no_made_up_remedy() -> None:
    assert trouble.remedy("bwrap: Can't find source path /nowhere: No such file or directory") == ""


def test_a_probe_without_bubblewrap_says_what_to_install(tmp_path: Path) -> None:
    health = LocalBackend(root=tmp_path, runner=runner_path(), bwrap=None).probe()
    assert not health.ok
    assert "cifixer-exec[local]" in health.remedy


def test_a_probe_never_falls_back_to_no_isolation(tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    health = LocalBackend(root=tmp_path / "state", runner=runner_path(), bwrap=broken).probe()
    assert not health.ok
    assert "No permissions to create new namespace" in health.summary
    assert list((tmp_path / "state").glob("sandboxes/*")) == []


def test_a_configured_bubblewrap_that_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="nothing-here"):
        find_bwrap(str(tmp_path / "nothing-here"))


def test_a_machine_without_a_runner_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match="riscv64"):
        runner_path("riscv64")
