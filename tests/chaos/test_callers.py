"""Callers that die: what they began ends by itself and is there for the next process; what nobody can use goes."""

from __future__ import annotations

import time

from cifixer_exec import AppConfig
from cifixer_exec.wiring import make_reaper
from tests.support.chaos_stack import (
    ONE_BACKEND,
    SHORT,
    SHORT_OUTPUT,
    Client,
    Crew,
    alive,
    ask,
    check_once,
    op,
    pause,
    platform_ids,
    registered,
    resume,
    runs,
)
from tests.support.contract_probes import wait_until


def test_a_command_whose_caller_is_killed_ends_by_itself_and_the_next_process_has_its_whole_result(standing: Crew) -> None:
    sandbox = standing.sandbox()
    caller = Client(standing.config, "run", sandbox.sandbox_id, "orphaned-op", SHORT)
    caller.go()
    wait_until(lambda: runs(sandbox) == 1, "the command begins")
    time.sleep(0.5)
    caller.kill()
    wait_until(lambda: op(standing.config, "orphaned-op").final, "the op ends by itself", 10)
    heir = Client(standing.config, "wait", sandbox.sandbox_id, "orphaned-op")
    heir.go()
    assert heir.answer()[:3] == ["exited", 7, SHORT_OUTPUT.decode()]
    check_once(sandbox, sandbox.run_command(SHORT, op_id="orphaned-op", timeout_s=60), SHORT_OUTPUT)
    sandbox.teardown()


@ONE_BACKEND
def test_a_new_process_takes_over_while_the_command_of_a_killed_caller_runs(standing: Crew) -> None:
    sandbox = standing.sandbox()
    caller, heir = (Client(standing.config, "run", sandbox.sandbox_id, "inherited-op", SHORT) for _ in range(2))
    caller.go()
    wait_until(lambda: runs(sandbox) == 1, "the command begins")
    caller.kill()
    heir.go()
    assert heir.answer()[:3] == ["exited", 7, SHORT_OUTPUT.decode()]
    assert runs(sandbox) == 1
    sandbox.teardown()


def test_a_sandbox_whose_creator_was_killed_meanwhile_is_gone_after_its_lifetime(standing: Crew) -> None:
    config = standing.config.with_(lifetime_s=2.0)
    creator = Client(config, "create", "abandoned")
    pause(standing.started[0])  # so that it is surely killed in the middle
    creator.go()
    wait_until(lambda: op_began(config, "create-abandoned"), "the creation is journaled")
    creator.kill()
    resume(standing.started[0])
    wait_until(lambda: op(config, "create-abandoned").final, "the creation ends", 10)
    wait_until(lambda: not alive(config, "abandoned"), "its lifetime ends it, without anyone", 5)
    ask(config, lambda journal: make_reaper(config, journal).reap())
    assert platform_ids(config) == set()
    record = registered(config, "abandoned")
    assert (record.state, "lifetime" in record.cause) == ("lost", True), record


def op_began(config: AppConfig, op_id: str) -> bool:
    return ask(config, lambda journal: journal.op(op_id)) is not None


@ONE_BACKEND
def test_a_creation_that_nobody_waits_for_any_more_is_not_begun_after_its_time(config: AppConfig, start: Crew) -> None:
    short = config.with_(start_timeout_s=1.0)
    creator = Client(short, "create", "too-late")
    creator.go()
    wait_until(lambda: op_began(config, "create-too-late"), "the creation is journaled")
    creator.kill()
    time.sleep(1.2)
    start()
    wait_until(lambda: op(config, "create-too-late").final, "the creation ends", 10)
    assert op(config, "create-too-late").state == "failed"
    assert registered(config, "too-late").state == "closed"
    assert platform_ids(config) == set()
