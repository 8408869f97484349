"""The settings of the E2B backend, from code and from the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from cifixer_exec import AppConfig, InvalidRequestError
from cifixer_exec.backends.e2b import E2BBackend
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.settings import VARIABLES

KEY = "e2b_0123secret"
READ: dict[str, tuple[str, str, Any]] = {
    "CIFIXER_E2B_API_KEY": ("e2b_api_key", KEY, KEY),
    "CIFIXER_E2B_DOMAIN": ("e2b_domain", "e2b.example", "e2b.example"),
    "CIFIXER_E2B_API_URL": ("e2b_api_url", "https://api.example", "https://api.example"),
    "CIFIXER_E2B_SANDBOX_URL": ("e2b_sandbox_url", "http://boxes.example", "http://boxes.example"),
    "CIFIXER_E2B_ACCOUNT": ("e2b_account", "ci.team-1", "ci.team-1"),
    "CIFIXER_E2B_TEMPLATE": ("e2b_template", "team/python:3", "team/python:3"),
    "CIFIXER_E2B_USER": ("e2b_user", "root", "root"),
    "CIFIXER_E2B_ALLOW_OUT": ("e2b_allow_out", "packages.example 10.0.0.0/8", ("packages.example", "10.0.0.0/8")),
    "CIFIXER_E2B_DENY_OUT": ("e2b_deny_out", "1.1.1.1", ("1.1.1.1",)),
    "CIFIXER_E2B_CREATES_PER_S": ("e2b_creates_per_s", "5", 5.0),
}
THE_SDKS = {"E2B_API_KEY": "e2b_api_key", "E2B_DOMAIN": "e2b_domain", "E2B_API_URL": "e2b_api_url", "E2B_SANDBOX_URL": "e2b_sandbox_url"}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("E2B_", "CIFIXER_E2B_"))]:
        monkeypatch.delenv(name)


def test_this_table_is_whole() -> None:
    assert set(READ) == {variable for variable in VARIABLES if variable.startswith("CIFIXER_E2B_")}


@pytest.mark.parametrize("variable", READ)
def test_each_is_read_and_given_to_other_processes(variable: str) -> None:
    name, text, value = READ[variable]
    config = AppConfig.from_env({variable: text})
    assert getattr(config, name) == value
    assert getattr(AppConfig(), name) != value
    assert AppConfig.from_env(config.to_env()) == config


@pytest.mark.parametrize("variable", THE_SDKS)
def test_the_sdks_own_variables_hold_where_ours_do_not(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = THE_SDKS[variable]
    monkeypatch.setenv(variable, "https://sdk.example")
    assert getattr(AppConfig(), name) == "https://sdk.example"
    assert getattr(AppConfig.from_env({f"CIFIXER_{variable}": "https://ours.example"}), name) == "https://ours.example"


BAD: dict[str, tuple[dict[str, str], str]] = {
    "no number": ({"CIFIXER_E2B_CREATES_PER_S": "many"}, "CIFIXER_E2B_CREATES_PER_S='many'"),
    "none a second": ({"CIFIXER_E2B_CREATES_PER_S": "0"}, "e2b_creates_per_s=0.0 .*give more than 0"),
    "less than none": ({"CIFIXER_E2B_CREATES_PER_S": "-1"}, "e2b_creates_per_s=-1.0"),
    "not a number at all": ({"CIFIXER_E2B_CREATES_PER_S": "nan"}, "e2b_creates_per_s=nan"),
    "without end": ({"CIFIXER_E2B_CREATES_PER_S": "inf"}, "e2b_creates_per_s=inf"),
    "an account with a space": ({"CIFIXER_E2B_ACCOUNT": "a b"}, "e2b_account='a b'"),
    "an account with a slash": ({"CIFIXER_E2B_ACCOUNT": "a/b"}, "e2b_account='a/b'"),
    "an account with a line": ({"CIFIXER_E2B_ACCOUNT": "a\n"}, "e2b_account="),
    "a long account": ({"CIFIXER_E2B_ACCOUNT": "a" * 64}, "up to 63"),
    "an address without a scheme": ({"CIFIXER_E2B_API_URL": "api.example"}, "e2b_api_url='api.example' is not a URL"),
    "another scheme": ({"CIFIXER_E2B_SANDBOX_URL": "ftp://x"}, "e2b_sandbox_url='ftp://x' is not a URL"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_work_is_refused_by_its_name(what: str) -> None:
    environ, said = BAD[what]
    with pytest.raises(InvalidRequestError, match=said):
        AppConfig.from_env(environ)


def test_the_key_is_shown_nowhere() -> None:
    config = AppConfig(execution_backend="e2b", e2b_api_key=KEY)
    backend = make_backend(config)
    assert isinstance(backend, E2BBackend)
    shown = [repr(config), repr(backend._access), str(backend._access), repr(backend._account.where), backend.placement]
    shown.append(backend._account.fingerprint)
    assert not any("0123" in text for text in shown)


def test_a_key_that_cannot_be_one_is_not_shown_by_its_refusal() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        AppConfig.from_env({"CIFIXER_E2B_API_KEY": KEY, "CIFIXER_E2B_CREATES_PER_S": "0"})
    assert "0123" not in str(caught.value)


PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "of the cloud": ({}, "e2b.app"),
    "of a domain": ({"e2b_domain": "e2b.example"}, "e2b.example"),
    "of an address": ({"e2b_api_url": "http://api.example:3000/x"}, "api.example"),
    "of an address rather than a domain": ({"e2b_api_url": "http://api.example", "e2b_domain": "e2b.example"}, "api.example"),
    "of a name": ({"e2b_account": "mine", "e2b_domain": "e2b.example"}, "mine"),
}


@pytest.mark.parametrize("what", PLACES)
def test_the_placement_is(what: str) -> None:
    settings, placement = PLACES[what]
    assert make_backend(AppConfig(execution_backend="e2b", e2b_api_key=KEY, **settings)).placement == placement


def test_two_keys_have_two_fingerprints_and_none_tells_its_key() -> None:
    prints = {make_backend(AppConfig(execution_backend="e2b", e2b_api_key=k))._account.fingerprint for k in ("a", "b", "a")}  # type: ignore[attr-defined]
    assert len(prints) == 2


WITHOUT = """
import sys
sys.modules["e2b"] = None
from cifixer_exec import AppConfig, errors
from cifixer_exec.backends.registry import make_backend
try:
    make_backend(AppConfig(execution_backend="e2b", e2b_api_key="k"))
except errors.BackendUnavailableError as error:
    print(error, "|", error.code)
"""


def test_without_the_extra_the_line_that_installs_it_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60, check=False)
    said, _, mend = done.stdout.partition("|")
    assert "backend 'e2b' needs the package 'e2b'" in said, done.stderr
    assert "pip install 'cifixer-exec[e2b]'" in said
    assert "pip install 'cifixer-exec[e2b]'" in mend
