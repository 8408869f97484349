"""The local backend's own state on a real host: what crashes leave, who waits for whom, which user a sandbox is."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cifixer_exec.backends.local import LocalBackend, cgroups, isolation, locks
from cifixer_exec.backends.local import backend as module
from cifixer_exec.backends.local.processes import descendants, kill
from cifixer_exec.backends.registry import find_bwrap
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.channel.channel import Channel
from cifixer_exec.errors import BackendUnavailableError, CapacityError
from cifixer_exec.model import MIB, Command, Inspection, OutputChunk, SandboxHandle, SandboxSpec

SECRET = "hunter2-8d1f"
NOBODY = 65_534
NOW_ALIVE = Inspection(alive=True)


class Host:
    """A state directory and the backends on it. All its sandboxes are destroyed at the end."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.root = state / "direct"
        self.later_s = 0.0

    def backend(self, owner: str = "direct") -> LocalBackend:
        """As another process would have it."""
        return LocalBackend(
            root=self.state / owner,
            runner=runner_path(),
            bwrap=find_bwrap(""),
            groups=cgroups.detect(),
            clock=lambda: time.time() + self.later_s,
        )

    def spec(self, name: str = "s", **members: object) -> SandboxSpec:
        """Of a sandbox that nobody else has."""
        return SandboxSpec(**{"backend": "local", "sandbox_id": f"{name}-{uuid.uuid4().hex[:8]}", "lifetime_s": 300.0, **members})  # type: ignore[arg-type]

    def directory(self, handle: SandboxHandle) -> Path:
        return self.root / "sandboxes" / handle.sandbox_id

    def kill(self, handle: SandboxHandle) -> None:
        """All of it, as a crash or its lease would."""
        launched = json.loads((self.directory(handle) / "launch.json").read_text())["pid"]
        for pid in [*descendants(launched), launched]:
            kill(pid)
        wait_until(lambda: not self.backend().inspect(handle).alive)

    def uid(self, handle: SandboxHandle) -> int | None:
        found = json.loads(next(self.state.glob(f"*/sandboxes/{handle.sandbox_id}/spec.json")).read_text()).get("host_uid")
        assert found is None or isinstance(found, int)
        return found


@pytest.fixture
def host() -> Iterator[Host]:
    state = Path(tempfile.mkdtemp(prefix="lb-"))
    state.chmod(0o711)
    found = Host(state)
    health = found.backend().probe()
    if not health.ok:
        pytest.skip(f"the local backend does not work here: {health.summary}: {health.remedy}")
    yield found
    for root in state.iterdir():
        if root.is_dir():
            for owned in found.backend(root.name).list_owned():
                found.backend(root.name).destroy(owned.handle)
            assert list((root / "locks").iterdir()) == []
    shutil.rmtree(state)


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def run(backend: LocalBackend, handle: SandboxHandle, line: str) -> str:
    """What a shell line says in the sandbox."""

    async def go() -> str:
        async def inspect() -> Inspection:
            return NOW_ALIVE

        channel = Channel(dial=backend.dial(handle), inspect=inspect, epoch=0, client="test")
        try:
            command = Command(argv=("/bin/sh", "-c", line), env={"PATH": "/usr/bin:/bin", "TOKEN": SECRET}, timeout_s=30)
            chunks = [item async for item in channel.run(f"op-{uuid.uuid4().hex}", command)]
            return b"".join(c.data for c in chunks if isinstance(c, OutputChunk)).decode()
        finally:
            channel.close()

    return asyncio.run(go())


def groups_of(sandbox_id: str) -> list[Path]:
    found = cgroups.detect()
    return [g for base in set(found.bases.values()) if (g := base / "cifixer-exec" / sandbox_id).exists()] if found else []


# What crashed clients leave behind


