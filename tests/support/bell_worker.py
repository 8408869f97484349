"""``python bell_worker.py <url> <namespace>``: a real Celery worker that prints one JSON line for each doorbell."""

from __future__ import annotations

import json
import sys
from typing import Any

from celery import Celery
from celery.signals import worker_ready
from kombu import Exchange, Queue


def tell(*values: Any) -> None:
    """One line to the parent."""
    print(json.dumps(values), flush=True)


def main(url: str, namespace: str) -> None:
    """Work until killed."""
    app = Celery("bell", broker=url)
    app.conf.update(
        broker_transport_options={"global_keyprefix": f"{namespace}:", "priority_steps": [0]},
        task_queues=[Queue("pool", Exchange("sbx", "direct"), routing_key="pool")],
        task_create_missing_queues=False,
        task_ignore_result=True,
        worker_direct=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )

    @app.task(name="cifixer_exec.ring", bind=True)
    def ring(task: Any, sandbox_id: str, op_id: str) -> None:
        tell(sandbox_id, op_id, task.request.id, task.request.root_id, task.request.delivery_info["routing_key"])

    @worker_ready.connect
    def ready(**_: Any) -> None:
        tell("ready")

    app.Worker(hostname="w1@test", pool="solo", without_gossip=True, without_mingle=True, quiet=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
