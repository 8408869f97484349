"""The Docker backend against direct use of the same daemon: the same image, limits and hardening, measured in turn."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.local_rows import worker_pid
from bench.measure import MIB, Times, in_turn, peak_memory, resident_bytes
from bench.rows import Row, ms, row
from cifixer_exec import AppConfig, create_sandbox
from cifixer_exec.stack import EmbeddedStack

if TYPE_CHECKING:
    from bench.yardstick import Yardstick

TRUE = ["true"]
FILE_MIB = 100
#: Of the sandboxes that are used one at a time, and of the many.
MEMORY_BYTES, DISK_BYTES = 2048 * MIB, 1024 * MIB
SMALL_MEMORY_BYTES, SMALL_DISK_BYTES = 64 * MIB, 32 * MIB


def docker_rows(rounds: int, containers: int) -> list[Row]:
    """Everything, or one row that says why nothing could be measured. ``containers`` live at once at the end."""
    try:
        from bench.yardstick import Yardstick
        from cifixer_exec.wiring import make_spec
        from tests.support.docker_daemon import NoDaemonError, docker_host, image_for_tests
    except ImportError as error:
        return [row("Docker backend", None, "", f"docker-py is not installed: {error}")]
    try:
        host = docker_host()
    except NoDaemonError as error:
        return [row("Docker backend", None, "", str(error))]
    image = image_for_tests(host)
    base = AppConfig(execution_backend="docker_local", docker_host=host, image=image, namespace=f"bench-{os.getpid()}")
    base = base.with_(memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES)
    direct = Yardstick(host, image, make_spec(base))
    try:
        with EmbeddedStack(base, loglevel="WARNING") as stack:
            worker = worker_pid(stack.config)
            return [
                *latency(stack.config, direct, rounds),
                *start(stack.config, direct, rounds),
                *files(stack.config, direct, worker, max(3, rounds // 4)),
                *many(stack.config, worker, containers),
            ]
    finally:
        direct.close()


def latency(config: AppConfig, direct: Yardstick, rounds: int) -> list[Row]:
    """One `true`: through Redis and a worker, without them, and as an exec of docker-py (create, start, inspect)."""
    with create_sandbox(config) as sandbox, create_sandbox(config.with_(dispatch="direct")) as straight, direct.container() as container:
        queued, near, executed = in_turn(
            rounds, 25, lambda: sandbox.run_command(TRUE), lambda: straight.run_command(TRUE), lambda: direct.execute(container, TRUE)
        )
    return [
        row("true through the queue / docker exec, p50", queued.p50 / executed.p50, "<= 0.10", f"{ms(queued.p50)} / {ms(executed.p50)}"),
        row("the same, p95", queued.p95 / executed.p95, "", f"{ms(queued.p95)} / {ms(executed.p95)}"),
        row("true direct / docker exec, p50", near.p50 / executed.p50, "", f"{ms(near.p50)} / {ms(executed.p50)}"),
    ]


def start(config: AppConfig, direct: Yardstick, rounds: int) -> list[Row]:
    """From nothing to the first result; removing it is not counted."""

    def first(chosen: AppConfig) -> Callable[[], None]:
        made = create_sandbox(chosen)
        made.init()
        made.run_command(TRUE)
        return made.teardown

    queued, near, raw = in_turn(
        rounds, 1, lambda: first(config), lambda: first(config.with_(dispatch="direct")), lambda: direct.first_command(TRUE)
    )
    what = "create, start and first command"
    return [
        row(f"{what}: through the queue / docker-py, p50", queued.p50 / raw.p50, "<= 1.15", f"{ms(queued.p50)} / {ms(raw.p50)}"),
        row(f"{what}: direct / docker-py, p50", near.p50 / raw.p50, "", f"{ms(near.p50)} / {ms(raw.p50)}"),
    ]


def files(config: AppConfig, direct: Yardstick, worker: int, rounds: int) -> list[Row]:
    """100 MiB in and out. Ours always into the memory of a container whose root is read-only, which docker cp cannot write to (its
    archives see what is below the mounts): so it writes to the disk of one whose root is writable.
    """
    from bench.yardstick import has_docker_command

    with (
        create_sandbox(config) as sandbox,
        create_sandbox(config.with_(dispatch="direct")) as near,
        direct.container(writable_root=True) as writable,
        direct.container() as hardened,
        scratch() as tmp,
    ):
        source, out = tmp / "source", tmp / "out"
        source.write_bytes(os.urandom(MIB) * FILE_MIB)
        data = source.read_bytes()
        things: dict[str, Callable[[], object]] = {
            "upload": lambda: sandbox.upload(source, "file"),
            "download": lambda: sandbox.download("file", tmp / "ours"),
            "upload without the queue": lambda: near.upload(source, "file"),
            "download without the queue": lambda: near.download("file", tmp / "ours, direct"),
            "write": lambda: sandbox.write_file("bytes", data),
            "read": lambda: none_of(sandbox.read_file("bytes")),
            "put": lambda: direct.put(writable, "bytes", data),
            "get": lambda: none_of(direct.get(writable, "bytes")),
        }
        if has_docker_command():
            things |= {
                "cp in": lambda: direct.copy_in(source, writable, "file"),
                "cp out": lambda: direct.copy_out(writable, "file", out),
                "cat in": lambda: direct.cat_in(source, hardened, "/sandbox/file"),
                "cat out": lambda: direct.cat_out(hardened, "/sandbox/file", out),
            }
        idle = resident_bytes(worker)
        with peak_memory(worker) as peak:
            times = dict(zip(things, in_turn(rounds, 1, *things.values()), strict=True))
        same = (tmp / "ours").read_bytes() == (tmp / "ours, direct").read_bytes() == data and sandbox.read_file("bytes") == data
    memory = f"pieces under way, whatever a file's size; contents {'same' if same else 'DIFFERENT'}"
    return [*speeds(times), row("the same: worker memory over idle, MiB", (peak() - idle) / MIB, "flat", memory)]


def speeds(times: dict[str, Times]) -> list[Row]:
    """Throughput as a ratio to direct use: more is better."""
    pairs = [
        ("upload", "cp in", ">= 0.5", "docker cp to a writable root"),
        ("download", "cp out", ">= 0.5", "docker cp from a writable root"),
        ("upload without the queue", "cp in", ">= 0.5", "docker cp to a writable root"),
        ("download without the queue", "cp out", ">= 0.5", "docker cp from a writable root"),
        ("write", "put", "", "put_archive to a writable root"),
        ("read", "get", "", "get_archive from a writable root"),
        ("upload", "cat in", "", "docker exec -i cat to a read-only root's tmpfs"),
        ("download", "cat out", "", "docker exec cat from a read-only root's tmpfs"),
    ]
    rows = []
    for ours, theirs, target, what in pairs:
        title = f"{FILE_MIB} MiB {ours}: throughput / {what}, p50"
        if theirs not in times:
            rows.append(row(title, None, target, "no docker command on the PATH"))
            continue
        mine, other = times[ours].p50, times[theirs].p50
        rows.append(row(title, other / mine, target, f"{FILE_MIB / mine:.0f} / {FILE_MIB / other:.0f} MiB/s"))
    return rows


def many(config: AppConfig, worker: int, count: int) -> list[Row]:
    """Many containers alive at once on one worker, each of them used, with little memory each."""
    small = config.with_(memory_bytes=SMALL_MEMORY_BYTES, disk_bytes=SMALL_DISK_BYTES)
    idle = resident_bytes(worker)
    made = [create_sandbox(small) for _ in range(count)]
    with ThreadPoolExecutor(16) as threads:
        try:
            begun = time.perf_counter()
            list(threads.map(lambda s: s.init(), made))
            ready = time.perf_counter()
            asked = threads.map(lambda n: (made[n].run_command(f"echo $(({n}*7))").stdout, n), range(count))
            right = sum(answer == b"%d\n" % (n * 7) for answer, n in asked)
            used = time.perf_counter()
            memory = resident_bytes(worker)
        finally:
            list(threads.map(lambda s: s.teardown(), made))
    each = (ready - begun) / count
    detail = (
        f"created in {ready - begun:.1f} s ({ms(each)} each), all used in {used - ready:.2f} s, worker +{(memory - idle) / MIB:.0f} MiB"
    )
    return [row("containers alive at once on one worker, each with the right answer", float(right), f"= {count}", detail)]


def none_of(_data: object) -> None:
    """What a thing returns is looked at by :func:`in_turn`; content is not to be kept."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory where there is one, so that no disk is measured on this side."""
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