def test_what_a_crashed_client_left_is_removed_by_the_next_create(host: Host) -> None:
    dead = [host.backend().create(host.spec(lifetime_s=30)) for _ in range(3)]
    for handle in dead:
        host.kill(handle)
    host.later_s = 30 + 61
    host.backend().create(host.spec())
    assert [h.sandbox_id for h in dead if host.directory(h).exists() or groups_of(h.sandbox_id)] == []


def test_what_lives_is_never_removed_even_past_its_end(host: Host) -> None:
    living = host.backend().create(host.spec(lifetime_s=200))
    host.later_s = 10_000
    host.backend().create(host.spec())
    assert host.backend().inspect(living).alive
    assert run(host.backend(), living, "echo here") == "here\n"


def test_what_has_not_ended_for_a_minute_is_left_to_tell_its_cause(host: Host) -> None:
    dead = host.backend().create(host.spec(lifetime_s=30))
    host.kill(dead)
    host.later_s = 30 + 50
    host.backend().create(host.spec())
    assert host.backend().inspect(dead).cause == "its lifetime ended"


def test_what_is_in_the_making_is_not_litter(host: Host) -> None:
    making = host.root / "sandboxes" / "making"
    making.mkdir()
    host.later_s = 10_000
    lock = locks.take(host.root / "locks" / "making", timeout_s=0)
    assert lock is not None
    host.backend().create(host.spec())
    assert making.exists()
    locks.release(host.root / "locks" / "making", lock)
    host.backend().create(host.spec())
    assert not making.exists()


def test_half_removed_directories_and_old_locks_go_too(host: Host) -> None:
    trash, lock = host.root / "sandboxes" / ".s.0123abcd", host.root / "locks" / "s"
    (trash / "etc").mkdir(parents=True)
    lock.touch()
    assert host.backend().list_owned() == []
    host.backend().create(host.spec())
    assert (trash.exists(), lock.exists()) == (True, True)
    host.later_s = 61
    host.backend().create(host.spec())
    assert (trash.exists(), lock.exists()) == (False, False)


def test_one_create_looks_at_few_and_all_get_their_turn(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(120):
        (host.root / "sandboxes" / f"dead-{n}").mkdir()
    host.later_s = 61
    monkeypatch.setattr(module, "LITTER_TIME_S", 20)
    left = []
    for _ in range(3):
        host.backend().destroy(host.backend().create(host.spec()))
        left.append(len(list((host.root / "sandboxes").iterdir())))
    assert left == [70, 20, 0]


# Who waits for whom


def test_creates_of_one_sandbox_at_once_make_one(host: Host) -> None:
    spec = host.spec()
    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(lambda _: host.backend().create(spec), range(8)))
    assert len({h.sandbox_id for h in handles}) == 1
    assert run(host.backend(), handles[0], "echo here") == "here\n"
    mentioning = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(host.directory(handles[0])).encode() in p.read_bytes()]
    assert len(mentioning) == 1


def test_a_second_create_does_not_take_the_directory_from_the_first(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, slow, second_began = host.spec(), host.backend(), threading.Event()
    launch = slow._launch

    def launch_late(*arguments: object) -> None:
        second_began.wait(10)
        time.sleep(0.3)
        launch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(slow, "_launch", launch_late)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.create, spec)
        wait_until(lambda: (host.root / "sandboxes" / spec.sandbox_id / "spec.json").exists())
        second_began.set()
        handle = host.backend().create(spec)
        started = json.loads((host.directory(handle) / "launch.json").read_text())
        assert first.result() == handle
    assert json.loads((host.directory(handle) / "launch.json").read_text()) == started
    assert run(host.backend(), handle, "echo here") == "here\n"


def test_a_destroy_waits_for_the_create_and_leaves_nothing(host: Host) -> None:
    spec = host.spec()
    handle = SandboxHandle(backend="local", sandbox_id=spec.sandbox_id, placement=host.backend().placement)
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(host.backend().create, spec)
        wait_until(lambda: (host.root / "locks" / spec.sandbox_id).exists() or making.done())
        host.backend().destroy(handle)
        making.result()
    assert not host.directory(handle).exists()
    assert not host.backend().inspect(handle).alive


