"""The contract of a backend: few synchronous verbs, no state of its own.

Everything a backend knows of a sandbox is in its :class:`SandboxHandle` (JSON) and on its platform, so any process of the
same placement can go on with it. Commands and files are none of its business: they go through the channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from cifixer_exec.backends.breaker import BreakerState
from cifixer_exec.channel.transport import Dial
from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import Capabilities, Health, Inspection, SandboxHandle, SandboxSpec


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A sandbox found on the platform by our labels. ``expires_at_s`` and ``created_at_s`` are Unix times.

    ``alive``: as the listing itself told; None where only :meth:`Backend.inspect` can.
    """

    handle: SandboxHandle
    created_at_s: float
    expires_at_s: float
    alive: bool | None = None


class Backend(ABC):
    """Called from any thread. Vendor errors end here: only :mod:`cifixer_exec.errors` come out."""

    name: str

    @property
    @abstractmethod
    def placement(self) -> str:
        """From where its sandboxes can be reached: the same text in every process that can."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What is truly enforced here."""

    @abstractmethod
    def probe(self) -> Health:
        """Whether sandboxes can be made now. Never raises: what is wrong is in the answer."""

    @abstractmethod
    def create(self, spec: SandboxSpec) -> SandboxHandle:
        """Make the sandbox and start its runner; labelled before it starts.

        Idempotent by ``spec.sandbox_id``: one that lives is adopted, so a repeated create is *not* an error.

        Raises:
            InvalidRequestError: the spec asks for what cannot be enforced here.
            SandboxStartError: it could not be made; what was begun is removed.
            BackendUnavailableError, CapacityError: nothing was begun.
        """

    @abstractmethod
    def dial(self, handle: SandboxHandle) -> Dial:
        """How to open a byte stream to the runner. Does no I/O itself; the returned function raises OSError or BackendUnavailableError."""

    @abstractmethod
    def destroy(self, handle: SandboxHandle) -> None:
        """End the sandbox with everything in it. One that is gone is *not* an error.

        Raises:
            BackendError: it may still be there; call again.
        """

    @abstractmethod
    def inspect(self, handle: SandboxHandle) -> Inspection:
        """Alive or not, and the cause of death. A sandbox that was never there is dead, *not* an error.

        Raises:
            BackendUnavailableError: the platform does not answer, so nothing is known.
        """

    @abstractmethod
    def extend(self, handle: SandboxHandle, expires_at_s: float) -> None:
        """Move the platform's own deadline. Raises SandboxLostError when the sandbox is gone."""

    @abstractmethod
    def list_owned(self) -> Iterable[Owned]:
        """Every sandbox of this placement that bears our labels, also half-made ones; where there may be very many, by and by.

        Raises:
            BackendUnavailableError: the platform does not answer (never an empty list instead).
        """

    @property
    def breaker_state(self) -> BreakerState:
        """Of the circuit breaker before its platform; where nothing is asked over a wire there is none."""
        return BreakerState.CLOSED

    def token(self, handle: SandboxHandle) -> str:  # noqa: ARG002  # for backends to override
        """The secret the runner wants in HELLO; empty where nothing inside can reach its socket."""
        return ""

    def check(self, spec: SandboxSpec) -> None:
        """Refuse what cannot be enforced, instead of being silently weaker.

        Raises:
            InvalidRequestError: names the first member that is too much.
        """
        can = self.capabilities
        asked = {
            "image": (spec.image, can.images),
            "memory_bytes": (spec.memory_bytes, can.memory),
            "cpus": (spec.cpus, can.cpus),
            "disk_bytes": (spec.disk_bytes, can.disk),
            "max_processes": (spec.max_processes, can.max_processes),
            "readonly_paths": (spec.readonly_paths or None, can.readonly_paths),
        }
        for name, (value, possible) in asked.items():
            if value is not None and not possible:
                raise InvalidRequestError(f"{name}={value!r} cannot be enforced by backend {self.name!r} here: {self.remedy_for(name)}")
        if spec.network is not None and spec.network not in can.networks:
            raise InvalidRequestError(
                f"network={spec.network!r} is not possible on backend {self.name!r}: take one of {', '.join(can.networks)}"
            )

    def remedy_for(self, name: str) -> str:  # noqa: ARG002  # for backends to override
        """What to do when ``name`` is asked for and not possible; backends say it more exactly."""
        return "leave it out or choose another backend"
