"""The E2B backend: each sandbox is a microVM, with the runner in it in a pid namespace of its own.

Everything that is known of a sandbox is in its metadata at E2B (names.py), so that any process with a key of the account can go on with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from e2b import FileNotFoundException, Sandbox

from cifixer_exec.backends.base import Backend, Owned
from cifixer_exec.backends.breaker import BreakerState
from cifixer_exec.backends.e2b.account import Access, Account, account_with
from cifixer_exec.backends.e2b.machines import ENDED, INTERNET, NONE, SLACK_S, E2BOptions, Machines, lease_s
from cifixer_exec.backends.e2b.names import SANDBOX_ID, Names
from cifixer_exec.backends.e2b.stream import open_bridge
from cifixer_exec.backends.e2b.vendor_errors import LOG_IN
from cifixer_exec.backends.pace import Pace, ProcessPace
from cifixer_exec.backends.threads import asking
from cifixer_exec.channel.transport import Dial, Transport
from cifixer_exec.errors import BackendUnavailableError, ExecutorError, InvalidRequestError, SandboxLostError
from cifixer_exec.model import Capabilities, Health, Inspection, SandboxHandle, SandboxSpec, check_id

#: In a handle's data.
E2B_ID, ACCOUNT = "e2b_id", "account"
GONE = "its microVM is gone: it was killed, or reached its time-out, or E2B lost it"
_EXPIRED = "exit 3"
_ENDS = {_EXPIRED: "its lifetime ended", "signal 9": "its runner was killed, by the kernel for want of memory or from outside"}


class E2BBackend(Backend):
    """See the module. ``namespace``: what bears it in its metadata is ours to reap. ``pace``: shared with whoever uses the account too."""

    name = "e2b"

    def __init__(
        self,
        *,
        access: Access,
        namespace: str,
        options: E2BOptions | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._access = access
        self._names = Names(namespace)
        self._options = options or E2BOptions()
        self._pace = pace or _process_pace
        self._clock = clock

    @property
    def placement(self) -> str:
        """The account, or the service where nobody has named it; other workers of the same pool must have keys of the same account."""
        return self._access.account or self._account.place

    @property
    def capabilities(self) -> Capabilities:
        """Size and disk are the template's."""
        return Capabilities(images=True, max_processes=True, networks=(NONE, INTERNET))

    @property
    def breaker_state(self) -> BreakerState:
        return self._account.breaker.state

    def remedy_for(self, name: str) -> str:
        if name in ("memory_bytes", "cpus", "disk_bytes"):
            return "leave it out, and build a template of that size (e2b template build), which image= names"
        if name == "readonly_paths":
            return "microVMs are other machines; put what is needed into the template, or upload it"
        return super().remedy_for(name)

    def probe(self) -> Health:
        """Asks for a listing; no sandbox is made, because each costs money."""
        options = self._options
        details = {"server": self._account.where, "placement": self.placement, "template": options.template}
        details |= {"networks": ", ".join(self.capabilities.networks), "creations": f"{options.creates_per_s:g} a second"}
        try:
            self._account.ping()
        except ExecutorError as error:
            return Health(ok=False, summary=str(error), remedy=error.code, details=details)
        return Health(ok=True, summary="E2B answers to our key; no sandbox was made, so the template was not tried", details=details)

    def create(self, spec: SandboxSpec) -> SandboxHandle:
        self.check(spec)
        check_id(spec.sandbox_id, "sandbox id")
        template = spec.image or self._options.template
        if not template or any(c.isspace() or not c.isprintable() for c in template):
            raise InvalidRequestError(f"image={template!r} is not usable: give the name or id of an E2B template")
        return self._handle(spec.sandbox_id, self._machines.make(spec))

    def dial(self, handle: SandboxHandle) -> Dial:
        account = self._account

        async def dial() -> Transport:
            if account.breaker.state is not BreakerState.CLOSED:
                await asking(account.breaker.check)
            return await open_bridge(account, await asking(self._e2b_id, handle))

        return dial

    def _e2b_id(self, handle: SandboxHandle) -> str:
        """Raises ConnectionError when there is none."""
        e2b_id = self._found(handle)
        if e2b_id is None:
            raise ConnectionError("its microVM is not there")
        return e2b_id

    def _found(self, handle: SandboxHandle) -> str | None:
        if E2B_ID in handle.data:
            return str(handle.data[E2B_ID])
        info = self._machines.find(handle.sandbox_id)
        return info.sandbox_id if info is not None else None

    def destroy(self, handle: SandboxHandle) -> None:
        self._check_account(handle)
        e2b_id = self._found(handle)
        if e2b_id is not None:
            self._machines.remove(e2b_id)

    def _check_account(self, handle: SandboxHandle) -> None:
        """Two accounts under one Redis could have the same placement: what one does not find must not be lost for the other.

        An account that somebody has named has one: with a new key, too, what is gone is known to be gone.
        """
        there = handle.data.get(ACCOUNT, self._account.fingerprint)
        if there == self._account.fingerprint or handle.placement == self._access.account:
            return
        e2b_id = self._found(handle)
        if e2b_id is None or not self._is_known(e2b_id):
            raise BackendUnavailableError(
                f"sandbox {handle.sandbox_id!r} was made with another key, and this one does not see it: "
                "give workers of one pool keys of one account, and each account a name by CIFIXER_E2B_ACCOUNT"
            )

    def _is_known(self, e2b_id: str) -> bool:
        try:
            self._account.ask("looking for its sandbox", lambda: Sandbox.get_info(e2b_id, **self._account.options))
        except SandboxLostError:
            return False
        return True

    def inspect(self, handle: SandboxHandle) -> Inspection:
        self._check_account(handle)
        e2b_id = self._found(handle)
        if e2b_id is None or not self._is_known(e2b_id):
            if e2b_id is not None:
                self._account.forget(e2b_id)
            return self._gone(e2b_id)
        try:
            how = self._how_ended(e2b_id)
        except SandboxLostError:
            self._account.forget(e2b_id)
            return self._gone(e2b_id)
        except BackendUnavailableError:
            raise
        except ExecutorError as error:  # an answer, and none to what was asked
            raise BackendUnavailableError(str(error), error.code) from None
        if how is None:
            return Inspection(alive=True)
        return Inspection(alive=False, cause=_ENDS.get(how, f"its runner has ended: {how}"))

    def _gone(self, e2b_id: str | None) -> Inspection:
        due = e2b_id is not None and self._account.is_due(e2b_id)
        return Inspection(alive=False, cause=_ENDS[_EXPIRED] if due else GONE)

    def _how_ended(self, e2b_id: str) -> str | None:
        """What the runner's keeper wrote down; None while it runs."""
        try:
            return self._read_end(e2b_id)
        except (SandboxLostError, BackendUnavailableError) as error:
            if not isinstance(error, SandboxLostError) and error.code != LOG_IN:
                raise
        self._account.forget(e2b_id)  # what we know is old if it has been paused, or given another token; connecting tells
        return self._read_end(e2b_id)

    def _read_end(self, e2b_id: str) -> str | None:
        sandbox = self._account.sandbox(e2b_id)
        return self._account.ask_inside("asking for its runner's end", lambda: _read_end(sandbox))

    def extend(self, handle: SandboxHandle, expires_at_s: float) -> None:
        self._check_account(handle)
        e2b_id = self._found(handle)
        left_s = max(0.0, expires_at_s - self._clock())
        try:
            if e2b_id is None:
                raise SandboxLostError("there is none")
            found, seconds = e2b_id, lease_s(left_s)
            self._account.ask("moving its deadline", lambda: Sandbox.set_timeout(found, timeout=seconds, **self._account.options))
            self._account.expect_end(found, seconds)
        except SandboxLostError:
            raise SandboxLostError(f"the microVM of sandbox {handle.sandbox_id!r} is gone, so its lifetime cannot be moved") from None

    def list_owned(self) -> Iterable[Owned]:
        """By pages, as they are wanted."""
        for page in self._account.pages("listing its sandboxes", self._names.query()):
            for info in page:
                sandbox_id = info.metadata.get(SANDBOX_ID, "")
                if self._names.has(info.metadata, sandbox_id):
                    yield Owned(
                        handle=self._handle(sandbox_id, info.sandbox_id),
                        created_at_s=info.started_at.timestamp(),
                        expires_at_s=info.end_at.timestamp() - SLACK_S,
                    )

    def _handle(self, sandbox_id: str, e2b_id: str) -> SandboxHandle:
        data = {E2B_ID: e2b_id, ACCOUNT: self._account.fingerprint}
        return SandboxHandle(backend=self.name, sandbox_id=sandbox_id, placement=self.placement, data=data)

    @property
    def _account(self) -> Account:
        return account_with(self._access)

    @property
    def _machines(self) -> Machines:
        return Machines(self._account, self._names, self._options, self._pace)


def _read_end(sandbox: Sandbox) -> str | None:
    try:
        return str(sandbox.files.read(ENDED, user="root")).strip()
    except FileNotFoundException:
        return None


_process_pace = ProcessPace()
