"""Settings → objects: the only place that builds them."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from types import ModuleType

from cifixer_exec.backends.pace import ProcessPace
from cifixer_exec.backends.registry import check_backend, make_backend
from cifixer_exec.channel.portal import Portal
from cifixer_exec.environment import AsyncSandboxEnvironment
from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import SandboxSpec, check_id
from cifixer_exec.queue_port import QueuePort
from cifixer_exec.queues import MAINTENANCE, placement_queue, pool_queue
from cifixer_exec.reaper import REASONS, Reaper
from cifixer_exec.sandbox import DirectPort
from cifixer_exec.settings import AppConfig, host_and_port
from cifixer_exec.store.connection import SOCKET_TIMEOUT_S, connect
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.keys import direct_queue
from cifixer_exec.store.pace import SharedPace
from cifixer_exec.store.redis_errors import translated
from cifixer_exec.worker.execution import Executor
from cifixer_exec.worker.exposure import Exposure
from cifixer_exec.worker.lease import Lease
from cifixer_exec.worker.ownership import Ownership
from cifixer_exec.worker.restoration import restore
from cifixer_exec.worker.runtime import Answer, WorkerRuntime
from cifixer_exec.worker.tally import Tally

#: A scrape has ten seconds by default; what Redis does not tell in this time is left out of it.
SCRAPE_PATIENCE_S = 1.0


@cache
def worker_config() -> AppConfig:
    """The configuration of this worker process."""
    return AppConfig.from_env()


def client_name() -> str:
    """Who we are, for logs of runners and Redis."""
    return f"{socket.gethostname()}:{os.getpid()}"


def make_spec(config: AppConfig, sandbox_id: str | None = None) -> SandboxSpec:
    """What ``config`` says a sandbox should be. Raises InvalidRequestError for an unknown backend or a wrong value."""
    return SandboxSpec(
        backend=check_backend(config.execution_backend),
        sandbox_id=check_id(sandbox_id, "sandbox id") if sandbox_id is not None else f"sb-{uuid.uuid4().hex[:20]}",
        image=config.image,
        env=config.env,
        cpus=config.cpus,
        memory_bytes=config.memory_bytes,
        disk_bytes=config.disk_bytes,
        max_processes=config.max_processes,
        network=config.network,
        lifetime_s=config.lifetime_s,
        readonly_paths=config.readonly_paths,
    )


def make_journal(config: AppConfig, *, patience_s: float | None = None, socket_timeout_s: float = SOCKET_TIMEOUT_S) -> Journal:
    """A journal with a connection pool of its own, for use on one event loop; as patient as ``config`` says, or else ``patience_s``."""
    redis = connect(config.redis_url, socket_timeout_s=socket_timeout_s)
    patience_s = config.redis_patience_s if patience_s is None else patience_s
    kept = {"retention_s": config.retention_s, "collected_s": config.collected_s}
    return Journal(redis, namespace=config.namespace, patience_s=patience_s, **kept)


def make_environment(config: AppConfig, sandbox_id: str | None = None) -> AsyncSandboxEnvironment:
    """A sandbox that is not made yet; nothing is contacted."""
    spec = make_spec(config, sandbox_id)
    if config.dispatch == "direct":
        port: DirectPort | QueuePort = DirectPort(make_backend(config), spec, client=client_name())
    else:
        port = QueuePort(make_journal(config), config, spec.sandbox_id, spec)
    return AsyncSandboxEnvironment(port, config, spec.sandbox_id)


async def attach_environment(config: AppConfig, sandbox_id: str) -> AsyncSandboxEnvironment:
    """A sandbox that exists.

    Raises:
        SandboxNotFoundError: none of this id is there, or it was torn down.
    """
    check_id(sandbox_id, "sandbox id")
    if config.dispatch == "direct":
        direct = await DirectPort.attached(make_backend(config), sandbox_id, client=client_name())
        return AsyncSandboxEnvironment(direct, config, sandbox_id)
    port = QueuePort(make_journal(config), config, sandbox_id, None)
    try:
        await port.check_exists()
    except BaseException:
        await port.close()
        raise
    return AsyncSandboxEnvironment(port, config, sandbox_id)


def make_runtime(config: AppConfig, *, wid: str, answer: Answer) -> WorkerRuntime:
    """Everything of a worker process besides Celery; ``answer`` is Celery's part of it."""
    # Whoever makes sandboxes keeps the pace that the others of the account keep too.
    backend = make_backend(config, pace=SharedPace(config.redis_url, ProcessPace()))
    portal, lease_portal = Portal(), Portal("cifixer-lease")
    # What a worker has to say it repeats itself, and a heartbeat that waits is none: with its retries it fits into a lease.
    journal = make_journal(config, patience_s=0.0)
    lease_journal = make_journal(config, patience_s=0.0, socket_timeout_s=max(1.0, config.lease_s / 6))
    ownership = Ownership(backend, wid)
    tally = Tally()
    executor = Executor(journal=journal, backend=backend, ownership=ownership, wid=wid, tally=tally)
    placed = {"backend": backend.name, "placement": backend.placement, "pid": os.getpid(), "host": socket.gethostname()}

    async def listen(on_cancel: Callable[[str], None]) -> None:
        with translated(journal.redis):
            async with journal.redis.pubsub() as pubsub:
                await pubsub.subscribe(journal.keys.control(wid))
                async for message in pubsub.listen():
                    if message["type"] == "message":
                        on_cancel(message["data"].decode())

    async def close() -> None:
        await journal.redis.aclose()
        await asyncio.wrap_future(lease_portal.submit(lease_journal.redis.aclose()))

    runtime: WorkerRuntime
    lease = Lease(
        lease_journal,
        wid=wid,
        ttl_s=config.lease_s,
        info=lambda: {**placed, **runtime.info()},
        on_change=lambda last, now: runtime.lease_changed(last, now),  # noqa: PLW0108  # it does not exist yet
        healthy=lambda: runtime.responsive(),  # noqa: PLW0108
    )
    runtime = WorkerRuntime(
        wid=wid,
        portal=portal,
        lease_portal=lease_portal,
        lease=lease,
        journal=journal,
        ownership=ownership,
        executor=executor,
        listen=listen,
        restore=lambda: restore(journal=journal, backend=backend, ownership=ownership, wid=wid),
        answer=answer,
        close=close,
        drain_s=config.drain_s,
        backend=backend.name,
        placement=backend.placement,
        breaker_state=lambda: backend.breaker_state,
        tally=tally,
        most_ops=config.worker_concurrency - max(1, config.worker_concurrency // 8),
    )
    return runtime


def worker_queues(config: AppConfig) -> list[str]:
    """What a worker of this backend and placement consumes besides its direct queue."""
    backend = make_backend(config)
    return _shared_queues(backend.name, backend.placement)


def _shared_queues(backend: str, placement: str) -> list[str]:
    return [MAINTENANCE, pool_queue(backend), placement_queue(backend, placement)]


def make_reaper(config: AppConfig, journal: Journal, *, count: Callable[[str], None] = lambda _: None) -> Reaper:
    """The reaper of this worker's backend and placement; ``count`` is told the reason of each removal."""
    return Reaper(journal=journal, backend=make_backend(config), creation_grace_s=config.creation_grace_s, count=count)


def make_exposure(config: AppConfig, worker: WorkerRuntime) -> Exposure | None:
    """What shows ``worker`` at the configured address; None when there is none.

    Raises:
        InvalidRequestError: the address cannot be listened on, or the extra ``metrics`` is not installed.
    """
    if not config.metrics_address:
        return None
    metrics = _metrics_module()
    # The direct queue's name has a boot id, which as a label would make a new time series at each start.
    queues = {**{name: name for name in _shared_queues(worker.backend, worker.placement)}, direct_queue(worker.wid): "direct"}

    def queue_lengths() -> dict[str, int] | None:
        found = worker.queue_lengths(list(queues), patience_s=SCRAPE_PATIENCE_S)
        return None if found is None else {queues[name]: length for name, length in found.items()}

    source = metrics.WorkerSource(
        tally=worker.tally,
        sandboxes=lambda: int(worker.info()["sandboxes"]),
        active=lambda: int(worker.info()["active"]),
        draining=lambda: bool(worker.info()["draining"]),
        lease_valid=worker.lease_valid,
        responsive=worker.responsive,
        breaker_state=lambda: str(worker.info()["breaker"]),
        queue_lengths=queue_lengths,
        reap_reasons=REASONS,
        version=version("cifixer-exec"),
        backend=worker.backend,
        placement=worker.placement,
    )
    host, port = host_and_port(config.metrics_address)
    shown = metrics.exposition(metrics.WorkerCollector(source))
    return Exposure(host, port, metrics=shown, trouble=worker.trouble, stuck=worker.stuck)


def make_beat_exposure(config: AppConfig) -> tuple[Exposure, Callable[[], None]] | None:
    """What shows beat at the configured address, and what to call when it has sent a task; None when there is no address.

    Raises:
        InvalidRequestError: as :func:`make_exposure`.
    """
    if not config.metrics_address:
        return None
    metrics = _metrics_module()
    watch = metrics.BeatWatch(interval_s=config.reap_interval_s)
    host, port = host_and_port(config.metrics_address)
    return Exposure(host, port, metrics=metrics.exposition(watch), trouble=watch.trouble), watch.sent


def _metrics_module() -> ModuleType:
    try:
        from cifixer_exec.worker import metrics
    except ModuleNotFoundError as error:
        raise InvalidRequestError(
            f"metrics_address is set and needs the package {error.name!r}: install the 'metrics' extra "
            "(pip install 'cifixer-exec[metrics]'), or leave CIFIXER_METRICS_ADDRESS out"
        ) from None
    return metrics
