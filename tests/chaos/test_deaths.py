"""Sandboxes that die while a command runs, before the next one comes, and while their owner is dead: told soon, with the cause."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifixer_exec import AppConfig, SandboxLostError, Status
from cifixer_exec.model import MIB
from tests.support.chaos_deaths import kill_all, kill_init
from tests.support.chaos_losses import FOREVER, TOLD_S, check_lost, check_refused
from tests.support.chaos_stack import LEASE_S, Crew, alive, kill, platform_ids, registered, run_in_background
from tests.support.contract_probes import wait_until

Death = Callable[[AppConfig, str], None]
DEATHS = pytest.mark.parametrize("die", [kill_init, kill_all], ids=["init", "all"])
#: A lifetime that ends when there was time for some commands and a second worker.
LATE_S = 5.0
BOMB = "echo started >> ran; echo begun; f() { f | f & }; f & exec sleep 600"  # its own shell forks once, while it surely can
#: A Job's begins with its creation, and its Pod may take a second or two to start.
SHORT_LIVES = {"kubernetes": 6}
#: In a cluster whose nodes have cgroup v2 a container dies as a whole.
TOLD_OOM = {"kubernetes": (Status.OUT_OF_MEMORY, Status.SANDBOX_LOST)}
HOG = "echo started >> ran; echo begun; sleep 1; tail /dev/zero"


@DEATHS
def test_a_sandbox_that_dies_under_a_command_is_told_at_once(standing: Crew, threads: ThreadPoolExecutor, die: Death) -> None:
    sandbox = standing.sandbox()
    future = run_in_background(threads, sandbox, FOREVER)
    die(standing.config, sandbox.sandbox_id)
    check_lost(future.result(timeout=TOLD_S))
    assert registered(standing.config, sandbox.sandbox_id).state == "lost"
    wait_until(lambda: sandbox.sandbox_id not in platform_ids(standing.config), "nothing of it is left", 3)


@DEATHS
def test_a_sandbox_that_died_while_idle_is_told_to_the_next_command(standing: Crew, die: Death) -> None:
    sandbox = standing.sandbox()
    sandbox.run_command("true")
    die(standing.config, sandbox.sandbox_id)
    wait_until(lambda: not alive(standing.config, sandbox.sandbox_id), "it is dead", 2)
    died = time.monotonic()
    check_refused(sandbox)
    check_refused(sandbox)
    with pytest.raises(SandboxLostError):
        sandbox.read_file("ran")
    assert time.monotonic() - died < TOLD_S


def test_a_lifetime_that_ends_is_told_to_the_running_and_to_the_next_command(standing: Crew, threads: ThreadPoolExecutor) -> None:
    lifetime_s = SHORT_LIVES.get(standing.config.execution_backend, 2)
    running, idle = standing.sandbox(lifetime_s=lifetime_s), standing.sandbox(lifetime_s=lifetime_s)
    future = run_in_background(threads, running, FOREVER)
    check_lost(future.result(timeout=lifetime_s + TOLD_S), "lifetime")
    wait_until(lambda: not alive(standing.config, idle.sandbox_id), "it is dead", 3)
    check_refused(idle)
    assert "lifetime" in registered(standing.config, idle.sandbox_id).cause


def test_hostile_code_cannot_kill_its_sandbox_and_its_result_is_no_success(standing: Crew) -> None:
    sandbox = standing.sandbox(max_processes=64)
    killed = sandbox.run_command("kill -9 1; kill -9 $PPID; kill -9 -1; sleep 600", timeout_s=30)
    assert killed.status in (Status.UNKNOWN, Status.SIGNALED), killed
    assert (killed.exit_code, bool(killed.cause)) == (None, True), killed
    bombed = sandbox.run_command(BOMB, timeout_s=1.5)
    assert (bombed.status, bombed.exit_code) == (Status.TIMED_OUT, None), bombed
    assert sandbox.run_command("cat ran; exit 3").exit_code == 3
    sandbox.teardown()


def test_a_command_that_takes_all_memory_is_told_so(standing: Crew) -> None:
    sandbox = standing.sandbox(memory_bytes=96 * MIB)
    result = sandbox.run_command(HOG, timeout_s=60)
    assert (result.status in TOLD_OOM.get(standing.config.execution_backend, (Status.OUT_OF_MEMORY,)), result.exit_code, result.stdout) == (
        True,
        None,
        b"begun\n",
    ), result
    assert "memory" in result.cause
    assert result.duration_s < 1 + TOLD_S
    if result.status is Status.OUT_OF_MEMORY:
        assert sandbox.run_command("exit 3").exit_code == 3
    sandbox.teardown()


def test_a_sandbox_whose_files_take_all_its_memory_tells_so_and_lives_or_is_lost(standing: Crew) -> None:
    if standing.config.execution_backend == "e2b":
        pytest.skip("the files of a microVM in memory have a limit below its memory, which those of the stand-in have not")
    sandbox = standing.sandbox(memory_bytes=96 * MIB)
    begun = time.monotonic()
    result = sandbox.run_command("echo begun; exec head -c 300000000 /dev/zero > /dev/shm/fill", timeout_s=60)
    assert result.status in (Status.OUT_OF_MEMORY, Status.SANDBOX_LOST), result
    assert "memory" in result.cause, result
    assert time.monotonic() - begun < TOLD_S
    if alive(standing.config, sandbox.sandbox_id):
        # The file is there still: a command may or may not find room, or take the last of it from the runner, and each is told.
        after = sandbox.run_command("exit 3")
        assert after.exit_code == 3 or "memory" in after.cause, after
    else:
        check_refused(sandbox)


def test_sandboxes_that_died_with_their_owner_are_found_lost_by_the_adopter(
    config: AppConfig, start: Crew, threads: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = start()
    hungry, bombed = start.sandbox(memory_bytes=96 * MIB), start.sandbox(max_processes=64)
    by_init, by_all, idle = start.sandbox(), start.sandbox(), start.sandbox()
    by_age, aged = start.sandbox(lifetime_s=LATE_S), start.sandbox(lifetime_s=LATE_S)
    futures = [run_in_background(threads, sandbox, FOREVER) for sandbox in (by_init, by_all, by_age)]
    hog = run_in_background(threads, hungry, HOG)
    bomb = run_in_background(threads, bombed, BOMB, timeout_s=4)
    peer = start()
    kill(owner)
    died = time.monotonic()
    kill_init(config, by_init.sandbox_id)
    kill_all(config, by_all.sandbox_id)
    kill_init(config, idle.sandbox_id)
    next_ones = [threads.submit(check_refused, idle)]
    wait_until(lambda: not alive(config, aged.sandbox_id), "its lifetime ends", LATE_S)
    next_ones.append(threads.submit(check_refused, aged))
    bound = died + LEASE_S + 2
    for future, said in ((futures[0], ""), (futures[1], ""), (futures[2], "lifetime")):
        check_lost(future.result(timeout=bound - time.monotonic()), said)
    lost_s = time.monotonic() - died
    for next_one in next_ones:
        next_one.result(timeout=bound - time.monotonic())
    ate = hog.result(timeout=bound - time.monotonic())
    assert (ate.status in TOLD_OOM.get(config.execution_backend, (Status.OUT_OF_MEMORY,)), ate.exit_code, ate.stdout) == (
        True,
        None,
        b"begun\n",
    ), ate
    assert "memory" in ate.cause
    assert bomb.result(timeout=10).status is Status.TIMED_OUT
    assert bombed.run_command("echo alive").stdout == b"alive\n"
    assert start.owner_of(bombed) is peer
    with capsys.disabled():
        print(f" [told {lost_s:.1f} s after the death, lease {LEASE_S:g} s]", end="")
