"""`make bench`: starts an embedded stack, measures, prints a table of ratios and writes bench/results/latest.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.docker_exec import docker_exec
from bench.measure import MIB, in_turn, peak_memory, rate, resident_bytes
from cifixer_exec import AppConfig, SandboxEnvironment, create_sandbox
from cifixer_exec.channel.portal import process_portal
from cifixer_exec.stack import EmbeddedStack
from cifixer_exec.wiring import make_journal

RESULTS = Path(__file__).resolve().parent / "results"
TRUE = ["/bin/true"]
Row = dict[str, Any]


def main() -> None:
    """Measure everything that was not left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sandboxes", type=int, default=200, help="how many live at once on one worker")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "latest.json")
    options = parser.parse_args()
    rows: list[Row] = []
    with EmbeddedStack(loglevel="WARNING") as stack:
        worker = worker_pid(stack.config)
        with noop_worker(stack.config) as noop, create_sandbox(stack.config) as sandbox, direct_sandbox(stack.config) as direct:
            rows += latency(noop, sandbox, direct, options.rounds)
            rows += throughput(noop, sandbox)
            rows += big_output(sandbox, worker)
            rows += big_file(sandbox, worker)
        rows += start(stack.config)
        rows += many(stack.config, worker, options.sandboxes)
    show(rows)
    options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    Console().print(f"written to {os.path.relpath(options.output)}")


def latency(noop: Any, sandbox: SandboxEnvironment, direct: SandboxEnvironment, rounds: int) -> list[Row]:
    """One `true` through Redis and a worker, against a no-op Celery task, direct use, and `docker exec`."""
    things: list[Callable[[], object]] = [
        lambda: noop.delay().get(timeout=30),
        lambda: sandbox.run_command(TRUE),
        lambda: direct.run_command(TRUE),
    ]
    with docker_exec() as executed:
        if not isinstance(executed, str):
            things.append(executed)
        task, queued, straight, *docker = in_turn(rounds, 25, *things)
    rows = [
        row("true through the queue / no-op Celery task, p50", queued.p50 / task.p50, "<= 2.5", f"{ms(queued.p50)} / {ms(task.p50)}"),
        row("the same, p95", queued.p95 / task.p95, "", f"{ms(queued.p95)} / {ms(task.p95)}"),
        row("true direct / through the queue, p50", straight.p50 / queued.p50, "", f"{ms(straight.p50)} / {ms(queued.p50)}"),
    ]
    if docker:
        detail = f"{ms(queued.p50)} / {ms(docker[0].p50)}"
        return [*rows, row("true through the queue / docker exec, p50", queued.p50 / docker[0].p50, "<= 0.10", detail)]
    return [*rows, row("true through the queue / docker exec, p50", None, "<= 0.10", str(executed))]


def throughput(noop: Any, sandbox: SandboxEnvironment) -> list[Row]:
    """Ops per second of one worker, from 16 clients' threads at once."""
    tasks, ops = rate(800, 16, lambda: noop.delay().get(timeout=60)), rate(800, 16, lambda: sandbox.run_command(TRUE))
    return [row("ops/s of one worker / no-op tasks/s", ops / tasks, ">= 0.7", f"{ops:.0f} / {tasks:.0f} per second")]


def big_output(sandbox: SandboxEnvironment, worker: int) -> list[Row]:
    """50 MiB of output: complete, and what it costs the worker."""
    idle = resident_bytes(worker)
    with peak_memory(worker) as peak:
        result = sandbox.run_command(f"head -c {50 * MIB} /dev/zero | tr '\\0' x", output_limit_bytes=64 * MIB, timeout_s=120)
    complete = result.stdout == b"x" * (50 * MIB) and not result.truncated
    return [
        row(
            "50 MiB of output complete", float(complete), "= 1", f"{result.stdout_bytes} bytes in {result.duration_s:.2f} s in the sandbox"
        ),
        row("worker memory over idle meanwhile, MiB", (peak() - idle) / MIB, "<= 64", f"idle {idle / MIB:.0f} MiB"),
    ]


