"""The local backend: an embedded stack, and no-op Celery tasks on the same Redis as the yardstick."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from bench.measure import MIB, in_turn, peak_memory, rate, resident_bytes
from bench.rows import Row, ms, row
from cifixer_exec import AppConfig, SandboxEnvironment, create_sandbox
from cifixer_exec.channel.portal import process_portal
from cifixer_exec.stack import EmbeddedStack
from cifixer_exec.wiring import make_journal

TRUE = ["/bin/true"]


def local_rows(rounds: int, sandboxes: int) -> list[Row]:
    """Everything; ``sandboxes`` live at once at the end."""
    rows: list[Row] = []
    with EmbeddedStack(loglevel="WARNING") as stack:
        worker = worker_pid(stack.config)
        with noop_worker(stack.config) as noop, create_sandbox(stack.config) as sandbox, direct_sandbox(stack.config) as direct:
            rows += latency(noop, sandbox, direct, rounds)
            rows += throughput(noop, sandbox)
            rows += big_output(sandbox, worker)
            rows += big_file(sandbox, worker)
        rows += start(stack.config)
        rows += many(stack.config, worker, sandboxes)
    return rows


def latency(noop: Any, sandbox: SandboxEnvironment, direct: SandboxEnvironment, rounds: int) -> list[Row]:
    """One `true` through Redis and a worker, against a no-op Celery task and direct use."""
    task, queued, straight = in_turn(
        rounds, 25, lambda: noop.delay().get(timeout=30), lambda: sandbox.run_command(TRUE), lambda: direct.run_command(TRUE)
    )
    return [
        row("true through the queue / no-op Celery task, p50", queued.p50 / task.p50, "<= 2.5", f"{ms(queued.p50)} / {ms(task.p50)}"),
        row("the same, p95", queued.p95 / task.p95, "", f"{ms(queued.p95)} / {ms(task.p95)}"),
        row("true direct / through the queue, p50", straight.p50 / queued.p50, "", f"{ms(straight.p50)} / {ms(queued.p50)}"),
    ]


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