def test_who_holds_a_lock_too_long_is_told_of_and_nothing_is_touched(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = host.backend().create(host.spec())
    path = host.root / "locks" / handle.sandbox_id
    lock = locks.take(path, timeout_s=0)
    assert lock is not None
    monkeypatch.setattr(LocalBackend._locked.__wrapped__, "__defaults__", (0.05,))  # type: ignore[attr-defined]
    with pytest.raises(BackendUnavailableError, match="try again"):
        host.backend().destroy(handle)
    locks.release(path, lock)
    assert host.backend().inspect(handle).alive


def test_a_sandbox_whose_maker_died_before_it_was_whole_is_completed(host: Host) -> None:
    spec = host.spec()
    handle = host.backend().create(spec)
    before = (host.directory(handle) / "init.json").read_text()
    (host.directory(handle) / "init.json").unlink()
    host.backend().create(spec)
    assert (host.directory(handle) / "init.json").read_text() == before


def test_no_lock_is_left_and_none_is_inherited(host: Host) -> None:
    handle = host.backend().create(host.spec())
    launched = json.loads((host.directory(handle) / "launch.json").read_text())["pid"]
    if os.geteuid() != 0:
        pytest.skip("only root may look at what a non-dumpable runner holds")
    held = [os.readlink(fd) for pid in (launched, *descendants(launched)) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    assert [f for f in held if "lock" in f] == []
    assert [p for p in host.state.rglob("*lock*") if p.is_file()] == []


def test_a_lock_of_a_process_that_died_is_free(tmp_path: Path) -> None:
    program = "import os, sys; from pathlib import Path; from cifixer_exec.backends.local import locks\n"
    program += "locks.take(Path(sys.argv[1]), timeout_s=0); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "lock")], check=False)
    assert (tmp_path / "lock").exists()
    lock = locks.take(tmp_path / "lock", timeout_s=0)
    assert lock is not None
    locks.release(tmp_path / "lock", lock)
    assert not (tmp_path / "lock").exists()


def test_many_take_turns_at_a_lock_that_is_always_removed(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work(_: int) -> None:
        nonlocal inside, most
        lock = locks.take(tmp_path / "lock", timeout_s=20)
        assert lock is not None
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)
        inside -= 1
        locks.release(tmp_path / "lock", lock)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    assert most == 1


def test_a_child_forked_meanwhile_does_not_keep_a_lock(tmp_path: Path) -> None:
    lock = locks.take(tmp_path / "lock", timeout_s=0)
    assert lock is not None
    copy = os.dup(lock)  # as a fork has it
    locks.release(tmp_path / "lock", lock)
    again = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)
    os.close(copy)


# Which user a sandbox is


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give sandboxes users of their own")


@needs_root
def test_sandboxes_of_one_state_directory_have_different_users(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_host_uids", lambda _map: (1_900_000_000, 4))
    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(lambda n: host.backend(f"owner{n % 2}").create(host.spec()), range(4)))
    assert sorted(host.uid(h) or 0 for h in handles) == [1_900_000_000 + n for n in range(4)]
    with pytest.raises(CapacityError, match="all 4 user ids"):
        host.backend().create(host.spec())
    freed = host.uid(handles[1])
    host.backend("owner1").destroy(handles[1])
    assert host.uid(host.backend().create(host.spec())) == freed


@needs_root
def test_a_crash_does_not_use_up_users(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_host_uids", lambda _map: (1_900_000_000, 1))
    dead = host.backend().create(host.spec(lifetime_s=30))
    host.kill(dead)
    host.later_s = 91
    assert host.uid(host.backend().create(host.spec())) == 1_900_000_000


@needs_root
def test_the_user_is_the_one_that_is_recorded(host: Host) -> None:
    handle = host.backend().create(host.spec())
    assert run(host.backend(), handle, "sleep 300 >/dev/null 2>&1 & id -u").split() == ["1000"]
    init = json.loads((host.directory(handle) / "init.json").read_text())["pid"]
    assert os.stat(f"/proc/{descendants(init)[-1]}").st_uid == host.uid(handle)


@needs_root
def test_root_without_other_users_has_the_same_isolation(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_host_uids", lambda _map: (0, 0))
    use_as_an_ordinary_user(host)


def as_nobody(work: Callable[[], None]) -> str:
    """Do ``work`` in a child that is an ordinary user; gives what went wrong."""
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            work()
        except BaseException:
            said = traceback.format_exc()
        os.write(begin, said.encode()[-4000:])
        os._exit(0)
    os.close(begin)
    with os.fdopen(end) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


def test_an_ordinary_user_has_the_same_isolation() -> None:
    state = Path(tempfile.mkdtemp(prefix="lb-"))
    state.chmod(0o777)
    host = Host(state)
    if not os.access(runner_path(), os.X_OK) or host.backend()._bwrap is None:
        pytest.skip("no bubblewrap here")
    said = as_nobody(lambda: use_as_an_ordinary_user(host))
    shutil.rmtree(state)
    if "namespaces are switched off" in said or "does not let this process make namespaces" in said:
        pytest.skip(said.splitlines()[-1])
    assert said == ""


def use_as_an_ordinary_user(host: Host) -> None:
    """Runs in the child."""
    backend = LocalBackend(root=host.root, runner=runner_path(), bwrap=find_bwrap(""))
    handle = backend.create(host.spec(disk_bytes=8 * MIB))
    try:
        assert host.uid(handle) is None
        assert run(backend, handle, "id -u; umask 0; touch /evil /etc/evil /run/evil 2>/dev/null || echo closed") == "1000\nclosed\n"
        assert run(backend, handle, "grep -E '^(CapEff|CapPrm|NoNewPrivs|Seccomp):' /proc/self/status | tr -s '\\t\\n' '  '") == (
            "CapPrm: 0000000000000000 CapEff: 0000000000000000 NoNewPrivs: 1 Seccomp: 2 "
        )
        assert run(backend, handle, "unshare -U true 2>/dev/null || echo none; ls -A /etc/ssl/private 2>/dev/null") == "none\n"
        sizes = run(backend, handle, "for d in . /tmp ~; do head -c 6000000 /dev/zero 2>/dev/null > $d/f; stat -c %s $d/f; done").split()
        assert int(sizes[0]) == 6_000_000
        assert sum(map(int, sizes)) <= 8 * MIB
        assert list((host.directory(handle) / "disk").iterdir()) == []
    finally:
        backend.destroy(handle)
    assert backend.list_owned() == []


# What others on the host can learn


def test_no_secret_is_on_the_host(host: Host) -> None:
    handle = host.backend().create(host.spec(env={"TOKEN": SECRET}))
    assert run(host.backend(), handle, 'echo "$TOKEN" > kept; cat kept; sleep 300 >/dev/null 2>&1 &').strip() in ("", SECRET)
    launched = json.loads((host.directory(handle) / "launch.json").read_text())["pid"]
    assert Path(f"/proc/{launched}/environ").read_bytes() == b""
    assert SECRET.encode() not in Path(f"/proc/{launched}/cmdline").read_bytes()
    seen = [p for p in host.state.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert seen == []
    assert stat.S_IMODE(host.directory(handle).stat().st_mode) == 0o700


def test_the_disk_is_not_seen_by_the_host(host: Host) -> None:
    handle = host.backend().create(host.spec())
    run(host.backend(), handle, "echo x > /workspace/f; echo x > /tmp/f")
    assert list((host.directory(handle) / "disk").iterdir()) == []
    assert str(host.state) not in Path("/proc/self/mountinfo").read_text()
