"""The Celery app and its tasks, all thin.

``ring`` is the doorbell of every op. The others are for raw Celery use: ``run_command.delay(sandbox_id, "pytest -q").get()``
here, or ``send_task("cifixer_exec.run_command", …)`` from any process; the task id is the op id.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import uuid
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

from celery import Celery, Task, signals
from celery.exceptions import Ignore

from cifixer_exec.channel.portal import process_portal
from cifixer_exec.errors import ExecutorError, InvalidRequestError
from cifixer_exec.model import NEVER_BEGUN, Command, ExecRecord, ExecResult, OutputChunk
from cifixer_exec.operations import new_op_id
from cifixer_exec.output import OutputCollector
from cifixer_exec.queue_port import command_op, create_op
from cifixer_exec.queues import placement_queue
from cifixer_exec.settings import AppConfig
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import End, NewOp
from cifixer_exec.wiring import (
    make_beat_exposure,
    make_exposure,
    make_journal,
    make_reaper,
    make_runtime,
    make_spec,
    worker_config,
    worker_queues,
)
from cifixer_exec.worker.exposure import Exposure
from cifixer_exec.worker.runtime import DETACHED, PASSED_ON, WorkerRuntime
from cifixer_exec.worker.steps import RuntimeStep, boot_name, or_exit, runtime, select_queues

log = logging.getLogger(__name__)

app = Celery("cifixer_exec", set_as_current=False)
app.config_from_object("cifixer_exec.celeryconfig")


class _RuntimeStep(RuntimeStep):
    def make_runtime(self, wid: str) -> WorkerRuntime:
        return make_runtime(worker_config(), wid=wid, answer=_answer)

    def make_exposure(self, worker: WorkerRuntime) -> Exposure | None:
        return make_exposure(worker_config(), worker)


app.steps["worker"].add(_RuntimeStep)


@signals.celeryd_init.connect
def _name_worker(instance: Any = None, **_: Any) -> None:
    if instance.app is app:
        instance.hostname = boot_name(instance.hostname)


@signals.celeryd_after_setup.connect
def _select_queues(instance: Any = None, **_: Any) -> None:
    """This worker's backend and placement decide what it consumes, not the command line."""
    if instance.app is app:
        select_queues(instance, or_exit(lambda: worker_queues(worker_config())))


@signals.beat_init.connect
def _expose_beat(sender: Any = None, **_: Any) -> None:
    """In the process of beat: what it sends is what shows that it works."""
    if sender is None or sender.app is not app:
        return

    def make() -> Exposure | None:
        made = make_beat_exposure(worker_config())
        if made is None:
            return None
        exposure, sent = made
        signals.after_task_publish.connect(lambda **_: sent(), weak=False)
        return exposure

    or_exit(make)


@signals.after_setup_logger.connect
def _quieten(**_: Any) -> None:
    """Two lines per doorbell tell nothing that the journal does not, and cost as much as the doorbell."""
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)


@app.task(name="cifixer_exec.ring", ignore_result=True)
def ring(_sandbox_id: str, op_id: str) -> None:
    """The doorbell: look at this op. All it needs is in the journal."""
    runtime().handle(op_id)


@app.task(name="cifixer_exec.reap", ignore_result=True)
def reap() -> None:
    """By beat: let one worker of each placement reap."""
    worker = runtime()
    found = worker.portal.call(worker.journal.workers())
    for queue in sorted({placement_queue(w.info["backend"], w.info["placement"]) for w in found}):
        reap_placement.apply_async(queue=app.amqp.queues.get(queue) or _queue(queue), expires=60)


@app.task(name="cifixer_exec.reap_placement", ignore_result=True)
def reap_placement() -> None:
    """Reap this worker's own placement."""
    worker = runtime()
    worker.portal.call(make_reaper(worker_config(), worker.journal, count=worker.tally.reaped).reap())


