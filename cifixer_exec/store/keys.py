"""The names of the Redis keys that Python reads directly; ``journal.lua`` lists them all with types and lifetimes."""

from __future__ import annotations

import re

from cifixer_exec.errors import InvalidRequestError

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,199}\Z")
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_QUEUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,249}\Z")


def _checked(value: str, pattern: re.Pattern[str], what: str, allowed: str) -> str:
    if not pattern.match(value):
        raise InvalidRequestError(f"{what} {value!r} is not usable: take {allowed}")
    return value


def check_namespace(value: str) -> str:
    """Return ``value`` if it can begin every key. It has no colon, so that no namespace is the beginning of another's keys.

    Raises:
        InvalidRequestError: it cannot.
    """
    return _checked(value, _NAMESPACE, "namespace", "1 to 100 of the characters A-Z a-z 0-9 . _ -")


def check_worker_id(value: str) -> str:
    """Return ``value`` if it can be a worker id (a Celery node name).

    Raises:
        InvalidRequestError: it cannot.
    """
    return _checked(value, _WORKER_ID, "worker id", "1 to 200 of the characters A-Z a-z 0-9 . _ @ -")


def check_queue(value: str) -> str:
    """Return ``value`` if it can be the name of a Celery queue.

    Raises:
        InvalidRequestError: it cannot.
    """
    return _checked(value, _QUEUE, "queue", "1 to 250 of the characters A-Z a-z 0-9 . _ @ -")


class Keys:
    """Key names in one namespace."""

    def __init__(self, namespace: str) -> None:
        self.namespace = check_namespace(namespace)
        #: Goes into kombu's transport option ``global_keyprefix``, so that Celery's keys lie in the namespace too.
        self.prefix = f"{namespace}:"
        self.workers = f"{self.prefix}workers"
        self.sandboxes = f"{self.prefix}sandboxes"
        self.unowned = f"{self.prefix}unowned"

    def worker(self, worker_id: str) -> str:
        """The lease of a worker."""
        return f"{self.prefix}worker:{worker_id}"

    def sandbox(self, sandbox_id: str) -> str:
        """The registry entry of a sandbox."""
        return f"{self.prefix}sandbox:{sandbox_id}"

    def op(self, op_id: str) -> str:
        """The journal entry of an op."""
        return f"{self.prefix}op:{op_id}"

    def out(self, op_id: str) -> str:
        """The stream of an op's output and end."""
        return f"{self.prefix}out:{op_id}"

    def control(self, worker_id: str) -> str:
        """The pub/sub channel that names ops to cancel to a worker."""
        return f"{self.prefix}ctl:{worker_id}"

    def queue(self, name: str) -> str:
        """The list of a Celery queue."""
        return f"{self.prefix}{name}"


def direct_queue(worker_id: str) -> str:
    """The Celery queue that only this worker consumes (``worker_direct``)."""
    return f"{worker_id}.dq2"
