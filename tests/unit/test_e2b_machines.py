"""What is asked of E2B for a sandbox: names, keys, time, egress, and the script that starts the runner."""

from __future__ import annotations

import os
import pwd
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from e2b.retry import resolve_idempotency_key
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec.backends.e2b import machines
from cifixer_exec.backends.e2b.account import Access, Account
from cifixer_exec.backends.e2b.machines import E2BOptions, Machines, egress, lease_s
from cifixer_exec.backends.e2b.names import Names
from cifixer_exec.backends.pace import ProcessPace
from cifixer_exec.model import SandboxSpec


def spec_of(sandbox_id: str = "one", **members: Any) -> SandboxSpec:
    return SandboxSpec(**{"backend": "e2b", "sandbox_id": sandbox_id, **members})


ASKED: dict[str, Any] = {"template": "base", "timeout": 60, "metadata": {"a": "b", "c": "d"}}
IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", fullmatch=True)


class TestNames:
    @given(namespace=st.text(min_size=1), sandbox_id=IDS, dead=st.text())
    def test_a_key_is_one_that_the_service_takes(self, namespace: str, sandbox_id: str, dead: str) -> None:
        key = Names(namespace).key(sandbox_id, ASKED, dead)
        assert resolve_idempotency_key(key) == key

    def test_the_same_sandbox_has_the_same_key_in_every_process(self) -> None:
        """Also by another version of this package: workers are replaced one by one."""
        key = "003cd64e9eef15448f36ebc625c1be649b9a693092d93bb897aa5a23db626cc2"
        assert Names("n").key("one", ASKED, "") == key
        assert Names("n").key("one", dict(reversed(ASKED.items())), "") == key

    def test_another_sandbox_namespace_request_or_predecessor_has_another(self) -> None:
        keys = [
            Names("n").key("one", ASKED, ""),
            Names("n").key("two", ASKED, ""),
            Names("m").key("one", ASKED, ""),
            Names("n").key("one", ASKED, "idead"),
            Names("n").key("one", ASKED, "iother"),
            Names("n").key("one", {**ASKED, "timeout": 61}, ""),
            Names("none").key("x", ASKED, ""),
            Names("non").key("ex", ASKED, ""),
        ]
        assert len(set(keys)) == len(keys)

    def test_the_metadata_of_a_repeated_create_is_the_same_and_has_no_secret(self) -> None:
        spec = spec_of(labels={"b": "2", "a": "1"}, env={"TOKEN": "secret-57ad"})
        again = spec_of(labels={"a": "1", "b": "2"}, env={"TOKEN": "secret-57ad"})
        assert Names("n").metadata(spec) == Names("n").metadata(again)
        assert "secret-57ad" not in str(Names("n").metadata(spec))

    def test_what_is_ours_is_asked_for_and_looked_at_again(self) -> None:
        """A compatible server may not filter."""
        names, found = Names("n"), Names("n").metadata(spec_of(labels={"a": "b"}))
        assert names.query("one").items() <= found.items()
        assert names.has(found, "one")
        for other in ({}, {**found, "cifixer_app": "x"}, {**found, "cifixer_namespace": "m"}, {**found, "cifixer_sandbox_id": "two"}):
            assert not names.has(other, "one")

    def test_every_value_is_text(self) -> None:
        assert all(isinstance(value, str) for value in Names("n").metadata(spec_of(labels={"a": "b"})).values())


LEASES = [
    (1.0, 16),
    (60.0, 75),
    (60.2, 76),
    (3584.0, 3599),
    (3585.0, 3600),
    (3586.0, 3600),
    (3600.0, 3600),
    (3600.5, 3600),
    (3603, 3618),
    (86_400.0, 86_400),
]


@pytest.mark.parametrize(("lifetime_s", "wanted_s"), LEASES)
def test_a_machine_ends_behind_its_runner_and_within_what_plans_allow(lifetime_s: float, wanted_s: int) -> None:
    assert lease_s(lifetime_s) == wanted_s


@given(st.floats(0.01, 1e6))
def test_a_machine_never_ends_before_its_runner(lifetime_s: float) -> None:
    assert lifetime_s <= lease_s(lifetime_s) <= lifetime_s + 16


