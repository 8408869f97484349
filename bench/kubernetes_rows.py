"""The Kubernetes backend against direct use of the same cluster: the same image, limits and hardening, measured in turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from bench.docker_rows import none_of, scratch
from bench.local_rows import worker_pid
from bench.measure import MIB, Times, in_turn, peak_memory, resident_bytes
from bench.rows import Row, ms, row
from cifixer_exec import AppConfig, create_sandbox
from cifixer_exec.stack import EmbeddedStack

if TYPE_CHECKING:
    from bench.kubernetes_yardstick import KubernetesYardstick

TRUE = ["true"]
FILE_MIB = 100
MEMORY_BYTES, DISK_BYTES = 1024 * MIB, 512 * MIB


def kubernetes_rows(rounds: int) -> list[Row]:
    """Everything, or one row that says why nothing could be measured."""
    try:
        from bench.kubernetes_yardstick import KubernetesYardstick
        from cifixer_exec.backends.kubernetes.job import KubernetesOptions, manifest
        from cifixer_exec.backends.kubernetes.names import Names
        from cifixer_exec.wiring import make_spec
        from tests.support.kubernetes_cluster import NoClusterError, cluster_settings, is_real
    except ImportError as error:
        return [row("Kubernetes backend", None, "", f"a package is not installed: {error}")]
    try:
        settings = cluster_settings()
    except NoClusterError as error:
        return [row("Kubernetes backend", None, "", str(error))]
    base = AppConfig(execution_backend="kubernetes", namespace=f"bench-{os.getpid()}", **settings)
    base = base.with_(memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES)
    options = KubernetesOptions(image=base.image) if base.image else KubernetesOptions()
    job = manifest(make_spec(base), names=Names("bench"), placement="", options=options, now_s=0.0)
    direct = KubernetesYardstick(base, job)
    where = "a real cluster" if is_real() else "the stand-in of the tests: its Pods start in no time, and it is one Python process"
    with EmbeddedStack(base, loglevel="WARNING") as stack:
        return [
            row("measured on", None, "", where),
            *latency(stack.config, direct, rounds),
            *start(stack.config, direct, rounds),
            *files(stack.config, direct, worker_pid(stack.config), max(3, rounds // 4)),
        ]


def latency(config: AppConfig, direct: KubernetesYardstick, rounds: int) -> list[Row]:
    """One `true`: through Redis and a worker, without them, and as an exec of kubernetes.stream."""
    with create_sandbox(config) as sandbox, create_sandbox(config.with_(dispatch="direct")) as straight, direct.pod() as pod:
        queued, near, executed = in_turn(
            rounds, 10, lambda: sandbox.run_command(TRUE), lambda: straight.run_command(TRUE), lambda: none_of(direct.execute(pod, TRUE))
        )
    what = "kubernetes.stream exec"
    return [
        row(f"true through the queue / {what}, p50", queued.p50 / executed.p50, "<= 0.10", f"{ms(queued.p50)} / {ms(executed.p50)}"),
        row("the same, p95", queued.p95 / executed.p95, "", f"{ms(queued.p95)} / {ms(executed.p95)}"),
        row(f"true direct / {what}, p50", near.p50 / executed.p50, "", f"{ms(near.p50)} / {ms(executed.p50)}"),
    ]


def start(config: AppConfig, direct: KubernetesYardstick, rounds: int) -> list[Row]:
    """From nothing to the first result; removing it is not counted."""

    def first(chosen: AppConfig) -> Callable[[], None]:
        made = create_sandbox(chosen)
        made.init()
        made.run_command(TRUE)
        return made.teardown

    uploaded = config.with_(kubernetes_runner_image="")
    near = config.with_(dispatch="direct")
    things = {
        "through the queue": lambda: first(config),
        "direct": lambda: first(near),
        "direct, with the runner uploaded": lambda: first(uploaded.with_(dispatch="direct")),
        "raw": lambda: direct.first_command(TRUE),
    }
    times = dict(zip(things, in_turn(rounds, 1, *things.values()), strict=True))
    raw = times.pop("raw")
    what = "raw Job, start and first exec"
    targets = {"through the queue": "<= 1.15"}
    rows = []
    for name, taken in times.items():
        title = f"create, start and first command {name} / {what}, p50"
        rows.append(row(title, taken.p50 / raw.p50, targets.get(name, ""), f"{ms(taken.p50)} / {ms(raw.p50)}"))
    return rows


def files(config: AppConfig, direct: KubernetesYardstick, worker: int, rounds: int) -> list[Row]:
    """100 MiB in and out, by the queue and by kubectl."""
    from bench.kubernetes_yardstick import has_kubectl

    with create_sandbox(config) as sandbox, create_sandbox(config.with_(dispatch="direct")) as near, direct.pod() as pod, scratch() as tmp:
        source = tmp / "source"
        source.write_bytes(os.urandom(MIB) * FILE_MIB)
        things: dict[str, Callable[[], object]] = {
            "upload": lambda: sandbox.upload(source, "file"),
            "download": lambda: sandbox.download("file", tmp / "ours"),
            "upload without the queue": lambda: near.upload(source, "file"),
            "download without the queue": lambda: near.download("file", tmp / "near"),
        }
        if has_kubectl():
            things |= {
                "cat in": lambda: direct.pour_in(source, pod, "/workspace/file"),
                "cat out": lambda: direct.pour_out(pod, "/workspace/file", tmp / "theirs"),
            }
            if direct.has_tar(pod):
                things |= {
                    "cp in": lambda: direct.copy_in(source, pod, "/workspace/copied"),
                    "cp out": lambda: direct.copy_out(pod, "/workspace/copied", tmp / "copied"),
                }
        idle = resident_bytes(worker)
        with peak_memory(worker) as peak:
            times = dict(zip(things, in_turn(rounds, 1, *things.values()), strict=True))
        same = (tmp / "ours").read_bytes() == (tmp / "near").read_bytes() == source.read_bytes()
    memory = f"pieces under way, whatever a file's size; contents {'same' if same else 'DIFFERENT'}"
    return [*speeds(times), row("the same: worker memory over idle, MiB", (peak() - idle) / MIB, "flat", memory)]


def speeds(times: dict[str, Times]) -> list[Row]:
    """Throughput as a ratio to direct use: more is better."""
    rows = []
    for ours in ("upload", "download", "upload without the queue", "download without the queue"):
        for theirs, target, what in (("cp", ">= 0.5", "kubectl cp"), ("cat", "", "kubectl exec cat")):
            yardstick = f"{theirs} {'in' if ours.startswith('upload') else 'out'}"
            title = f"{FILE_MIB} MiB {ours}: throughput / {what}, p50"
            if yardstick not in times:
                rows.append(row(title, None, target, "no kubectl on the PATH, or no tar in the image"))
                continue
            mine, other = times[ours].p50, times[yardstick].p50
            rows.append(row(title, other / mine, target, f"{FILE_MIB / mine:.0f} / {FILE_MIB / other:.0f} MiB/s"))
    return rows
