"""A real worker and a real beat, looked at over HTTP as Prometheus and a container's health check do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from cifixer_exec import AppConfig
from cifixer_exec.backends.registry import make_backend
from tests.support.chaos_stack import Crew, handle_of, send_reap
from tests.support.contract_probes import wait_until
from tests.support.contract_stack import WorkerProcess, check_present
from tests.support.redis_proxy import RedisProxy
from tests.support.redis_server import RedisServer, free_port, redis_server

LEASE_S = 2.0
Series = tuple[str, frozenset[tuple[str, str]]]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as started:
        yield started


@pytest.fixture
def config(server: RedisServer, namespace: str, tmp_path: Path) -> AppConfig:
    made = AppConfig(
        redis_url=server.url,
        namespace=namespace,
        state_dir=tmp_path / "state",
        lease_s=LEASE_S,
        drain_s=1.0,
        worker_concurrency=8,
        creation_grace_s=0.5,
        reap_interval_s=0.5,
        metrics_address=f"127.0.0.1:{free_port()}",
    )
    check_present("local", made)
    return made


@pytest.fixture
def start(config: AppConfig, tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(config, tmp_path)
    yield crew
    crew.end()


def scrape(address: str) -> Mapping[Series, float]:
    answer = requests.get(f"http://{address}/metrics", timeout=5)
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(found: Mapping[Series, float], name: str, **labels: str) -> float:
    """0 for a series that is not there: what has not happened has none."""
    return found.get((f"cifixer_{name}", frozenset(labels.items())), 0.0)


def health(address: str) -> tuple[int, str]:
    answer = requests.get(f"http://{address}/healthz", timeout=5)
    return answer.status_code, answer.text.strip()


def cli(*arguments: str, **variables: str) -> tuple[int, str]:
    """The exit code of a cifixer-exec command and all it said."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")} | variables
    command = [sys.executable, "-c", "from cifixer_exec.cli import main; main()", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, (done.stdout + done.stderr).strip()


def test_a_scrape_counts_what_the_worker_did(start: Crew, config: AppConfig) -> None:
    start()
    before = scrape(config.metrics_address)
    assert value(before, "ops_total", kind="start", outcome="exited") == 0
    assert value(before, "lease_valid") == 1
    sandbox = start.sandbox()
    for _ in range(3):
        sandbox.run_command("exit 3")
    assert sandbox.run_command("sleep 60", timeout_s=0.3).status == "timed_out"
    sandbox.run_batch(["true", "kill -9 $$", "true"])
    sandbox.write_file("a", b"a")
    found = scrape(config.metrics_address)
    assert value(found, "ops_total", kind="start", outcome="exited") == 3
    assert value(found, "ops_total", kind="start", outcome="timed_out") == 1
    assert value(found, "ops_total", kind="start", outcome="signaled") == 1  # a batch counts once, as it ended
    assert value(found, "ops_total", kind="create", outcome="done") == 1
    assert value(found, "ops_total", kind="write", outcome="done") == 1
    assert value(found, "op_duration_seconds_count", kind="start") == 5
    assert 0.3 < value(found, "op_duration_seconds_sum", kind="start") < 30
    assert value(found, "sandboxes_owned") == 1
    assert value(found, "redis_reachable") == 1
    assert value(found, "backend_breaker_state", state="closed") == 1
    assert value(found, "queue_messages", queue="sandbox.local") == 0
    sandbox.teardown()
    after = scrape(config.metrics_address)
    assert value(after, "sandboxes_owned") == 0
    assert value(after, "ops_total", kind="destroy", outcome="done") == 1


def test_an_op_that_fails_counts_as_failed(start: Crew, config: AppConfig) -> None:
    start()
    sandbox = start.sandbox()
    assert not sandbox.exists("nowhere")
    with pytest.raises(Exception, match="nowhere"):
        sandbox.read_file("nowhere")
    assert value(scrape(config.metrics_address), "ops_total", kind="read", outcome="failed") == 1


def test_no_series_names_a_sandbox_an_op_or_a_boot(start: Crew, config: AppConfig) -> None:
    worker = start()
    sandbox = start.sandbox()
    result = sandbox.run_command("true")
    text = requests.get(f"http://{config.metrics_address}/metrics", timeout=5).text
    for name in (sandbox.sandbox_id, result.op_id, start.name_of(worker)):
        assert name not in text
    assert 'queue="direct"' in text


def test_adoptions_and_a_running_command_are_seen_on_the_adopter(start: Crew, config: AppConfig) -> None:
    first = start()
    sandbox = start.sandbox()
    command = sandbox.start_command("sleep 30")
    wait_until(lambda: value(scrape(config.metrics_address), "ops_active") == 1, "the command runs")
    second = config.with_(metrics_address=f"127.0.0.1:{free_port()}").metrics_address
    start(metrics_address=second)
    first.process.kill()
    first.process.wait()
    wait_until(lambda: value(scrape(second), "adoptions_total") == 1, "the other worker takes it up", timeout_s=15)
    assert value(scrape(second), "ops_active") == 1
    command.kill()
    assert command.wait().status == "killed"
    assert value(scrape(second), "ops_total", kind="start", outcome="killed") == 1


def test_health_follows_the_lease_and_a_scrape_works_without_redis(
    start: Crew, config: AppConfig, server: RedisServer, tmp_path: Path
) -> None:
    proxy = RedisProxy(server.port)
    try:
        port = proxy.port()
        start(redis_url=proxy.url(port))
        address = config.metrics_address
        assert health(address) == (200, "ok")
        assert cli("healthy", CIFIXER_METRICS_ADDRESS=address) == (0, "ok")
        proxy.at_once(port.cut)
        wait_until(lambda: health(address)[0] == 503, "the worker notices", timeout_s=15)
        assert health(address)[1].startswith("this worker holds no valid lease: Redis does not answer")
        code, said = cli("healthy", "--address", address.replace("127.0.0.1", "0.0.0.0"))
        assert (code, said) == (1, health(address)[1])
        found = scrape(address)
        assert (value(found, "lease_valid"), value(found, "redis_reachable")) == (0, 0)
        assert not [name for name, _ in found if name == "cifixer_queue_messages"]
        assert value(found, "event_loop_responsive") == 1
        proxy.at_once(port.mend)
        wait_until(lambda: health(address) == (200, "ok"), "the worker is back", timeout_s=30)
    finally:
        start.end()
        proxy.close()


def test_a_worker_that_still_waits_for_redis_says_so(config: AppConfig, start: Crew, server: RedisServer, tmp_path: Path) -> None:
    server.stop()
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    worker = WorkerProcess(config, lonely)
    try:
        wait_until(
            lambda: cli("healthy", CIFIXER_METRICS_ADDRESS=config.metrics_address)[1].startswith("this worker holds no"), "it listens"
        )
    finally:
        worker.process.kill()
        worker.process.wait()


def test_a_port_that_is_taken_is_one_clear_line_and_the_end(start: Crew, config: AppConfig, tmp_path: Path) -> None:
    start()
    second = tmp_path / "second"
    second.mkdir()
    worker = WorkerProcess(config, second)
    assert worker.process.wait(30) == os.EX_CONFIG
    told = [line for line in worker.log().splitlines() if "CRITICAL" in line]
    assert len(told) == 1
    assert f"{config.metrics_address} cannot be listened on (Address already in use)" in told[0]
    assert "Traceback" not in worker.log()


def test_without_the_extra_there_is_one_clear_line_with_the_remedy(config: AppConfig, tmp_path: Path) -> None:
    """The package is hidden from the worker by one of the same name that is none."""
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "prometheus_client.py").write_text("raise ModuleNotFoundError('hidden', name='prometheus_client')\n")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")} | config.to_env()
    environ["PYTHONPATH"] = f"{tmp_path / 'hiding'}:{environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "celery", "-A", "cifixer_exec.tasks", "worker", "--without-gossip", "--without-mingle"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == os.EX_CONFIG
    assert "pip install 'cifixer-exec[metrics]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_drained_worker_ends_with_its_listener(start: Crew, config: AppConfig) -> None:
    worker = start()
    start.sandbox()
    assert worker.stop() == 0
    code, said = cli("healthy", CIFIXER_METRICS_ADDRESS=config.metrics_address)
    assert code == 1
    assert said.startswith(f"nobody answers at {config.metrics_address}: ")


