"""One fault each, on a stage of its own: a worker that is armed, an op, a second worker, and what came of it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifixer_exec import AppConfig, AsyncSandboxEnvironment, ExecResult, create_async_sandbox
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import OpRecord
from cifixer_exec.wiring import make_journal
from tests.chaos.plan import LEASE_S
from tests.chaos.workers import Worker, Workers
from tests.support.contract_stack import on_backend
from tests.support.docker_daemon import left_on_daemon
from tests.support.e2b_service import left_in_service
from tests.support.failpoints import Arm
from tests.support.kubernetes_cluster import left_in_cluster

_LOOK_S = 0.03
_READY_S = 30.0
#: For one op whose worker died under it, on a machine that is busy with other tests.
_OP_S = 40.0
_SETTLE_S = 3.0
OP = "the-op"
COMMAND = f"echo {OP} >> ledger; i=0; while [ $i -lt 8 ]; do echo line $i; i=$((i + 1)); sleep 0.1; done; exit 7"
EXPECTED = b"".join(b"line %d\n" % i for i in range(8))


@dataclass
class Outcome:
    """What a case came to; an exception of the caller's is kept, so that the test tells it."""

    ended: int | None = None
    passed: list[str] = field(default_factory=list)
    result: ExecResult | None = None
    ledger: bytes = b""
    content: bytes = b""
    op: OpRecord | None = None
    adopted: bool = False
    left: list[str] | None = None
    log: str = ""
    error: Exception | None = None


class Stage:
    """One sandbox and its workers in a namespace of their own."""

    def __init__(self, workers: Workers, config: AppConfig) -> None:
        self.workers = workers
        self.config = config
        self.journal: Journal = make_journal(config)
        self.sandbox: AsyncSandboxEnvironment = create_async_sandbox(config, sandbox_id=f"{config.namespace}-1")
        self.alive: list[Worker] = []

    async def worker(self, *arms: Arm, config: AppConfig | None = None) -> Worker:
        """One more, with its lease."""
        before = {w.worker_id for w in await self.journal.workers()}
        worker = await self.workers.spawn(config or self.config, arms)
        self.alive.append(worker)
        await until(lambda: self._more_than(before))
        return worker

    async def _more_than(self, before: set[str]) -> bool:
        return bool({w.worker_id for w in await self.journal.workers()} - before)

    async def close(self) -> None:
        """Kill the workers; the sandbox has been torn down."""
        for worker in self.alive:
            worker.signal(signal.SIGKILL)
            await worker.ended
        await self.sandbox.close()
        await self.journal.redis.aclose()


async def until(condition: Callable[[], Awaitable[bool]], patience_s: float = _READY_S) -> None:
    """Wait for it. Raises TimeoutError."""
    async with asyncio.timeout(patience_s):
        while not await condition():  # noqa: ASYNC110  # it is in Redis or in another process
            await asyncio.sleep(_LOOK_S)


def passed(workers: Workers, worker: Worker) -> list[str]:
    """The points that this worker reported."""
    if not workers.report.exists():
        return []
    lines = [line.split(" ") for line in workers.report.read_text().splitlines()]
    return [f"{action} {point}" for action, point, pid in lines if int(pid) == worker.pid]


Story = Callable[[Stage, Outcome], Coroutine[Any, Any, None]]


async def run_command(stage: Stage, outcome: Outcome) -> None:
    """The caller only waits."""
    outcome.result = await stage.sandbox.run_command(COMMAND, op_id=OP, timeout_s=30)
    outcome.ledger = await stage.sandbox.read_file("ledger")


async def write_file(stage: Stage, outcome: Outcome) -> None:
    """A file that is written once, whole."""
    await stage.sandbox.write_file("file", b"content")
    outcome.content = await stage.sandbox.read_file("file")


async def remove_file(stage: Stage, outcome: Outcome) -> None:
    """A remove that the next worker carries out again must not complain that the file is gone."""
    await stage.sandbox.remove("file", missing_ok=False)
    outcome.content = b"there" if await stage.sandbox.exists("file") else b""


async def extend(stage: Stage, outcome: Outcome) -> None:
    """Both deadlines are moved, if need be twice."""
    await stage.sandbox.extend(5000)


async def extend_twice(stage: Stage, outcome: Outcome) -> None:
    """The second deadline counts, whatever became of the first."""
    await stage.sandbox.extend(9000)
    await stage.sandbox.extend(5000)
    (owned,) = await asyncio.to_thread(make_backend(stage.config).list_owned)
    outcome.content = b"moved" if 0 < owned.expires_at_s - time.time() <= 5000 else b"wrong"


