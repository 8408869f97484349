"""The configuration from code and from the environment."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifixer_exec import AppConfig, InvalidRequestError
from cifixer_exec.settings import VARIABLES

NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,10}", fullmatch=True)
VALUE = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
SECONDS = st.floats(0.01, 1e6)
SIZE = st.none() | st.integers(1, 1 << 45)
CONFIGS = st.builds(
    AppConfig,
    execution_backend=st.sampled_from(["local", "e2b"]),
    dispatch=st.sampled_from(["queue", "direct"]),
    redis_url=st.sampled_from(["redis://h:1/2", "rediss://:pw@h", "unix:///run/r.sock"]),
    namespace=NAME,
    env=st.dictionaries(NAME, VALUE, max_size=3),
    image=st.none() | NAME,
    cpus=st.none() | st.floats(0.1, 64),
    memory_bytes=SIZE,
    disk_bytes=SIZE,
    max_processes=st.none() | st.integers(1, 10_000),
    network=st.none() | st.sampled_from(["none", "host"]),
    readonly_paths=st.lists(st.sampled_from(["/a", "/b c"]), max_size=2).map(tuple),
    lifetime_s=SECONDS,
    command_timeout_s=SECONDS,
    output_limit_bytes=st.integers(0, 1 << 40),
    worker_concurrency=st.integers(1, 1000),
    state_dir=st.sampled_from([Path("/x"), Path("/y z")]),
    unsafe_no_isolation=st.booleans(),
)


@given(CONFIGS)
def test_another_process_gets_the_same_configuration(config: AppConfig) -> None:
    assert AppConfig.from_env(config.to_env()) == config


@pytest.mark.parametrize("value", ["a\nb", "a\nB=c", "a\u2028b", "a\rb", "\n", "a\x85b"])
def test_an_env_value_with_line_breaks_survives_too(value: str) -> None:
    config = AppConfig(env={"A": value})
    assert AppConfig.from_env(config.to_env()) == config


def test_every_field_has_its_variable() -> None:
    assert {name for name, _ in VARIABLES.values()} == {f.name for f in fields(AppConfig)}


def test_an_empty_environment_gives_the_defaults() -> None:
    assert AppConfig.from_env({}) == AppConfig()


def test_an_empty_variable_is_no_variable() -> None:
    assert AppConfig.from_env(dict.fromkeys(VARIABLES, "")) == AppConfig()


def test_overrides_go_over_the_environment() -> None:
    assert AppConfig.from_env({"CIFIXER_NAMESPACE": "a"}, namespace="b").namespace == "b"


def test_with_gives_a_changed_copy() -> None:
    config = AppConfig()
    assert (config.with_(namespace="b").namespace, config.namespace) == ("b", "cifixer")


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("2K", 2048), ("2k", 2048), ("1.5M", 1572864), ("1MiB", 1048576), ("1 g", 1 << 30), ("1GB", 1 << 30)]
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    assert AppConfig.from_env({"CIFIXER_MEMORY": text}).memory_bytes == size


@pytest.mark.parametrize(("text", "flag"), [("1", True), ("YES", True), ("on", True), ("0", False), ("False", False)])
def test_flags_are_words(text: str, flag: bool) -> None:
    assert AppConfig.from_env({"CIFIXER_UNSAFE_NO_ISOLATION": text}).unsafe_no_isolation is flag


BAD = {
    "CIFIXER_MEMORY": "much",
    "CIFIXER_DISK": "5X",
    "CIFIXER_CPUS": "two",
    "CIFIXER_MAX_PROCESSES": "1.5",
    "CIFIXER_LIFETIME_S": "an hour",
    "CIFIXER_UNSAFE_NO_ISOLATION": "maybe",
    "CIFIXER_ENV": "no pair",
    "CIFIXER_WORKER_CONCURRENCY": "many",
    "CIFIXER_OUTPUT_LIMIT": "-",
}


@pytest.mark.parametrize(("variable", "text"), BAD.items())
def test_a_variable_that_cannot_be_read_is_named_with_its_value(variable: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{variable}={text!r}"):
        AppConfig.from_env({variable: text})


WRONG: list[dict[str, Any]] = [
    {"dispatch": "pigeon"},
    {"redis_url": "http://x"},
    {"namespace": ""},
    {"namespace": "a*"},
    {"namespace": "a b"},
    {"lifetime_s": 0},
    {"lifetime_s": None},
    {"command_timeout_s": -1},
    {"lease_s": "6"},
    {"drain_s": True},
    {"env": {"A": 1}},
    {"start_timeout_s": float("nan")},
]


@pytest.mark.parametrize("values", WRONG, ids=repr)
def test_a_value_that_cannot_work_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(values))):
        AppConfig(**values)


def test_a_password_in_a_redis_url_is_never_shown() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        AppConfig(redis_url="http://:hunter2@h")
    assert "hunter2" not in str(caught.value)


def test_the_state_directory_is_absolute() -> None:
    assert AppConfig(state_dir=Path("here")).state_dir == Path.cwd() / "here"
