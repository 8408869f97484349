"""In place of Celery beat, which would be one more process: asks the workers to reap."""

from __future__ import annotations

from celery import Celery
from kombu import Exchange, Queue

from cifixer_exec import AppConfig
from cifixer_exec.queues import MAINTENANCE


class Beat:
    """Blocking, so to be used in a thread."""

    def __init__(self, config: AppConfig) -> None:
        self._app = Celery("chaos-beat", broker=config.redis_url, set_as_current=False)
        self._app.conf.update(
            broker_transport_options={"global_keyprefix": f"{config.namespace}:", "priority_steps": [0], "socket_timeout": 2.0},
            task_queues=[Queue(MAINTENANCE, Exchange("sbx", "direct"), routing_key=MAINTENANCE)],
            task_create_missing_queues=False,
        )

    def reap(self, expires_s: float) -> None:
        """One round, by whichever worker gets it. Raises kombu's OperationalError when Redis is away."""
        self._app.send_task("cifixer_exec.reap", queue=MAINTENANCE, expires=expires_s, ignore_result=True, retry=False)

    def close(self) -> None:
        """Its connections."""
        self._app.close()
