"""What says in E2B's metadata whose a sandbox is. Times are not in it: a repeated create must be the same request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cifixer_exec.model import SandboxSpec

APP, APP_VALUE = "cifixer_app", "cifixer-exec"
NAMESPACE, SANDBOX_ID, LABELS = "cifixer_namespace", "cifixer_sandbox_id", "cifixer_labels"


@dataclass(frozen=True)
class Names:
    """Of all that belongs to one namespace of ours."""

    namespace: str

    def metadata(self, spec: SandboxSpec) -> dict[str, str]:
        """Of a new sandbox."""
        given = {LABELS: json.dumps(dict(spec.labels), sort_keys=True)} if spec.labels else {}
        return {**self.query(spec.sandbox_id), **given}

    def query(self, sandbox_id: str | None = None) -> dict[str, str]:
        """What is ours, or one sandbox's."""
        ours = {APP: APP_VALUE, NAMESPACE: self.namespace}
        return ours if sandbox_id is None else {**ours, SANDBOX_ID: sandbox_id}

    def has(self, metadata: Mapping[str, str], sandbox_id: str) -> bool:
        """Whether it belongs to that sandbox of ours, whatever a server makes of a query."""
        return all(metadata.get(name) == value for name, value in self.query(sandbox_id).items())

    def key(self, sandbox_id: str, asked: Mapping[str, Any], dead: str) -> str:
        """Of the request that makes it: the same for the same sandbox, so that E2B makes one; another behind the one that is ``dead``.

        Another also where something else is ``asked`` for: E2B refuses a key that it knows from another request.
        """
        return hashlib.sha256(json.dumps([self.namespace, sandbox_id, asked, dead], sort_keys=True).encode()).hexdigest()
