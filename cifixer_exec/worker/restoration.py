"""What Redis may have forgotten: sandboxes that this worker knows and that still live are registered again."""

from __future__ import annotations

import logging

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.backends.threads import asking, batches
from cifixer_exec.model import SandboxHandle
from cifixer_exec.queues import placement_queue
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import SandboxRecord
from cifixer_exec.worker.ownership import KnownSandbox, Ownership

log = logging.getLogger(__name__)


async def restore(*, journal: Journal, backend: Backend, ownership: Ownership, wid: str) -> list[str]:
    """Register the living sandboxes of ``ownership`` that the registry does not know. Their ids.

    Only who owned a sandbox knows all of it (its spec may hold secrets, so no label has it); what no owner has, each worker of its
    placement remembers. What no worker knows any more is the reaper's. On the way ``ownership`` is brought up to date. May be
    repeated, by several workers at once.

    Raises:
        QueueUnavailableError, BackendError: try again.
    """
    missing = await _compare(journal, backend, ownership, wid)
    restored = []
    if missing:
        found = {o.handle.sandbox_id: o async for listed in batches(backend.list_owned) for o in listed if o.handle.sandbox_id in missing}
        for sandbox_id, known in missing.items():
            owned = found.get(sandbox_id)
            if owned is None or not (await asking(backend.inspect, owned.handle)).alive:
                ownership.forget(sandbox_id)
            elif await journal.restore(_record(known, owned)):
                log.warning("Redis had forgotten sandbox %s: it is registered again", sandbox_id)
                restored.append(sandbox_id)
    await _remember_unowned(journal, backend, ownership)
    return restored


async def _compare(journal: Journal, backend: Backend, ownership: Ownership, wid: str) -> dict[str, KnownSandbox]:
    """What is known here and not registered. What is over or another's is forgotten; one torn down while Redis did not know it goes."""
    known, epochs = ownership.known, ownership.epochs()
    registered = {record.sandbox_id: record for record in await journal.known_sandboxes(known)}
    for sandbox_id, record in registered.items():
        if record.over or record.owner not in ("", wid):
            ownership.forget(sandbox_id)
            ownership.drop(sandbox_id, epochs.get(sandbox_id, 0))
        if record.over and record.handle is None:
            log.warning("sandbox %s was torn down while Redis did not know it: it is removed", sandbox_id)
            await asking(backend.destroy, known[sandbox_id].handle)
    return {sandbox_id: k for sandbox_id, k in known.items() if sandbox_id not in registered}


async def _remember_unowned(journal: Journal, backend: Backend, ownership: Ownership) -> None:
    here = (backend.name, backend.placement)
    for record in await journal.unowned():
        if record.state == "ready" and record.handle is not None and (record.backend, record.placement) == here:
            ownership.remember(SandboxHandle.from_json(record.handle), record.spec)


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
