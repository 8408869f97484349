"""The yardstick: a Celery task that does nothing, with a result backend, on the same Redis, in a worker of the same kind."""

import os

from celery import Celery

_url = os.environ.get("BENCH_BROKER", "memory://")
app = Celery("bench_noop", broker=_url, backend=_url if "redis" in _url else None, set_as_current=False)
app.conf.update(
    worker_pool="threads",
    worker_concurrency=64,
    worker_prefetch_multiplier=1,
    task_default_queue="bench.noop",
    broker_transport_options={"priority_steps": [0]},
    result_backend_thread_safe=True,
    worker_hijack_root_logger=False,
)


@app.task(name="bench.noop")
def noop() -> None:
    """Nothing."""