def big_file(sandbox: SandboxEnvironment, worker: int) -> list[Row]:
    """100 MiB in and out through the queue."""
    data, idle = os.urandom(MIB) * 100, resident_bytes(worker)
    with peak_memory(worker) as peak:
        begun = time.perf_counter()
        sandbox.write_file("big", data)
        written = time.perf_counter()
        same = sandbox.read_file("big") == data
        read = time.perf_counter()
    sandbox.remove("big")
    detail = f"in {100 / (written - begun):.0f} MiB/s, out {100 / (read - written):.0f} MiB/s, {'same' if same else 'DIFFERENT'}"
    return [row("100 MiB file in and out: worker memory over idle, MiB", (peak() - idle) / MIB, "flat", detail)]


def start(config: AppConfig) -> list[Row]:
    """A sandbox from nothing to its first result, through the queue, against making and using it directly."""

    def first(chosen: AppConfig) -> None:
        with create_sandbox(chosen) as made:
            made.run_command(TRUE)

    queued, direct = in_turn(10, 1, lambda: first(config), lambda: first(config.with_(dispatch="direct")))
    return [
        row("create, first command, teardown: queue / direct, p50", queued.p50 / direct.p50, "", f"{ms(queued.p50)} / {ms(direct.p50)}")
    ]


def many(config: AppConfig, worker: int, count: int) -> list[Row]:
    """Many sandboxes alive at once on one worker, each of them used."""
    idle = resident_bytes(worker)
    made = [create_sandbox(config) for _ in range(count)]
    with ThreadPoolExecutor(16) as threads:
        begun = time.perf_counter()
        list(threads.map(lambda s: s.init(), made))
        ready = time.perf_counter()
        results = list(threads.map(lambda s: s.run_command("echo $((6*7))").stdout, made))
        used = time.perf_counter()
        memory = resident_bytes(worker)
        list(threads.map(lambda s: s.teardown(), made))
    right = sum(r == b"42\n" for r in results)
    detail = f"created in {ready - begun:.1f} s, all used in {used - ready:.2f} s, worker +{(memory - idle) / MIB:.0f} MiB"
    return [row("sandboxes alive at once on one worker, each with the right answer", float(right), f"= {count}", detail)]


@contextmanager
def noop_worker(config: AppConfig) -> Iterator[Any]:
    """The yardstick's own worker on the same Redis."""
    os.environ["BENCH_BROKER"] = config.redis_url.replace("unix://", "redis+socket://", 1)
    command = [sys.executable, "-m", "celery", "-A", "bench.noop", "worker", "--without-gossip", "--without-mingle", "-n", "noop@%h"]
    process = subprocess.Popen([*command, "--loglevel", "ERROR"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        from bench.noop import noop

        noop.delay().get(timeout=60)
        yield noop
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextmanager
def direct_sandbox(config: AppConfig) -> Iterator[SandboxEnvironment]:
    """One without the queue."""
    with create_sandbox(config.with_(dispatch="direct")) as sandbox:
        yield sandbox


def worker_pid(config: AppConfig) -> int:
    """Of the stack's only worker."""

    async def ask() -> int:
        journal = make_journal(config)
        try:
            return int((await journal.workers())[0].info["pid"])
        finally:
            await journal.redis.aclose()

    return process_portal().call(ask())


def row(what: str, value: float | None, target: str, detail: str) -> Row:
    """One line of the table."""
    return {"what": what, "value": None if value is None else round(value, 3), "target": target, "detail": detail}


def ms(seconds: float) -> str:
    """Milliseconds, for people."""
    return f"{seconds * 1000:.2f} ms"


def machine() -> dict[str, Any]:
    """Where this was measured."""
    return {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(), "machine": platform.machine()}


def show(rows: list[Row]) -> None:
    """As a table."""
    table = Table(title="cifixer-exec bench (ratios within this run)")
    for name in ("what", "value", "target", "detail"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for line in rows:
        table.add_row(line["what"], "not measured" if line["value"] is None else f"{line['value']:g}", line["target"], line["detail"])
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
