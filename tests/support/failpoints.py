"""Places in a worker where it can be killed or frozen. They live in the tests alone: nothing in the package knows them.

:func:`install` wraps the verbs of the journal, the backend and the channel of *this* process; :mod:`tests.support.zygote` calls
it in a worker before Celery starts.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

#: Around these, a point ``<name>.before`` and one ``<name>.after``.
_JOURNAL = (
    *("take", "publish", "finish", "ready", "close", "renew", "ring", "sweep"),
    *("set_expiry", "cancelled_ops", "leave", "release"),
)
_BACKEND = ("create", "destroy", "extend", "inspect", "list_owned")
#: ``start.sent``: the runner has the request, nobody has seen its answer. ``start.ended``: the record was seen, and told to nobody.
_COMMAND = ("start.before", "start.sent", "output.first", "output.next", "start.ended")
#: The steps of a verb of the Docker backend, by the names that docker-py gives them: between two of them something is half made.
_DAEMON = ("create_container", "start", "remove_container", "create_volume", "remove_volume")
#: The same for the Kubernetes backend: what it changes in the cluster, by method and kind; and the upload of the runner.
_API = {("POST", "jobs"): "post_job", ("PATCH", "jobs"): "patch_job", ("DELETE", "jobs"): "delete_job", ("DELETE", "pods"): "delete_pod"}
#: The same for the E2B backend, by its own steps: what is asked of the service and of the microVM.
_SERVICE = {"_create": "create", "_upload": "upload", "_run": "run", "remove": "kill"}

POINTS: tuple[str, ...] = (
    *(f"{verb}.{side}" for verb in (*_JOURNAL, *_BACKEND, "call") for side in ("before", "after")),
    *_COMMAND,
)
DAEMON_POINTS = tuple(f"daemon.{verb}.{side}" for verb in _DAEMON for side in ("before", "after"))
API_POINTS = tuple(f"api.{verb}.{side}" for verb in (*_API.values(), "upload") for side in ("before", "after"))
SERVICE_POINTS = tuple(f"service.{verb}.{side}" for verb in _SERVICE.values() for side in ("before", "after"))
ACTIONS = ("kill", "freeze", "hold", "note")
HOLD_S = 2.0


def points_of(backend: str) -> tuple[str, ...]:
    """Those that a worker of ``backend`` passes."""
    return POINTS + {"docker_local": DAEMON_POINTS, "kubernetes": API_POINTS, "e2b": SERVICE_POINTS}.get(backend, ())


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What to do at the ``hit``-th passing of ``point``, counting only ops of ``kind`` if one is given.

    ``note`` says only that the point was reached; ``hold`` keeps one thread for :data:`HOLD_S` and counts only once the process was
    frozen: so that of several threads which wake at once, a known one is first. The kind ``file`` stands for every request with one answer.

    Raises:
        ValueError: an unknown point or action.
    """

    point: str
    action: str = "kill"
    hit: int = 1
    kind: str = ""

    def __post_init__(self) -> None:
        known = (*POINTS, *DAEMON_POINTS, *API_POINTS, *SERVICE_POINTS)
        if self.point not in known:
            raise ValueError(f"failpoint {self.point!r} is not known: take one of {', '.join(known)}")
        if self.action not in ACTIONS:
            raise ValueError(f"action {self.action!r} is not known: take one of {', '.join(ACTIONS)}")

    def to_json(self) -> dict[str, Any]:
        """For the way to the worker."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse."""
        return cls(**data)


#: The kind of the op that the current task carries out; tasks and threads made for it inherit it.
_kind: ContextVar[str] = ContextVar("kind", default="")
_KINDS = ("create", "destroy", "start", "extend")


class Failpoints:
    """The armed points of this process. Thread-safe: leases and backends work in threads of their own."""

    def __init__(self, arms: Sequence[Arm], report: Path) -> None:
        self._lock = threading.Lock()
        self._left = {arm: arm.hit for arm in arms}
        self._was_frozen = False
        self._report = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def hit(self, point: str) -> None:
        """Pass ``point``: to come back from here is not promised."""
        for arm in self._due(point):
            os.write(self._report, f"{arm.action} {point} {os.getpid()}\n".encode())
            if arm.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif arm.action == "freeze":
                # To this thread: a signal to the process may be taken by another one, and this one would go on for a moment.
                self._was_frozen = True
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            elif arm.action == "hold":
                time.sleep(HOLD_S)

    def _due(self, point: str) -> list[Arm]:
        kind, due = _kind.get(), []
        with self._lock:
            for arm in list(self._left):
                if arm.point == point and arm.kind in ("", kind) and (arm.action != "hold" or self._was_frozen):
                    self._left[arm] -= 1
                    if self._left[arm] == 0:
                        del self._left[arm]
                        due.append(arm)
        return due