def test_beat_is_healthy_while_what_it_sends_arrives(config: AppConfig, server: RedisServer, tmp_path: Path) -> None:
    config = config.with_(reap_interval_s=2.0)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")} | config.to_env()
    command = [sys.executable, "-m", "celery", "-A", "cifixer_exec.tasks", "beat"]
    with (tmp_path / "beat.log").open("wb") as log:
        beat = subprocess.Popen(command, env=environ, stdout=log, stderr=log, cwd=tmp_path)
    address = config.metrics_address
    try:
        wait_until(lambda: cli("healthy", CIFIXER_METRICS_ADDRESS=address) == (0, "ok"), "beat listens")
        wait_until(lambda: value(scrape(address), "beat_sent_total") >= 2, "beat has sent something")
        assert value(scrape(address), "beat_last_sent_timestamp_seconds") > 0
        server.stop()
        wait_until(lambda: health(address)[0] == 503, "beat cannot send any more", timeout_s=15)
        assert health(address)[1].startswith("beat has sent nothing for ")
        assert beat.poll() is None
    finally:
        beat.kill()
        beat.wait()


def test_the_reaper_tells_why_it_removed_something(start: Crew, config: AppConfig) -> None:
    start()
    sandbox = start.sandbox()
    make_backend(config).destroy(handle_of(config, sandbox.sandbox_id))  # behind everyone's back
    send_reap(config)
    wait_until(lambda: value(scrape(config.metrics_address), "reaped_total", reason="gone") == 1, "the entry is closed")
    assert value(scrape(config.metrics_address), "reaped_total", reason="expired") == 0


def test_without_an_address_a_health_check_says_what_to_set() -> None:
    code, said = cli("healthy")
    assert code == 2
    assert "CIFIXER_METRICS_ADDRESS" in said