class OpTask(Task):  # type: ignore[type-arg]  # generic in the stubs only
    """A task whose id is an op id. Sent with :meth:`delay`, its payload goes into the journal first and only ids travel in the message,
    so commands, environments and secrets never show in Flower, events or logs.
    """

    abstract = True
    ignore_result = False
    argsrepr = "(…)"

    def apply_async(  # type: ignore[override]  # the options are handed on as they are
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, **options: Any
    ) -> Any:
        op = replace(self.make_op(task_id or new_op_id(), *(args or ()), **(kwargs or {})), raw=True)
        process_portal().call(_client_journal(os.getpid()).submit(op))
        hidden = {"argsrepr": f"({op.sandbox_id!r}, …)", "kwargsrepr": "{}"}
        return super().apply_async((op.sandbox_id,), {"journaled": True}, task_id=op.op_id, **{**options, **hidden})

    def apply_again(self, sandbox_id: str | None) -> None:
        """Send the current request once more for the op that is journaled already: the same id, links, chain and chord."""
        again = self.signature_from_request(self.request, (sandbox_id,), {"journaled": True})
        super().apply_async(again.args, again.kwargs, **again.options)

    def make_op(self, op_id: str, *args: Any, **kwargs: Any) -> NewOp:
        """The op that this call means."""
        raise NotImplementedError

    # Celery calls these once its result backend has the answer.
    def on_success(self, _result: Any, task_id: str, _args: Any, _kwargs: Any) -> None:
        _strike_off(task_id)

    def on_failure(self, _error: Any, task_id: str, _args: Any, _kwargs: Any, _info: Any) -> None:
        _strike_off(task_id)


class _RunCommand(OpTask):
    abstract = True

    def make_op(self, op_id: str, *args: Any, **kwargs: Any) -> NewOp:
        return _command_op(op_id, *args, **kwargs)


class _CreateSandbox(OpTask):
    abstract = True

    def make_op(self, op_id: str, *args: Any, **kwargs: Any) -> NewOp:
        return _create_op(op_id, *args, **kwargs)


class _TeardownSandbox(OpTask):
    abstract = True

    def make_op(self, op_id: str, *args: Any, **kwargs: Any) -> NewOp:
        return _teardown_op(op_id, *args, **kwargs)


@app.task(name="cifixer_exec.run_command", base=_RunCommand, bind=True)
def run_command(self: Any, /, sandbox_id: str, command: Any = None, *, journaled: bool = False, **options: Any) -> dict[str, Any]:
    """Run a command; the result as a dict: status, exit_code, signal, stdout, stderr (text), sizes, duration_s, cause, op_id.

    ``options``: env, cwd, timeout_s, stdin (text), output_limit_bytes. Streams that are not UTF-8 come in ``stdout_base64`` too.
    """
    collector, end = _carry_out(self, sandbox_id, journaled, lambda op_id: _command_op(op_id, sandbox_id, command, **options))
    return _command_result(self.request.id, collector, end)


@app.task(name="cifixer_exec.create_sandbox", base=_CreateSandbox, bind=True)
def create_sandbox(self: Any, /, sandbox_id: str | None = None, *, journaled: bool = False, **overrides: Any) -> dict[str, Any]:
    """Make a sandbox; ``overrides`` are fields of AppConfig. Returns ``{"sandbox_id": …}``."""
    if not journaled and sandbox_id is None:
        sandbox_id = f"sb-{uuid.uuid5(uuid.NAMESPACE_OID, self.request.id).hex[:20]}"
    _carry_out(self, sandbox_id, journaled, lambda op_id: _create_op(op_id, sandbox_id, **overrides))
    return {"sandbox_id": sandbox_id}


@app.task(name="cifixer_exec.teardown_sandbox", base=_TeardownSandbox, bind=True)
def teardown_sandbox(self: Any, /, sandbox_id: str, *, journaled: bool = False) -> dict[str, Any]:
    """End a sandbox."""
    _carry_out(self, sandbox_id, journaled, lambda op_id: _teardown_op(op_id, sandbox_id))
    return {"sandbox_id": sandbox_id}