async def nothing(stage: Stage, outcome: Outcome) -> None:
    """The create before or the destroy behind is the case."""


async def play(workers: Workers, config: AppConfig, arm: Arm, story: Story) -> Outcome:
    """Let ``story`` meet one fault. Never raises for what went wrong in it."""
    stage, outcome = Stage(workers, config), Outcome()
    try:
        async with asyncio.timeout(2 * _OP_S):
            await _play(stage, outcome, arm, story)
    except Exception as error:
        outcome.error = error
    finally:
        await stage.close()
        outcome.log = stage.alive[0].text() if stage.alive else ""
    return outcome


async def _play(stage: Stage, outcome: Outcome, arm: Arm, story: Story) -> None:
    hold = [Arm(point="renew.before", action="hold")] if arm.action == "freeze" else []
    first = await stage.worker(arm, *hold)
    made = asyncio.create_task(_make(stage, story))
    frozen = asyncio.create_task(until(lambda: _is_frozen(stage, first), 2 * _OP_S))  # a creation may be what freezes
    waited: list[asyncio.Future[Any]] = [made, first.ended, frozen]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    told = asyncio.create_task(_tell(stage, outcome, made, story))
    second = asyncio.create_task(stage.worker(Arm(point="finish.before", action="note", kind=arm.kind)))
    try:
        if arm.action == "freeze":
            await _wake_late(stage, first, await second)
        async with asyncio.timeout(_OP_S):
            await told
            outcome.adopted = await _has_other_owner(stage, first)
            await stage.sandbox.teardown()
        await second
    finally:
        for task in (told, second, frozen):
            task.cancel()
        await asyncio.gather(made, told, second, frozen, return_exceptions=True)
    outcome.ended = first.ended.result() if first.ended.done() else None
    outcome.passed = passed(stage.workers, first)
    outcome.left = await _settled(stage.config)


async def _make(stage: Stage, story: Story) -> None:
    await stage.sandbox.init()
    if story is remove_file:
        await stage.sandbox.write_file("file", b"content")


async def _tell(stage: Stage, outcome: Outcome, made: asyncio.Task[None], story: Story) -> None:
    await made
    await story(stage, outcome)
    outcome.op = await stage.journal.op(OP)


async def _wake_late(stage: Stage, first: Worker, second: Worker) -> None:
    """The first goes on where it stood when the second is about to tell how the op ended: by then the runner has met it for sure."""
    await until(lambda: _is_frozen(stage, first))
    await until(lambda: _has_passed(stage, second, "note finish.before"))
    first.signal(signal.SIGCONT)
    await until(lambda: _says(first, "fenced by "), patience_s=10)


async def _has_passed(stage: Stage, worker: Worker, point: str) -> bool:
    return point in passed(stage.workers, worker)


async def _is_frozen(stage: Stage, first: Worker) -> bool:
    return any(text.startswith("freeze") for text in passed(stage.workers, first))


async def _has_other_owner(stage: Stage, first: Worker) -> bool:
    record = await stage.journal.sandbox(stage.sandbox.sandbox_id)
    return record is not None and record.owner != "" and not record.owner.startswith(f"{first.name}-")


async def _says(worker: Worker, text: str) -> bool:
    return text in worker.text()


async def _settled(config: AppConfig) -> list[str]:
    """What is left when the platform's own collectors had a moment."""
    with suppress(TimeoutError):
        await until(lambda: _is_empty(config), _SETTLE_S)
    return await asyncio.to_thread(left_of, config)


async def _is_empty(config: AppConfig) -> bool:
    return not await asyncio.to_thread(left_of, config)


def stage_config(backend: str, redis_url: str, namespace: str, state_dir: Path) -> AppConfig:
    """Of one case."""
    made = AppConfig(redis_url=redis_url, namespace=namespace, state_dir=state_dir, lease_s=LEASE_S, drain_s=0.5, worker_concurrency=8)
    # Without a runner image each sandbox has one step more in which it can be half made.
    return on_backend(backend, made).with_(kubernetes_runner_image="")


def left_of(config: AppConfig) -> list[str]:
    """What is on the platform of one case."""
    if config.execution_backend == "docker_local":
        return left_on_daemon(config.namespace)
    if config.execution_backend == "kubernetes":
        return left_in_cluster(config.namespace)
    if config.execution_backend == "e2b":
        return left_in_service(config.namespace)
    return [str(path) for path in config.state_dir.glob("*/sandboxes/*")]