EGRESS: dict[str, tuple[str | None, E2BOptions, dict[str, Any]]] = {
    "none": ("none", E2BOptions(), {"allow_internet_access": False, "network": {"allow_public_traffic": False}}),
    "none whatever is allowed": (
        "none",
        E2BOptions(allow_out=("10.0.0.0/8",)),
        {"allow_internet_access": False, "network": {"allow_public_traffic": False}},
    ),
    "the internet": ("internet", E2BOptions(), {"allow_internet_access": True, "network": {"allow_public_traffic": False}}),
    "not said": (None, E2BOptions(), {"allow_internet_access": False, "network": {"allow_public_traffic": False}}),
    "some of it": (
        "internet",
        E2BOptions(allow_out=("packages.example", "1.1.1.1")),
        {
            "allow_internet_access": True,
            "network": {"allow_out": ["packages.example", "1.1.1.1"], "deny_out": ["0.0.0.0/0"], "allow_public_traffic": False},
        },
    ),
    "all but some": (
        "internet",
        E2BOptions(deny_out=("10.0.0.0/8",)),
        {"allow_internet_access": True, "network": {"deny_out": ["10.0.0.0/8"], "allow_public_traffic": False}},
    ),
    "both": (
        "internet",
        E2BOptions(allow_out=("a.example",), deny_out=("10.0.0.0/8",)),
        {
            "allow_internet_access": True,
            "network": {"allow_out": ["a.example"], "deny_out": ["10.0.0.0/8"], "allow_public_traffic": False},
        },
    ),
}


@pytest.mark.parametrize("what", EGRESS)
def test_what_is_let_out(what: str) -> None:
    network, options, wanted = EGRESS[what]
    assert egress(network, options) == wanted


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the script works, instead of in a machine."""
    place = tmp_path / "place"
    for name, path in (("DIRECTORY", place), ("RUNNER", place / "runner"), ("SPOOL", place / "spool")):
        monkeypatch.setattr(machines, name, str(path))
    return place


def run_script(user: str, directory: Path, *, upload: str = "", runner: str | None = "#!/bin/sh\nprintf '%s\\n' \"$@\"\nenv\n") -> Any:
    script = Machines(Account(Access(api_key="k")), Names("n"), E2BOptions(user=user), ProcessPace())._script(spec_of(), upload)
    directory.mkdir(exist_ok=True)
    if runner is not None:
        path = Path(upload) if upload else directory / "runner"
        path.write_text(runner)
        path.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "BASH_ENV": "/dev/null"}
    return subprocess.run(
        ["/bin/bash", "-c", script], cwd=directory.parent, env=environment, capture_output=True, text=True, timeout=30, check=False
    )


HOSTILE = [
    "'; touch pwned; '",
    '"; touch pwned; "',
    "$(touch pwned)",
    "`touch pwned`",
    "a b",
    "x\ntouch pwned\n",
    "",
    "no-such-user",
    "*",
    "&& touch pwned",
]


@pytest.mark.parametrize("user", HOSTILE)
def test_a_name_of_a_user_that_is_none_is_only_ever_a_name(directory: Path, user: str) -> None:
    done = run_script(user, directory)
    assert done.returncode == 67
    assert not (directory.parent / "pwned").exists()


def test_the_runner_is_started_for_the_user_with_its_home(directory: Path) -> None:
    done = run_script("nobody", directory)
    assert done.returncode == 0, done.stderr
    lines, nobody = done.stdout.splitlines(), pwd.getpwnam("nobody")
    who = f"{nobody.pw_uid}:{nobody.pw_gid}"
    assert lines[: lines.index("--socket")] == [
        "enclose",
        "--directory",
        str(directory),
        "--",
        "--user",
        who,
        "--allow-root",
        nobody.pw_dir,
    ]
    assert {f"HOME={nobody.pw_dir}", "USER=nobody", "LOGNAME=nobody", "CI=true", f"PATH={os.environ['PATH']}"} <= set(lines)
    assert not any(line.startswith(("BASH_ENV=", "SHLVL=1", "POSIXLY_CORRECT=")) for line in lines)
    assert re.search(r"--expires-in\n3600\.000", done.stdout)


def test_commands_are_not_roots(directory: Path) -> None:
    assert run_script("root", directory).returncode == 68


def test_a_runner_that_is_not_there_has_a_code_of_its_own(directory: Path) -> None:
    assert run_script("root", directory, runner=None).returncode == 66


def test_an_upload_is_put_in_its_place_and_can_be_run_by_all_and_read_by_none(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs a script that it may not read")
    upload = directory / "runner.abc"
    done = run_script("nobody", directory, upload=str(upload))
    assert done.returncode == 0, done.stderr
    assert not upload.exists()
    assert stat.S_IMODE((directory / "runner").stat().st_mode) == 0o111
    assert stat.S_IMODE(directory.stat().st_mode) == 0o711


def test_a_place_that_somebody_has_made_a_link_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    directory.symlink_to(tmp_path / "elsewhere")
    assert run_script("root", directory).returncode == 1
