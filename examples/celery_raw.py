"""Raw Celery, from a process that does not import cifixer_exec: an existing service needs nothing but Celery and three names.

Start a stack with ``cifixer-exec up``, export the CIFIXER_REDIS_URL that it prints, then ``python examples/celery_raw.py``.
With cifixer_exec at hand it is shorter, and the command stays out of the message::

    from cifixer_exec.tasks import run_command
    run_command.delay(sandbox_id, "pytest -q").get(timeout=60)
"""

from __future__ import annotations

import os
import sys
from typing import Any

from celery import Celery
from celery.exceptions import TimeoutError as NotYetError
from kombu import Exchange, Queue

NAMESPACE = os.environ.get("CIFIXER_NAMESPACE", "cifixer")
#: Where any worker of the backend looks; the worker that took the task finds the sandbox's owner.
POOL: Any = Queue("sandbox.local", Exchange("sbx", type="direct"), routing_key="sandbox.local")
PATIENCE_S = 120


def make_app(redis_url: str) -> Celery:
    """A client of the stack. kombu writes unix:// as redis+socket://; the prefix is the stack's namespace."""
    url = redis_url.replace("unix://", "redis+socket://", 1)
    app = Celery("client", broker=url, backend=url, set_as_current=False)
    prefix = {"global_keyprefix": f"{NAMESPACE}:"}
    app.conf.update(broker_transport_options=prefix, result_backend_transport_options=prefix, accept_content=["json"])
    return app


def call(app: Celery, task: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Send a task and wait for its result. The arguments are hidden from Flower and logs: they may hold secrets."""
    sent = app.send_task(f"cifixer_exec.{task}", args, kwargs, queue=POOL, argsrepr="(…)", kwargsrepr="{…}")
    for _ in range(PATIENCE_S):
        try:
            answer: dict[str, Any] = sent.get(timeout=1)
        except NotYetError:
            continue  # asked anew: Celery can miss a result that comes while it subscribes
        return answer
    raise NotYetError(f"{task} gave no result within {PATIENCE_S} s")


def main() -> int:
    """Make a sandbox, run two commands, end it; the exit code of the second."""
    url = os.environ.get("CIFIXER_REDIS_URL")
    if not url:
        sys.exit("celery_raw: CIFIXER_REDIS_URL is not set: start a stack with `cifixer-exec up` and export the line that it prints")
    app = make_app(url)
    sandbox_id = call(app, "create_sandbox")["sandbox_id"]
    try:
        call(app, "run_command", sandbox_id, "echo 'print(6 * 7)' > answer.py")
        result = call(app, "run_command", sandbox_id, ["python3", "answer.py"], timeout_s=30)
    finally:
        call(app, "teardown_sandbox", sandbox_id)
    print(f"{sandbox_id}: {result['status']} {result['exit_code']}: {result['stdout'].strip()}")
    return int(result["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
