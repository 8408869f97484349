"""The second lock on every sandbox: what bears our labels and should not be there any more goes.

Careful by construction: it acts only on what the platform lists *and* the registry does not know as live, nothing younger than
the creation grace, nothing unknown while the registry itself is younger than that, at most ``limit`` per round, and a platform or
registry that does not answer ends the round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.backends.threads import asking, batches
from cifixer_exec.errors import BackendError
from cifixer_exec.model import SandboxHandle
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import SandboxRecord

log = logging.getLogger(__name__)

#: Why a sandbox was dealt with: its lifetime was over, the registry did not know it, it was dead already, or it could not be removed.
EXPIRED, UNKNOWN, GONE, NOT_REMOVED = REASONS = ("expired", "unknown", "gone", "failed")


@dataclass(frozen=True, kw_only=True)
class Reaped:
    """What a round did (or, in a dry run, would do)."""

    destroyed: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    dry_run: bool = False


class Reaper:
    """One round for one backend and placement. Two rounds at once do no harm: every step is idempotent."""

    def __init__(
        self,
        *,
        journal: Journal,
        backend: Backend,
        creation_grace_s: float,
        limit: int = 100,
        count: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``count`` is told, for each sandbox dealt with, which of :data:`REASONS` it was."""
        self._journal = journal
        self._backend = backend
        self._grace_s = creation_grace_s
        self._limit = limit
        self._count = count
        self._clock = clock

    async def reap(self, *, dry_run: bool = False) -> Reaped:
        """Destroy orphans and expired sandboxes of this placement, close entries whose sandbox is gone.

        Raises:
            BackendUnavailableError, QueueUnavailableError: nothing was done, because not everything is known.
        """
        records = {r.sandbox_id: r for r in await self._journal.sandboxes()}
        # Redis may just have lost everything: then the owners are about to register again what lives.
        forgetful = await self._journal.age_s() < self._grace_s
        doomed: list[Owned] = []
        living: set[str] = set()
        # What is created between the two looks is young, and looked up again before it goes.
        async for listed in batches(self._backend.list_owned):
            candidates = [o for o in listed if not forgetful or o.handle.sandbox_id in records]
            doomed += [o for o in candidates if self._is_doomed(o, records.get(o.handle.sandbox_id))][: self._limit - len(doomed)]
            living.update(o.handle.sandbox_id for o in listed if o.alive)
        dead = await self._dead(r for r in records.values() if r.sandbox_id not in living)
        if dry_run:
            return Reaped(destroyed=_ids(doomed), closed=tuple(sorted(dead)), dry_run=True)
        destroyed, failed = await self._destroy(doomed, records)
        for sandbox_id, cause in dead.items():
            log.warning("reaped: sandbox %s is registered and gone: %s", sandbox_id, cause)
            await self._journal.close(sandbox_id, state="lost", cause=cause)
            self._count(GONE)
            await self._clear_away(records[sandbox_id])
        return Reaped(destroyed=destroyed, closed=tuple(sorted(dead)), failed=failed)

    def _is_doomed(self, owned: Owned, record: SandboxRecord | None) -> bool:
        now = self._clock()
        if now - owned.created_at_s < self._grace_s and (record is None or record.state == "creating"):
            return False
        if record is None or record.placement not in ("", self._backend.placement):
            return True  # unknown, or registered at another placement: a creation that was adopted there left this one behind
        # Whichever is later: an old snapshot of Redis may not know that it was extended.
        return now >= max(record.expires_ms / 1000, owned.expires_at_s)

    async def _destroy(self, doomed: list[Owned], records: dict[str, SandboxRecord]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        destroyed, failed = [], []
        for owned in doomed:
            sandbox_id = owned.handle.sandbox_id
            cause = "its lifetime ended" if sandbox_id in records else "it is unknown to the registry"
            record = await self._journal.sandbox(sandbox_id)  # again: it may have been registered or extended since the list was read
            if not self._is_doomed(owned, None if record is None or record.over else record):
                continue
            try:
                await asking(self._backend.destroy, owned.handle)
            except BackendError as error:
                log.warning("sandbox %s could not be reaped: %s", sandbox_id, error)
                failed.append(sandbox_id)
                self._count(NOT_REMOVED)
                continue
            log.warning("reaped: sandbox %s: %s", sandbox_id, cause)
            if record is None or record.placement in ("", self._backend.placement):
                await self._journal.close(sandbox_id, state="lost", cause=cause)
            destroyed.append(sandbox_id)
            self._count(EXPIRED if sandbox_id in records else UNKNOWN)
        return tuple(destroyed), tuple(failed)

    async def _clear_away(self, record: SandboxRecord) -> None:
        """What the platform keeps of the dead; what fails here, a later round does."""
        try:
            await asking(self._backend.destroy, SandboxHandle.from_json(record.handle or {}))
        except BackendError as error:
            log.warning("what is left of sandbox %s could not be removed: %s", record.sandbox_id, error)

    async def _dead(self, records: Iterable[SandboxRecord]) -> dict[str, str]:
        """Ready entries of this placement whose sandbox is gone, with the cause of its death."""
        dead: dict[str, str] = {}
        for record in records:
            if record.backend != self._backend.name or record.placement != self._backend.placement or record.handle is None:
                continue
            if record.state == "closing" and self._clock() < record.expires_ms / 1000:
                continue  # it is just being torn down, and that is no loss
            inspection = await asking(self._backend.inspect, SandboxHandle.from_json(record.handle))
            if not inspection.alive:
                dead[record.sandbox_id] = inspection.cause
        return dead


def _ids(owned: list[Owned]) -> tuple[str, ...]:
    return tuple(o.handle.sandbox_id for o in owned)