def _carry_out(task: Any, sandbox_id: str | None, journaled: bool, make_op: Any) -> tuple[OutputCollector, End]:
    """Journal the op unless its sender did, run it here if this worker can, and wait for its end.

    A worker that drains, or loses its lease, sends the task on under the same id: whoever gets it waits for the same op.
    (A worker that is killed takes the Celery task with it; the op goes on all the same, and its result is in the journal.)

    Raises:
        ExecutorError: as the op failed; Celery stores its class and message.
    """
    worker, op_id = runtime(), task.request.id
    op = None if journaled else replace(make_op(op_id), raw=True)
    try:
        if op is not None:
            worker.portal.call(worker.journal.submit(op))
        outcome = worker.handle(op_id) if worker.portal.call(_is_mine(worker, op_id)) else ""
        if outcome in (DETACHED, PASSED_ON):
            raise CancelledError
        return worker.portal.call(_gather(worker.journal, op_id))
    except (CancelledError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not worker.stopped:
            raise
        task.apply_again(sandbox_id)
        raise Ignore from None


async def _is_mine(worker: WorkerRuntime, op_id: str) -> bool:
    """Raw tasks come to any worker; only one that can reach the op's sandbox may take the op."""
    op = await worker.journal.op(op_id)
    record = await worker.journal.sandbox(op.sandbox_id) if op is not None else None
    return record is not None and worker.serves(record)


def _strike_off(op_id: str) -> None:
    """No janitor need look after this answer. Not waited for: if it fails one will, and finds it given."""
    with suppress(RuntimeError):  # the worker is just ending
        runtime().portal.submit(runtime().journal.answered(op_id))


async def _answer(journal: Journal, op_id: str) -> None:
    """Give Celery the answer to a raw task whose op has ended: whoever waited for it may have been killed. Doing it twice is harmless."""
    try:
        if not await asyncio.to_thread(app.AsyncResult(op_id).ready):
            await asyncio.to_thread(*await _stored_answer(journal, op_id))
            log.warning("raw task %s: its worker had gone before it could give the answer", op_id)
    except Exception:
        log.exception("raw task %s could not be given its answer", op_id)  # it will be tried again, and must not stop the others
        return
    await journal.answered(op_id)


async def _stored_answer(journal: Journal, op_id: str) -> tuple[Any, ...]:
    """The call that stores it, as Celery itself would have."""
    op = await journal.op(op_id)
    if op is None:
        return (app.backend.mark_as_failure, op_id, ExecutorError(f"the result of op {op_id} was kept long enough"))
    try:
        collector, end = await _gather(journal, op_id)
    except ExecutorError as error:
        return (app.backend.mark_as_failure, op_id, error)
    result = _command_result(op_id, collector, end) if op.kind == "start" else {"sandbox_id": op.sandbox_id}
    return (app.backend.mark_as_done, op_id, result)


async def _gather(journal: Journal, op_id: str) -> tuple[OutputCollector, End]:
    collector = OutputCollector()
    async for item in journal.follow(op_id):
        if isinstance(item, OutputChunk):
            collector.add(item)
        elif item.error is not None:
            raise item.error
        else:
            return collector, item
    raise ExecutorError(f"op {op_id} ended without an answer")


def _command_op(op_id: str, sandbox_id: str, command: Any, **options: Any) -> NewOp:
    config = worker_config()
    unknown = set(options) - {"env", "cwd", "timeout_s", "stdin", "output_limit_bytes"}
    if unknown:
        raise InvalidRequestError(
            f"run_command does not know {', '.join(sorted(unknown))}: take env, cwd, timeout_s, stdin, output_limit_bytes"
        )
    stdin = options.pop("stdin", "")
    given = {k: v for k, v in options.items() if v is not None}
    defaults = {"timeout_s": config.command_timeout_s, "output_limit_bytes": config.output_limit_bytes}
    parsed = Command.parse(command, stdin=stdin.encode() if isinstance(stdin, str) else stdin, **{**defaults, **given})
    return command_op(op_id, sandbox_id, [parsed], wait_s=config.start_timeout_s)


def _create_op(op_id: str, sandbox_id: str | None = None, **overrides: Any) -> NewOp:
    config = AppConfig.from_env(**overrides)
    spec = make_spec(config, sandbox_id)
    return create_op(op_id, spec, wait_s=config.start_timeout_s)


def _teardown_op(op_id: str, sandbox_id: str) -> NewOp:
    return NewOp(op_id=op_id, sandbox_id=sandbox_id, kind="destroy", timeout_s=worker_config().start_timeout_s)


def _command_result(op_id: str, collector: OutputCollector, end: End) -> dict[str, Any]:
    records = (end.result or {}).get("records")
    return _result_dict(collector.result(ExecRecord.from_json(records[0]) if records else NEVER_BEGUN, op_id))


def _result_dict(result: ExecResult) -> dict[str, Any]:
    data: dict[str, Any] = {
        "status": result.status.value,
        "exit_code": result.exit_code,
        "signal": result.signal,
        "stdout": result.text,
        "stderr": result.stderr_text,
        "truncated": result.truncated,
        "stdout_bytes": result.stdout_bytes,
        "stderr_bytes": result.stderr_bytes,
        "duration_s": result.duration_s,
        "cause": result.cause,
        "op_id": result.op_id,
    }
    streams: Mapping[str, bytes] = {"stdout": result.stdout, "stderr": result.stderr}
    exact = {f"{name}_base64": base64.b64encode(raw).decode() for name, raw in streams.items() if data[name].encode() != raw}
    return {**data, **exact}


@cache
def _client_journal(_pid: int) -> Journal:
    """For :meth:`OpTask.apply_async`, on the process's portal: one per process, because sockets do not survive a fork."""
    return make_journal(worker_config())


def _queue(name: str) -> Any:
    from kombu import Exchange, Queue

    return Queue(name, Exchange("sbx", type="direct"), routing_key=name)
