"""The sandboxes this worker owns: one session (and so one channel) per sandbox and epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cifixer_exec.backends.base import Backend
from cifixer_exec.errors import SandboxLostError
from cifixer_exec.model import SandboxHandle, SandboxSpec
from cifixer_exec.sandbox import SandboxSession
from cifixer_exec.store.records import Taken


@dataclass(frozen=True, kw_only=True)
class KnownSandbox:
    """What it takes to register a sandbox again."""

    handle: SandboxHandle
    spec: Mapping[str, Any]


class Ownership:
    """Used on one event loop."""

    def __init__(self, backend: Backend, wid: str) -> None:
        self._backend = backend
        self._wid = wid
        self._sessions: dict[str, tuple[int, SandboxSession]] = {}
        #: Registered sandboxes that were this worker's or nobody's when it last heard of them, for the case that Redis forgets them.
        self._known: dict[str, KnownSandbox] = {}

    def session(self, taken: Taken) -> SandboxSession:
        """The session for a granted op; a new epoch gets a new one, which fences the old in the runner too.

        Raises:
            SandboxLostError: the registry has no handle: the sandbox was never finished.
        """
        epoch, session = self._sessions.get(taken.sandbox_id, (0, None))
        if session is not None and epoch == taken.epoch:
            return session
        if session is not None:
            session.close()
        if taken.handle is None:
            raise SandboxLostError(f"sandbox {taken.sandbox_id!r} was never ready")
        handle = SandboxHandle.from_json(taken.handle)
        self.remember(handle, taken.spec)
        return self.add(taken, handle)

    def add(self, taken: Taken, handle: SandboxHandle) -> SandboxSession:
        """A session for a sandbox that was just made or found."""
        spec = SandboxSpec.from_json(taken.spec)
        session = SandboxSession(self._backend, handle, spec, epoch=taken.epoch, client=self._wid)
        self._sessions[taken.sandbox_id] = (taken.epoch, session)
        return session

    def remember(self, handle: SandboxHandle, spec: Mapping[str, Any]) -> None:
        """The sandbox is registered as ready."""
        self._known[handle.sandbox_id] = KnownSandbox(handle=handle, spec=spec)

    def forget(self, sandbox_id: str) -> None:
        """The sandbox is over."""
        self._known.pop(sandbox_id, None)

    @property
    def known(self) -> Mapping[str, KnownSandbox]:
        """By sandbox id; what another worker ended meanwhile is still in it."""
        return dict(self._known)

    def epochs(self) -> dict[str, int]:
        """Of all sandboxes with a session, by id."""
        return {sandbox_id: epoch for sandbox_id, (epoch, _) in self._sessions.items()}

    def drop(self, sandbox_id: str, epoch: int) -> None:
        """Close the channel of ``epoch`` (or an older one); the sandbox itself is left as it is. A newer one stays."""
        held, session = self._sessions.get(sandbox_id, (0, None))
        if session is not None and held <= epoch:
            del self._sessions[sandbox_id]
            session.close()

    def drop_all(self) -> None:
        """Close every channel: the lease lapsed, or the worker ends."""
        for sandbox_id, epoch in self.epochs().items():
            self.drop(sandbox_id, epoch)

    def __len__(self) -> int:
        return len(self._sessions)
