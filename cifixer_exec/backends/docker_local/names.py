"""What things on a daemon are called, and the labels that say whose they are.

::

    container  cifixer-<sandbox id>-<seal>        a sandbox
    volume     cifixer-expiry-<seal>-<time>       mounted nowhere: its labels carry the deadline that ``extend`` set, because a container's
                                                  own labels cannot be changed. The newest counts
    volume     cifixer-disk-<seal>                the sandbox's disk, where that was asked for instead of memory
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cifixer_exec.model import check_id

SANDBOX_ID, PLACEMENT, NAMESPACE = "cifixer.sandbox_id", "cifixer.placement", "cifixer.namespace"
EXPIRES_AT, CREATED_AT, SET_AT = "cifixer.expires_at", "cifixer.created_at", "cifixer.set_at"
#: Whoever can read it controls the daemon anyway.
TOKEN = "cifixer.token"  # noqa: S105  # its name


@dataclass(frozen=True)
class Names:
    """Of all that belongs to one namespace. Names follow from the sandbox's id, so that a repeated create finds what there is."""

    namespace: str

    def container(self, sandbox_id: str) -> str:
        """Raises InvalidRequestError for an id that is none."""
        return f"cifixer-{check_id(sandbox_id, 'sandbox id')}-{self._seal(sandbox_id)}"

    def disk(self, sandbox_id: str) -> str:
        return f"cifixer-disk-{self._seal(sandbox_id)}"

    def deadline(self, sandbox_id: str, set_at_ns: int) -> str:
        return f"cifixer-expiry-{self._seal(sandbox_id)}-{set_at_ns}"

    def labels(self, sandbox_id: str, placement: str) -> dict[str, str]:
        return {SANDBOX_ID: sandbox_id, PLACEMENT: placement, NAMESPACE: self.namespace}

    def has(self, labels: Mapping[str, str] | None, sandbox_id: str) -> bool:
        """Whether something with these labels belongs to that sandbox of ours."""
        found = labels or {}
        return (found.get(NAMESPACE), found.get(SANDBOX_ID)) == (self.namespace, sandbox_id)

    def filters(self, sandbox_id: str | None = None) -> dict[str, list[str]]:
        """For the daemon's listings: what is ours, or one sandbox's."""
        return {"label": [f"{NAMESPACE}={self.namespace}", SANDBOX_ID if sandbox_id is None else f"{SANDBOX_ID}={sandbox_id}"]}

    def _seal(self, sandbox_id: str) -> str:
        return hashlib.sha256(f"{self.namespace}\0{sandbox_id}".encode()).hexdigest()[:16]
