"""The two ends of a sandbox: when it should end it does, and when it is lost that is said, never waited for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from cifixer_exec import InvalidRequestError, SandboxEnvironment, SandboxLostError, SandboxNotFoundError, Status, attach
from tests.contract.conftest import Make
from tests.support.contract_probes import wait_until
from tests.support.contract_stack import Stack, processes_mentioning

GONE = (SandboxLostError, SandboxNotFoundError)


def alive(stack: Stack, sandbox_id: str) -> bool:
    return any(stack.backend.inspect(o.handle).alive for o in stack.backend.list_owned() if o.handle.sandbox_id == sandbox_id)


def test_a_sandbox_is_alive_between_init_and_teardown(stack: Stack) -> None:
    sandbox = stack.create()
    sandbox.init()
    assert alive(stack, sandbox.sandbox_id)
    sandbox.teardown()
    assert not alive(stack, sandbox.sandbox_id)


def test_a_torn_down_sandbox_leaves_nothing_on_the_platform(stack: Stack) -> None:
    with stack.create() as sandbox:
        sandbox.run_command("sleep 1000 & setsid sleep 1000 &")
    assert sandbox.sandbox_id not in [o.handle.sandbox_id for o in stack.backend.list_owned()]


def test_teardown_ends_a_running_command(stack: Stack) -> None:
    sandbox = stack.create()
    sandbox.init()
    handle = sandbox.start_command("echo begun; sleep 1000")
    next(iter(handle.output()))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handle.wait)
        sandbox.teardown()
        with suppress(*GONE):
            assert waiting.result(timeout=30).status is Status.SANDBOX_LOST
    sandbox.teardown()  # the waiter may have opened a connection behind the first


def test_teardown_twice_is_fine(stack: Stack) -> None:
    sandbox = stack.create()
    sandbox.init()
    sandbox.teardown()
    sandbox.teardown()


def test_teardown_of_a_sandbox_that_was_never_made_is_fine(stack: Stack) -> None:
    stack.create().teardown()


def test_teardown_from_a_with_block_that_failed(stack: Stack) -> None:
    with pytest.raises(ZeroDivisionError), stack.create() as sandbox:
        raise ZeroDivisionError
    assert not alive(stack, sandbox.sandbox_id)


@pytest.mark.parametrize("use", ["run_command", "write_file", "read_file", "list_files", "extend", "start_command"])
def test_use_after_teardown_is_not_found(stack: Stack, use: str) -> None:
    sandbox = stack.create()
    sandbox.init()
    sandbox.teardown()
    arguments = {"run_command": ("true",), "start_command": ("true",), "write_file": ("f", b""), "read_file": ("f",), "extend": (60,)}
    try:
        with pytest.raises(SandboxNotFoundError, match=sandbox.sandbox_id):
            getattr(sandbox, use)(*arguments.get(use, ()))
    finally:
        sandbox.teardown()


def test_use_before_init_is_not_found(stack: Stack) -> None:
    sandbox = stack.create()
    with pytest.raises(SandboxNotFoundError):
        sandbox.run_command("true")
    sandbox.teardown()


def test_init_twice_is_the_same_sandbox(stack: Stack) -> None:
    sandbox = stack.create()
    sandbox.init()
    sandbox.write_file("mine", b"x")
    sandbox.init()
    assert sandbox.exists("mine")
    sandbox.teardown()


def test_a_sandbox_that_was_never_made_cannot_be_attached_to(stack: Stack) -> None:
    with pytest.raises(SandboxNotFoundError, match="no-such-sandbox"):
        attach("no-such-sandbox", stack.config)


def test_a_torn_down_sandbox_cannot_be_attached_to(stack: Stack) -> None:
    with stack.create() as sandbox:
        pass
    with pytest.raises(SandboxNotFoundError, match=sandbox.sandbox_id):
        attach(sandbox.sandbox_id, stack.config)


def test_an_attached_sandbox_can_be_torn_down(stack: Stack, fresh: SandboxEnvironment) -> None:
    attach(fresh.sandbox_id, stack.config).teardown()
    assert not alive(stack, fresh.sandbox_id)


def test_closing_leaves_the_sandbox_to_be_attached_to(stack: Stack) -> None:
    sandbox = stack.create()
    sandbox.init()
    sandbox.write_file("mine", b"x")
    sandbox.close()
    again = attach(sandbox.sandbox_id, stack.config)
    assert again.read_file("mine") == b"x"
    again.teardown()


def test_a_sandbox_ends_by_itself_at_the_end_of_its_lifetime(stack: Stack, make: Make) -> None:
    sandbox = make(lifetime_s=2)
    wait_until(lambda: not alive(stack, sandbox.sandbox_id), "the lifetime ends")


def test_a_command_at_the_end_of_the_lifetime_is_lost_with_a_cause(make: Make) -> None:
    result = make(lifetime_s=2).run_command("echo begun; sleep 1000", timeout_s=60)
    assert (result.status, result.exit_code, result.stdout) == (Status.SANDBOX_LOST, None, b"begun\n")
    assert "lifetime" in result.cause


def test_extend_lets_a_sandbox_live_on(stack: Stack, make: Make) -> None:
    sandbox = make(lifetime_s=3)
    sandbox.extend(600)
    time.sleep(4)
    assert sandbox.run_command("echo alive").stdout == b"alive\n"
    assert next(o.expires_at_s for o in stack.backend.list_owned() if o.handle.sandbox_id == sandbox.sandbox_id) > time.time() + 300


def test_extend_can_shorten_a_lifetime(stack: Stack, fresh: SandboxEnvironment) -> None:
    fresh.extend(1)
    wait_until(lambda: not alive(stack, fresh.sandbox_id), "the lifetime ends")


@pytest.mark.parametrize("lifetime_s", [0, -1, "1", None, float("nan")])
def test_an_impossible_lifetime_is_refused_by_name(sandbox: SandboxEnvironment, lifetime_s: float) -> None:
    with pytest.raises(InvalidRequestError, match="lifetime_s"):
        sandbox.extend(lifetime_s)


def test_a_sandbox_killed_from_outside_is_lost_with_a_cause(stack: Stack, fresh: SandboxEnvironment) -> None:
    handle = fresh.start_command("echo begun; sleep 1000")
    result = handle.wait(on_output=lambda _: stack.kill_from_outside(fresh.sandbox_id))
    assert (result.status, result.exit_code, result.stdout) == (Status.SANDBOX_LOST, None, b"begun\n")
    assert result.cause


def test_a_sandbox_removed_from_the_platform_is_lost(stack: Stack, fresh: SandboxEnvironment) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fresh.run_command, "sleep 1000")
        time.sleep(0.5)
        stack.backend.destroy(stack.handle(fresh.sandbox_id))
        assert waiting.result(timeout=30).status is Status.SANDBOX_LOST


def test_all_commands_of_a_killed_sandbox_are_lost(stack: Stack, fresh: SandboxEnvironment) -> None:
    handles = [fresh.start_command("sleep 1000") for _ in range(5)]
    stack.kill_from_outside(fresh.sandbox_id)
    ends = []
    for handle in handles:
        try:
            ends.append(handle.wait().status == Status.SANDBOX_LOST)
        except GONE:
            ends.append(True)
    assert ends == [True] * 5


def test_a_killed_sandbox_is_lost_to_file_verbs_too(stack: Stack, fresh: SandboxEnvironment) -> None:
    stack.kill_from_outside(fresh.sandbox_id)
    with pytest.raises(GONE):
        fresh.read_file("x")


def test_a_command_to_a_killed_sandbox_says_so(stack: Stack, fresh: SandboxEnvironment) -> None:
    stack.kill_from_outside(fresh.sandbox_id)
    with suppress(*GONE):
        assert fresh.run_command("true").status is Status.SANDBOX_LOST


def test_a_killed_sandbox_can_be_torn_down(stack: Stack, fresh: SandboxEnvironment) -> None:
    stack.kill_from_outside(fresh.sandbox_id)
    fresh.teardown()
    assert not alive(stack, fresh.sandbox_id)


def test_a_sandbox_whose_monitor_was_killed_is_the_same_as_before_or_gone(stack: Stack, fresh: SandboxEnvironment) -> None:
    if stack.backend.name != "local":
        pytest.skip("only the local backend has a process outside")
    stack.kill_monitor(fresh.sandbox_id)
    try:
        works = fresh.run_command("true").ok
    except GONE:
        works = False
    assert works == alive(stack, fresh.sandbox_id)


def test_a_sandbox_whose_monitor_was_killed_is_removed_whole(stack: Stack, fresh: SandboxEnvironment, marker: str) -> None:
    if stack.backend.name != "local":
        pytest.skip("only the local backend has a process outside")
    fresh.run_command(f"sleep {marker} &")
    stack.kill_monitor(fresh.sandbox_id)
    fresh.teardown()
    assert processes_mentioning(marker) == []
