"""What things in a cluster are called, and the labels and annotations that say whose they are.

::

    Job  cifixer-<sandbox id, as far as it fits>-<seal>     a sandbox; its Pod has the name with five letters more

Values of labels are short and plain (https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/), so labels
have hashes to select by, and annotations what they stand for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cifixer_exec.model import check_id

APP, APP_VALUE = "app", "ci-fixer-sandbox"
INSTANCE, SANDBOX, NETWORK = "cifixer.dev/instance", "cifixer.dev/sandbox", "cifixer.dev/network"
SANDBOX_ID, NAMESPACE, PLACEMENT = "cifixer.dev/sandbox-id", "cifixer.dev/namespace", "cifixer.dev/placement"
CREATED_AT, EXPIRES_AT, LABELS = "cifixer.dev/created-at", "cifixer.dev/expires-at", "cifixer.dev/labels"
#: Of the Pod: the files /etc/passwd and /etc/group of its sandbox.
PASSWD, GROUP = "cifixer.dev/passwd", "cifixer.dev/group"
#: A Job's name is also a label's value, of 63 characters at the most; its Pods need six of a host name's 63.
_MOST_SLUG = 30


@dataclass(frozen=True)
class Names:
    """Of all that belongs to one namespace of ours. Names follow from the sandbox's id, so that a repeated create finds what there is."""

    namespace: str

    def job(self, sandbox_id: str) -> str:
        """Raises InvalidRequestError for an id that is none."""
        slug = re.sub(r"[^a-z0-9]+", "-", check_id(sandbox_id, "sandbox id").lower())[:_MOST_SLUG].strip("-")
        return f"cifixer-{slug}-{self.seal(sandbox_id)}"

    def seal(self, sandbox_id: str) -> str:
        """What stands for the sandbox in names and labels."""
        return _hash(f"{self.namespace}\0{sandbox_id}")

    def labels(self, sandbox_id: str, network: str) -> dict[str, str]:
        return {APP: APP_VALUE, INSTANCE: _hash(self.namespace), SANDBOX: self.seal(sandbox_id), NETWORK: network}

    def annotations(self, sandbox_id: str, placement: str) -> dict[str, str]:
        return {SANDBOX_ID: sandbox_id, NAMESPACE: self.namespace, PLACEMENT: placement}

    def selector(self, sandbox_id: str | None = None) -> str:
        """For the cluster's listings: what is ours, or one sandbox's."""
        ours = f"{APP}={APP_VALUE},{INSTANCE}={_hash(self.namespace)}"
        return ours if sandbox_id is None else f"{ours},{SANDBOX}={self.seal(sandbox_id)}"

    def has(self, found: Mapping[str, Any], sandbox_id: str) -> bool:
        """Whether an object belongs to that sandbox of ours, and has not only a name like it."""
        told = annotations_of(found)
        return (told.get(NAMESPACE), told.get(SANDBOX_ID)) == (self.namespace, sandbox_id)


def annotations_of(found: Mapping[str, Any]) -> dict[str, str]:
    return dict(found["metadata"].get("annotations") or {})


def runner_token(job_uid: str) -> str:
    """The secret of the channel to a sandbox's runner.

    Nothing is stored for it: the API server chose the Job's uid at random and tells it to nobody in the Pod, which has no credentials
    (https://github.com/google/uuid, version 4: 122 random bits). Whoever may read the Job may as well delete it.
    """
    return hashlib.sha256(f"cifixer-exec channel\0{job_uid}".encode()).hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
