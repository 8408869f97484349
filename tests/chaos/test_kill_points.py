"""Each point where a worker can die: the caller only waits, and what it is told is whole and true; nothing happens twice.

All cases are played beforehand, several at a time, because each is mostly waiting for a lease to end.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from cifixer_exec import AppConfig, create_async_sandbox
from tests.chaos import cases
from tests.chaos.beat import Beat
from tests.chaos.cases import EXPECTED, OP, Outcome, Stage, Story, stage_config, until
from tests.chaos.plan import LEASE_S
from tests.chaos.workers import Worker, Workers
from tests.support.chaos_deaths import kill_all
from tests.support.contract_stack import on_present_backend
from tests.support.failpoints import Arm, points_of
from tests.support.redis_proxy import Port, RedisProxy
from tests.support.redis_server import redis_server

_AT_ONCE = 5


def _arms(kind: str, *points: str) -> list[Arm]:
    return [Arm(point=p, kind=kind) for p in points]


#: ``take.before`` knows no kind yet: the first passing is that of the create.
COMMAND = (
    Arm(point="take.before", hit=2),
    *_arms("start", "take.after", "start.before", "start.sent", "output.first", "publish.before", "publish.after"),
    *_arms("start", "output.next", "start.ended", "finish.before", "finish.after"),
    *(Arm(point=p, action="freeze", kind="start") for p in ("start.before", "finish.before")),
)
CREATE = (
    Arm(point="take.before"),
    *_arms("create", "take.after", "create.before", "create.after", "ready.before", "ready.after", "finish.before", "finish.after"),
)
DESTROY = _arms("destroy", "take.after", "destroy.before", "destroy.after", "close.before", "close.after", "finish.before", "finish.after")
WRITE = _arms("file", "call.before", "call.after", "finish.before", "finish.after")
#: The write before it passes the same points.
REMOVE = (Arm(point="call.after", kind="file", hit=2),)
EXTEND = _arms("extend", "extend.before", "extend.after", "set_expiry.after")


#: With containers: where the worker, the daemon and the container can differ about what has happened.
DOCKER_COMMAND = (
    *_arms("start", "start.before", "start.sent", "output.next", "finish.before"),
    Arm(point="start.before", action="freeze", kind="start"),
)
DOCKER_CREATE = _arms("create", "daemon.create_container.before", "daemon.create_container.after", "daemon.start.after", "ready.before")
DOCKER_DESTROY = _arms("destroy", "daemon.remove_container.before", "daemon.remove_container.after", "finish.before")
DOCKER_EXTEND = _arms("extend", "daemon.create_volume.after", "daemon.remove_volume.before", "daemon.remove_volume.after")


#: In a cluster: between worker, API server, controllers and kubelet.
KUBERNETES_COMMAND = DOCKER_COMMAND
KUBERNETES_CREATE = _arms("create", "api.post_job.before", "api.post_job.after", "api.upload.before", "api.upload.after", "ready.before")
KUBERNETES_DESTROY = _arms("destroy", "api.delete_job.before", "api.delete_job.after", "api.delete_pod.before", "finish.before")
KUBERNETES_EXTEND = _arms("extend", "api.patch_job.before", "api.patch_job.after")


#: With microVMs: between worker, E2B, and what is started within.
E2B_COMMAND = DOCKER_COMMAND
E2B_CREATE = _arms(
    "create", *(f"service.{verb}.{side}" for verb in ("create", "upload", "run") for side in ("before", "after")), "ready.before"
)
E2B_DESTROY = _arms("destroy", "service.kill.before", "service.kill.after", "finish.before")
E2B_EXTEND = _arms("extend", "extend.before", "extend.after")


def _named(kind: str, arms: Iterable[Arm], story: Story) -> dict[str, tuple[Arm, Story]]:
    return {f"{kind}-{arm.action}-{arm.point}": (arm, story) for arm in arms}


CASES = {
    **_named("command", COMMAND, cases.run_command),
    **_named("create", CREATE, cases.nothing),
    **_named("destroy", DESTROY, cases.nothing),
    **_named("write", WRITE, cases.write_file),
    **_named("remove", REMOVE, cases.remove_file),
    **_named("extend", EXTEND, cases.extend),
}
DOCKER_CASES = {
    **_named("command", DOCKER_COMMAND, cases.run_command),
    **_named("create", DOCKER_CREATE, cases.nothing),
    **_named("create", [Arm(point="daemon.create_container.before", action="freeze", kind="create")], cases.nothing),
    **_named("destroy", DOCKER_DESTROY, cases.nothing),
    **_named("write", _arms("file", "call.after"), cases.write_file),
    **_named("extend", DOCKER_EXTEND, cases.extend_twice),
}
KUBERNETES_CASES = {
    **_named("command", KUBERNETES_COMMAND, cases.run_command),
    **_named("create", KUBERNETES_CREATE, cases.nothing),
    **_named("create", [Arm(point="api.post_job.before", action="freeze", kind="create")], cases.nothing),
    **_named("destroy", KUBERNETES_DESTROY, cases.nothing),
    **_named("write", _arms("file", "call.after"), cases.write_file),
    **_named("extend", KUBERNETES_EXTEND, cases.extend_twice),
}
E2B_CASES = {
    **_named("command", E2B_COMMAND, cases.run_command),
    **_named("create", E2B_CREATE, cases.nothing),
    **_named("create", [Arm(point="service.create.before", action="freeze", kind="create")], cases.nothing),
    **_named("destroy", E2B_DESTROY, cases.nothing),
    **_named("write", _arms("file", "call.after"), cases.write_file),
    **_named("extend", E2B_EXTEND, cases.extend_twice),
}
ON = {"local": CASES, "docker_local": DOCKER_CASES, "kubernetes": KUBERNETES_CASES, "e2b": E2B_CASES}
ALL = [(backend, name) for backend, found in ON.items() for name in found]
CONTENT: dict[Story, bytes] = {cases.write_file: b"content", cases.extend_twice: b"moved"}
Played = dict[str, Outcome]


async def _play_all(backend: str, redis_url: str, directory: Path, names: list[str]) -> Played:
    workers, turns = await Workers.start(directory), asyncio.Semaphore(_AT_ONCE)

    async def one(name: str) -> Outcome:
        arm, story = ON[backend][name]
        async with turns:
            config = stage_config(backend, redis_url, f"kp{uuid4().hex[:8]}", directory / "state" / name)
            return await cases.play(workers, config, arm, story)

    try:
        return dict(zip(names, await asyncio.gather(*(one(n) for n in names)), strict=True))
    finally:
        await workers.stop()


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Short, and open to the user ids that sandboxes run as."""
    path = Path(tempfile.mkdtemp(prefix="kp-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, backend: str, redis_url: str, directory: Path) -> Played:
    """The outcomes of the backend's cases that this run of pytest asks for."""
    on_present_backend(backend, AppConfig(state_dir=directory / "probe"))
    here = [i for i in request.session.items if isinstance(i, pytest.Function) and i.module is request.module and hasattr(i, "callspec")]
    collected = {(item.callspec.params.get("backend"), item.callspec.params.get("name")) for item in here}
    names = [n for b, n in ALL if b == backend and (b, n) in collected]
    return asyncio.run(_play_all(backend, redis_url, directory / backend, names))


@pytest.mark.timeout(300)  # the first one plays them all
@pytest.mark.parametrize(("backend", "name"), ALL, indirect=["backend"], scope="module")
def test_nothing_is_lost_or_doubled(played: Played, backend: str, name: str) -> None:
    arm, story = ON[backend][name]
    outcome = played[name]
    if outcome.error is not None:
        raise outcome.error
    assert f"{arm.action} {arm.point}" in outcome.passed, outcome.log
    assert outcome.ended == (-signal.SIGKILL if arm.action == "kill" else None)
    assert outcome.left == []
    if story is cases.run_command:
        _check_command(arm, outcome)
    else:
        assert outcome.content == CONTENT.get(story, b"")


def _check_command(arm: Arm, outcome: Outcome) -> None:
    result, op = outcome.result, outcome.op
    assert result is not None
    assert op is not None
    assert (result.status, result.exit_code, result.stdout) == ("exited", 7, EXPECTED)
    assert outcome.ledger == f"{OP}\n".encode()
    assert outcome.adopted
    begun = arm.point not in ("take.before", "finish.after")
    assert op.attempt == (2 if begun else 1)


@pytest.mark.parametrize(("backend", "name"), [(b, n) for b, n in ALL if "freeze" in n], indirect=["backend"], scope="module")
def test_who_wakes_up_late_is_refused(played: Played, name: str) -> None:
    """A late start, and a late creation, by the runner, which has met the next owner; a late finish by Redis."""
    assert f"fenced by {'Redis' if 'finish' in name else 'the runner'}" in played[name].log


def _reap(config: AppConfig) -> None:
    beat = Beat(config)
    beat.reap(30)
    beat.close()


async def _has_reaped(workers: Workers, worker: Worker) -> bool:
    """It inspects what its listing did not show to live; the listing is made by a creation, too."""
    return {"note list_owned.after", "note inspect.after"} <= set(cases.passed(workers, worker))


async def _cast_doubt(stage: Stage, worker: Worker, proxy: RedisProxy, port: Port) -> None:
    """A worker that hears a doorbell while its renewals are behind is in doubt about its lease, and passes the doorbell on."""
    for _ in range(8):
        stalled = asyncio.create_task(proxy.do(port.stall, 1.9 * LEASE_S))
        await asyncio.sleep(0.5 * LEASE_S)
        await stage.sandbox.run_command("true")
        await stalled
        if "note ring.after" in cases.passed(stage.workers, worker):
            return


async def _reach_all(backend: str, directory: Path) -> tuple[list[str], str]:
    with redis_server() as server:
        proxy, workers = RedisProxy(server.port), await Workers.start(directory)
        port = proxy.port()
        stage = Stage(workers, stage_config(backend, server.tcp_url, f"kp{uuid4().hex[:8]}", directory / "state"))
        try:
            worker = await stage.worker(
                *(Arm(point=p, action="note") for p in points_of(backend)), config=stage.config.with_(redis_url=proxy.url(port))
            )
            await stage.sandbox.init()
            await cases.run_command(stage, Outcome())
            await stage.sandbox.extend(1000)
            other = create_async_sandbox(stage.config)
            await other.init()
            await other.extend(1000)
            await other.teardown()
            await other.close()
            dead = create_async_sandbox(stage.config)
            await dead.init()
            await asyncio.to_thread(kill_all, stage.config, dead.sandbox_id)
            await dead.close()
            await asyncio.to_thread(_reap, stage.config)
            await until(lambda: _has_reaped(workers, worker))
            await _cast_doubt(stage, worker, proxy, port)
            worker.signal(signal.SIGTERM)  # the sandbox is idle, and handed over
            await worker.ended
            await stage.worker()
            await stage.sandbox.teardown()
            return cases.passed(workers, worker), worker.text()
        finally:
            await stage.close()
            await workers.stop()
            proxy.close()


def test_every_point_can_be_reached(backend: str, directory: Path) -> None:
    on_present_backend(backend, AppConfig(state_dir=directory / "probe"))
    points, log = asyncio.run(_reach_all(backend, directory / f"all-{backend}"))
    assert {f"note {p}" for p in points_of(backend)} - set(points) == set(), log


def test_a_point_that_is_not_there_cannot_be_armed() -> None:
    with pytest.raises(ValueError, match=r"no\.such"):
        Arm(point="no.such")
