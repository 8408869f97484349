"""What is counted, how Prometheus is shown it, and the address it is shown at; without Celery and Redis."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cifixer_exec import AppConfig, InvalidRequestError, Status
from cifixer_exec.reaper import REASONS
from cifixer_exec.settings import host_and_port
from cifixer_exec.worker.exposure import Exposure
from cifixer_exec.worker.metrics import BREAKER_STATES, BeatWatch, WorkerCollector, WorkerSource, exposition
from cifixer_exec.worker.tally import BOUNDS_S, OTHER, OUTCOMES, Tally


def source(**changes: Any) -> WorkerSource:
    values: dict[str, Any] = {
        "tally": Tally(),
        "sandboxes": lambda: 3,
        "active": lambda: 2,
        "draining": lambda: False,
        "lease_valid": lambda: True,
        "responsive": lambda: True,
        "breaker_state": lambda: "closed",
        "queue_lengths": lambda: {"sandbox.local": 4, "direct": 0},
        "reap_reasons": REASONS,
        "version": "1.2.3",
        "backend": "local",
        "placement": "here",
    }
    return WorkerSource(**{**values, **changes})


def samples(text: bytes) -> Mapping[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def scraped(**changes: Any) -> Mapping[tuple[str, tuple[tuple[str, str], ...]], float]:
    return samples(exposition(WorkerCollector(source(**changes)))())


# ---------------------------------------------------------------------------------------------------------- the address

ADDRESSES = {"127.0.0.1:9808": ("127.0.0.1", 9808), "0.0.0.0:1": ("0.0.0.0", 1), "[::]:9808": ("::", 9808), "host.name:0": ("host.name", 0)}


@pytest.mark.parametrize(("text", "parsed"), ADDRESSES.items())
def test_an_address_is_a_host_and_a_port(text: str, parsed: tuple[str, int]) -> None:
    assert host_and_port(text) == parsed
    assert AppConfig.from_env({"CIFIXER_METRICS_ADDRESS": text}).metrics_address == text


@pytest.mark.parametrize(
    "text", ["9808", ":9808", "host:", "host:x", "host:65536", "host:-1", "::1:9808", "[]:1", "http://h:1", "h o:1", "a:²"]
)
def test_an_address_that_cannot_work_is_one_error_with_the_value_and_an_example(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        AppConfig.from_env({"CIFIXER_METRICS_ADDRESS": text})
    assert repr(text) in str(caught.value)
    assert "127.0.0.1:9808" in str(caught.value)


def test_without_an_address_nothing_is_shown() -> None:
    assert AppConfig.from_env({}).metrics_address == ""


# ------------------------------------------------------------------------------------------------------------ the tally


def test_ends_are_counted_by_kind_and_outcome() -> None:
    tally = Tally()
    for outcome in ("exited", "exited", "out_of_memory"):
        tally.ended("start", outcome, 0.1)
    tally.ended("read", "done", 0.1)
    assert tally.ends == {("start", "exited"): 2, ("start", "out_of_memory"): 1, ("read", "done"): 1}


def test_what_a_client_makes_up_makes_no_new_time_series() -> None:
    tally = Tally()
    for number in range(1000):
        tally.ended(f"kind{number}", f"outcome{number}", 0.0)
    assert tally.ends == {(OTHER, OTHER): 1000}
    assert list(tally.durations) == [OTHER]


def test_a_duration_lies_in_every_bucket_that_reaches_to_it() -> None:
    tally = Tally()
    for duration_s in (0.0, BOUNDS_S[0], 0.3, BOUNDS_S[-1] + 1):
        tally.ended("start", "exited", duration_s)
    found = tally.durations["start"]
    assert found.cumulative[0] == 2
    assert found.cumulative[BOUNDS_S.index(0.25)] == 2
    assert found.cumulative[BOUNDS_S.index(0.5)] == 3
    assert (found.cumulative[-1], found.count) == (3, 4)
    assert found.sum_s == pytest.approx(BOUNDS_S[0] + 0.3 + BOUNDS_S[-1] + 1)


def test_every_status_of_a_command_is_an_outcome_of_its_own() -> None:
    assert {"exited", "signaled", "timed_out", "killed", "out_of_memory", "sandbox_lost", "unknown", "done", "failed"} == OUTCOMES


# -------------------------------------------------------------------------------------------------- what is shown of it


def test_counts_are_shown_by_kind_and_outcome_with_their_durations() -> None:
    tally = Tally()
    tally.ended("start", "timed_out", 2.0)
    tally.adopted()
    tally.reaped("expired")
    shown = scraped(tally=tally)
    assert shown["cifixer_ops_total", (("kind", "start"), ("outcome", "timed_out"))] == 1
    assert shown["cifixer_op_duration_seconds_count", (("kind", "start"),)] == 1
    assert shown["cifixer_op_duration_seconds_sum", (("kind", "start"),)] == 2.0
    assert shown["cifixer_op_duration_seconds_bucket", (("kind", "start"), ("le", "1.0"))] == 0
    assert shown["cifixer_op_duration_seconds_bucket", (("kind", "start"), ("le", "2.5"))] == 1
    assert shown["cifixer_op_duration_seconds_bucket", (("kind", "start"), ("le", "+Inf"))] == 1
    assert shown["cifixer_adoptions_total", ()] == 1
    assert shown["cifixer_reaped_total", (("reason", "expired"),)] == 1


def test_what_an_alert_waits_for_is_there_before_it_happens() -> None:
    shown = scraped()
    for status in Status:
        assert shown["cifixer_ops_total", (("kind", "start"), ("outcome", status.value))] == 0
    assert {r: shown["cifixer_reaped_total", (("reason", r),)] for r in REASONS} == dict.fromkeys(REASONS, 0)


def test_the_state_of_the_worker_is_shown_as_it_is_at_the_scrape() -> None:
    shown = scraped(lease_valid=lambda: False, draining=lambda: True)
    assert {name: shown[f"cifixer_{name}", ()] for name in ("ops_active", "sandboxes_owned", "lease_valid", "draining")} == {
        "ops_active": 2,
        "sandboxes_owned": 3,
        "lease_valid": 0,
        "draining": 1,
    }
    labels = (("backend", "local"), ("placement", "here"), ("version", "1.2.3"))
    assert shown["cifixer_build_info", labels] == 1


def test_a_scrape_without_redis_leaves_out_only_the_queues() -> None:
    shown = scraped(queue_lengths=lambda: None)
    assert shown["cifixer_redis_reachable", ()] == 0
    assert not [name for name, _ in shown if name == "cifixer_queue_messages"]
    assert shown["cifixer_sandboxes_owned", ()] == 3
    assert scraped()["cifixer_queue_messages", (("queue", "sandbox.local"),)] == 4


@pytest.mark.parametrize("state", BREAKER_STATES)
def test_the_breaker_is_in_exactly_one_state(state: str) -> None:
    shown = scraped(breaker_state=lambda: state)
    assert {s: shown["cifixer_backend_breaker_state", (("state", s),)] for s in BREAKER_STATES} == {
        s: float(s == state) for s in BREAKER_STATES
    }


def test_nothing_of_prometheus_clients_global_registry_is_shown_and_nothing_of_ours_is_in_it() -> None:
    from prometheus_client import REGISTRY

    text = exposition(WorkerCollector(source()))()
    assert b"python_info" not in text
    assert b"process_resident_memory_bytes" in text
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("cifixer")]


def test_every_name_has_our_prefix_and_says_its_unit() -> None:
    for family in WorkerCollector(source()).collect():
        assert family.name.startswith("cifixer_"), family.name
        assert not family.name.endswith(("_ms", "_s", "_mb")), family.name


# ------------------------------------------------------------------------------------------------------------------ beat


def test_beat_is_well_until_it_has_missed_three_of_its_intervals() -> None:
    now = 100.0
    watch = BeatWatch(interval_s=30, clock=lambda: now, wall_clock=lambda: 5.0)
    now += 89
    assert watch.trouble() == ""
    now += 2
    assert "91 s" in watch.trouble()
    watch.sent()
    assert watch.trouble() == ""
    shown = samples(exposition(watch)())
    assert (shown["cifixer_beat_sent_total", ()], shown["cifixer_beat_last_sent_timestamp_seconds", ()]) == (1, 5.0)


# ------------------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def trouble() -> list[str]:
    """What is wrong; the last one counts."""
    return [""]


@pytest.fixture
def stuck() -> list[str]:
    """What only a restart would mend; the last one counts."""
    return [""]


@pytest.fixture
def exposure(trouble: list[str], stuck: list[str]) -> Iterator[Exposure]:
    made = Exposure("127.0.0.1", 0, metrics=lambda: b"a 1\n", trouble=lambda: trouble[-1], stuck=lambda: stuck[-1])
    yield made
    made.close()


def asked(exposure: Exposure, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", exposure.port, timeout=5)
    connection.request(method, path)
    answer = connection.getresponse()
    said = answer.read().decode()
    connection.close()
    return answer.status, said


def test_metrics_and_health_are_answered_and_nothing_else(exposure: Exposure, trouble: list[str]) -> None:
    assert asked(exposure, "/metrics") == (200, "a 1\n")
    assert asked(exposure, "/metrics?x=1") == (200, "a 1\n")
    assert asked(exposure, "/healthz") == (200, "ok\n")
    assert asked(exposure, "/healthz", "HEAD") == (200, "")
    trouble.append("it is stuck")
    assert asked(exposure, "/healthz") == (503, "it is stuck\n")
    assert asked(exposure, "/")[0] == 404
    assert asked(exposure, "/metrics", "POST")[0] == 501


def test_what_only_a_restart_would_mend_is_asked_apart(exposure: Exposure, trouble: list[str], stuck: list[str]) -> None:
    trouble.append("Redis is away")
    assert asked(exposure, "/livez") == (200, "ok\n")
    stuck.append("the loop stands still")
    assert asked(exposure, "/livez") == (503, "the loop stands still\n")


def test_a_client_that_says_nothing_keeps_no_other_waiting(exposure: Exposure) -> None:
    silent = [socket.create_connection(("127.0.0.1", exposure.port)) for _ in range(20)]
    assert asked(exposure, "/healthz") == (200, "ok\n")
    for connection in silent:
        connection.close()


def test_a_port_that_is_taken_is_one_clear_error(exposure: Exposure) -> None:
    with pytest.raises(InvalidRequestError, match=rf"127\.0\.0\.1:{exposure.port} cannot be listened on \(Address already in use\)"):
        Exposure("127.0.0.1", exposure.port, metrics=lambda: b"", trouble=lambda: "")


def test_a_host_that_is_not_ours_is_one_clear_error() -> None:
    with pytest.raises(InvalidRequestError, match="cannot be listened on"):
        Exposure("192.0.2.1", 0, metrics=lambda: b"", trouble=lambda: "")


def test_a_closed_exposure_listens_no_more() -> None:
    made = Exposure("127.0.0.1", 0, metrics=lambda: b"", trouble=lambda: "")
    made.close()
    with pytest.raises(ConnectionRefusedError):
        asked(made, "/healthz")