def install(arms: Sequence[Arm], report: Path) -> None:
    """Arm this process for good. Each point that acts first writes ``<action> <point> <pid>`` to the end of ``report``."""
    from docker import APIClient

    from cifixer_exec.backends.docker_local import DockerBackend
    from cifixer_exec.backends.e2b import E2BBackend
    from cifixer_exec.backends.e2b.machines import Machines
    from cifixer_exec.backends.kubernetes import KubernetesBackend
    from cifixer_exec.backends.local import LocalBackend
    from cifixer_exec.store.journal import Journal

    points = Failpoints(arms, report)
    for verb in _JOURNAL:
        setattr(Journal, verb, _around_coroutine(getattr(Journal, verb), verb, points))
    for backend in (LocalBackend, DockerBackend, KubernetesBackend, E2BBackend):
        for verb in _BACKEND:
            setattr(backend, verb, _around_function(getattr(backend, verb), verb, points))
    for verb in _DAEMON:
        setattr(APIClient, verb, _around_function(getattr(APIClient, verb), f"daemon.{verb}", points))
    for step, verb in _SERVICE.items():
        setattr(Machines, step, _around_function(getattr(Machines, step), f"service.{verb}", points))
    _wrap_cluster(points)
    _wrap_execution(points)
    _wrap_commands(points)


def _around_coroutine(inner: Callable[..., Any], name: str, points: Failpoints) -> Callable[..., Any]:
    @functools.wraps(inner)
    async def outer(*arguments: Any, **options: Any) -> Any:
        points.hit(f"{name}.before")
        answer = await inner(*arguments, **options)
        if name == "take":
            _enter(getattr(answer, "kind", ""))
        points.hit(f"{name}.after")
        return answer

    return outer


def _around_function(inner: Callable[..., Any], name: str, points: Failpoints) -> Callable[..., Any]:
    @functools.wraps(inner)
    def outer(*arguments: Any, **options: Any) -> Any:
        points.hit(f"{name}.before")
        answer = inner(*arguments, **options)
        points.hit(f"{name}.after")
        return answer

    return outer


def _wrap_cluster(points: Failpoints) -> None:
    from cifixer_exec.backends.kubernetes import upload
    from cifixer_exec.backends.kubernetes.cluster import Cluster

    ask = Cluster.ask

    @functools.wraps(ask)
    def asked(self: Cluster, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        kind = path.partition("/namespaces/")[2].split("/")[1:2]
        verb = _API.get((method, "".join(kind)), "other")
        return _around_function(ask, f"api.{verb}", points)(self, method, path, *arguments, **options)

    setattr(Cluster, "ask", asked)  # noqa: B010  # mypy refuses the assignment to a method
    upload.send_runner = _around_coroutine(upload.send_runner, "api.upload", points)


def _enter(kind: str) -> None:
    _kind.set(kind if kind in ("", *_KINDS) else "file")


def _wrap_execution(points: Failpoints) -> None:
    """The kind is known from here on, whatever became of the task that asked for the grant."""
    from cifixer_exec.sandbox import SandboxSession
    from cifixer_exec.worker.execution import Executor

    execute = Executor.execute

    @functools.wraps(execute)
    async def executed(self: Executor, taken: Any) -> None:
        _enter(taken.kind)
        await execute(self, taken)

    setattr(Executor, "execute", executed)  # noqa: B010  # mypy refuses the assignment to a method
    setattr(SandboxSession, "call", _around_coroutine(SandboxSession.call, "call", points))  # noqa: B010


def _wrap_commands(points: Failpoints) -> None:
    from cifixer_exec.backends.docker_local.stream import ExecTransport
    from cifixer_exec.backends.kubernetes import stream as kubernetes_stream
    from cifixer_exec.channel.channel import Channel
    from cifixer_exec.channel.transport import SocketTransport
    from cifixer_exec.model import ExecRecord

    run = Channel.run

    @functools.wraps(run)
    async def running(self: Channel, *arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        points.hit("start.before")
        first = True
        async with aclosing(run(self, *arguments, **options)) as items:
            async for item in items:
                if isinstance(item, ExecRecord):
                    points.hit("start.ended")
                else:
                    points.hit("output.first" if first else "output.next")
                    first = False
                yield item

    setattr(Channel, "run", running)  # noqa: B010
    for transport in (SocketTransport, ExecTransport, kubernetes_stream.ExecTransport):
        setattr(transport, "send", _sending(transport.send, points))  # noqa: B010
    _wrap_microvm_input(points)


def _wrap_microvm_input(points: Failpoints) -> None:
    """There a write is a request, which is answered when the bridge has it."""
    from e2b.sandbox_async.commands.command_handle import AsyncCommandHandle

    send = AsyncCommandHandle.send_stdin

    @functools.wraps(send)
    async def sent(self: Any, data: bytes, *arguments: Any, **options: Any) -> None:
        await send(self, data, *arguments, **options)
        if b'"verb":"start"' in data:
            points.hit("start.sent")

    setattr(AsyncCommandHandle, "send_stdin", sent)  # noqa: B010


def _sending(send: Callable[[Any, bytes], None], points: Failpoints) -> Callable[[Any, bytes], None]:
    @functools.wraps(send)
    def sent(self: Any, data: bytes) -> None:
        send(self, data)  # on the loop, which writes at once: the kernel keeps it for the other side even if this process dies now
        if b'"verb":"start"' in data[:200]:
            points.hit("start.sent")

    return sent
