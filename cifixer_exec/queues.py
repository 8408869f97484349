"""The names of the Celery queues; the direct queue of a worker is Celery's own (``<node name>.dq2``)."""

from __future__ import annotations

#: Periodic work that any worker can do.
MAINTENANCE = "cifixer.maintenance"


def pool_queue(backend: str) -> str:
    """Where sandboxes of ``backend`` are created: any worker of that backend takes it."""
    return f"sandbox.{backend}"


def placement_queue(backend: str, placement: str) -> str:
    """Where ops of ownerless sandboxes of one placement wait: only workers that can reach it consume it."""
    return f"sandbox.{backend}.{placement}"
