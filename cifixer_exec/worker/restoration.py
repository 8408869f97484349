"""After Redis lost its data: what this worker owned and what still lives is registered again."""

from __future__ import annotations

import asyncio
import logging

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.queues import placement_queue
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import SandboxRecord
from cifixer_exec.worker.ownership import KnownSandbox, Ownership

log = logging.getLogger(__name__)


async def restore(*, journal: Journal, backend: Backend, ownership: Ownership, wid: str) -> list[str]:
    """Register the living sandboxes of ``ownership`` that the registry does not know; forget those that are gone or another's. Their ids.

    Only who owned a sandbox knows all of it (its spec may hold secrets, so no label has it). What no worker knows any more is the
    reaper's. May be repeated, by several workers at once.

    Raises:
        QueueUnavailableError, BackendError: try again.
    """
    missing = {}
    for sandbox_id, known in ownership.known.items():
        record = await journal.sandbox(sandbox_id)
        if record is None:
            missing[sandbox_id] = known
        elif record.owner not in ("", wid):
            ownership.forget(sandbox_id)
    if not missing:
        return []
    found = {owned.handle.sandbox_id: owned for owned in await asyncio.to_thread(backend.list_owned)}
    restored = []
    for sandbox_id, known in missing.items():
        owned = found.get(sandbox_id)
        if owned is None or not (await asyncio.to_thread(backend.inspect, owned.handle)).alive:
            ownership.forget(sandbox_id)
        elif await journal.restore(_record(known, owned)):
            log.warning("Redis had forgotten sandbox %s: it is registered again", sandbox_id)
            restored.append(sandbox_id)
    return restored


def _record(known: KnownSandbox, owned: Owned) -> SandboxRecord:
    """The expiry is the platform's, which ``extend`` has moved."""
    handle = known.handle
    return SandboxRecord(
        sandbox_id=handle.sandbox_id,
        backend=handle.backend,
        placement=handle.placement,
        state="ready",
        owner="",
        epoch=0,
        handle=handle.to_json(),
        spec=known.spec,
        create_op="",
        queue=placement_queue(handle.backend, handle.placement),
        created_ms=round(owned.created_at_s * 1000),
        expires_ms=round(owned.expires_at_s * 1000),
        cause="",
    )
