"""Where the worker's own parts hook into Celery's start and stop."""

from __future__ import annotations

import logging
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from os import EX_CONFIG
from typing import Any, TypeVar

from celery import bootsteps
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu import Exchange, Queue

from cifixer_exec.errors import ExecutorError, QueueUnavailableError
from cifixer_exec.worker.exposure import Exposure
from cifixer_exec.worker.runtime import WorkerRuntime

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Celery's thread, the event loop and the pool hand each op to one another; with CPython's 5 ms each hand-over can wait that long
#: for the GIL. https://docs.python.org/3/library/sys.html#sys.setswitchinterval
SWITCH_INTERVAL_S = 0.0005
START_RETRY_S = 0.5
_runtime: WorkerRuntime | None = None


def runtime() -> WorkerRuntime:
    """The runtime of this worker process.

    Raises:
        RuntimeError: this process is no worker (a task was called in place).
    """
    if _runtime is None:
        raise RuntimeError("this process is no cifixer-exec worker: send the task to one (task.delay), do not call it")
    return _runtime


def or_exit(make: Callable[[], T]) -> T:
    """What ``make`` makes. What a worker or beat cannot begin without ends the process with one line: Celery would print a traceback."""
    try:
        return make()
    except ExecutorError as error:
        log.critical("%s", error)
        raise SystemExit(EX_CONFIG) from None


def boot_name(node_name: str) -> str:
    """A node name with a boot id, so that a restarted worker is a new owner: Redis would hand it its forerunner's messages else."""
    name, _, host = node_name.partition("@")
    return f"{name}-{uuid.uuid4().hex[:8]}@{host}"


def select_queues(worker: Any, names: list[str]) -> None:
    """Consume exactly ``names`` (and the direct queue, which Celery adds itself when ``worker_direct`` is set).

    The direct queue is read without acknowledgements: those are two round trips per doorbell on the thread that reads the
    queues, for messages that the janitor rings again when they are lost. (The shared queues keep them, for the prefetch limit.)
    """
    queues = worker.app.amqp.queues
    exchange = Exchange("sbx", type="direct")
    direct = [name for name in queues.consume_from if name.endswith(".dq2")]
    for name in names:
        queues.add(Queue(name, exchange, routing_key=name))
    queues.select([*names, *direct])
    for name in direct:
        queues[name].no_ack = True


class RuntimeStep(bootsteps.StartStopStep):
    """Takes the lease before anything is consumed and drains after the consumer has stopped: Celery stops in reverse order.

    :meth:`make_runtime` is the subclass's: only the wiring builds objects.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._stopped = False
        self._exposure: Exposure | None = None

    def start(self, parent: Any) -> None:
        global _runtime  # noqa: PLW0603  # one worker per process, and tasks have no other way to it
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        worker = or_exit(lambda: self.make_runtime(parent.hostname))
        self._exposure = or_exit(lambda: self.make_exposure(worker))
        _runtime = worker
        self._take_lease(worker)
        log.info("worker %s holds its lease", parent.hostname)

    def _take_lease(self, worker: WorkerRuntime) -> None:
        """Redis may start after the worker, as it may go and come back later."""
        while True:
            try:
                return worker.start()
            except QueueUnavailableError as error:
                log.warning("no lease yet: %s", error)
            state.maybe_shutdown()
            time.sleep(START_RETRY_S)

    def make_runtime(self, wid: str) -> WorkerRuntime:
        """The runtime of a worker with this id."""
        raise NotImplementedError

    def make_exposure(self, worker: WorkerRuntime) -> Exposure | None:
        """What shows ``worker`` to Prometheus and health checks; None when nobody wants that."""
        raise NotImplementedError

    def stop(self, _parent: Any) -> None:
        if _runtime is not None and not self._stopped:
            self._stopped = True
            _runtime.stop()
        if self._exposure is not None:
            self._exposure.close()
            self._exposure = None

    def terminate(self, parent: Any) -> None:
        self.stop(parent)


class PatientConsumer(Consumer):
    """Reconnects within a second of Redis coming back; Celery's own back-off grows to 30 s and cannot be set."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # A kombu channel that has lost its connection fails with "'NoneType' object has no attribute …" when it acknowledges or gives
        # back messages, which would end the worker as "unrecoverable". https://github.com/celery/kombu/issues/582
        lost: Any = self
        lost.connection_errors = (*lost.connection_errors, AttributeError)  # untyped in the stubs

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        with warnings.catch_warnings():
            # It warns at each reconnect of what Celery will do to tasks with late acks, and there are none here.
            warnings.simplefilter("ignore", PendingDeprecationWarning)
            try:
                super().on_connection_error_after_connected(exc)
            except AttributeError as error:
                log.warning("the lost connection could not be closed in order: %s", error)
                self.connection = None

    def ensure_connected(self, conn: Any) -> Any:
        conn = conn.ensure_connection(
            self._reconnect_error, None, interval_start=0.2, interval_step=0.2, interval_max=1.0, callback=self._should_stop
        )
        conn.transport_options = self.app.conf.broker_transport_options
        return conn

    def _reconnect_error(self, error: Exception, interval_s: float) -> None:
        log.warning("no connection to the broker (%s), next try in %.1f s", type(error).__name__, interval_s)

    @staticmethod
    def _should_stop() -> None:
        state.maybe_shutdown()
