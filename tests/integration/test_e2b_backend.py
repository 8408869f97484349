"""The E2B backend beyond the contract: what it asks of the service, how starts fail, and how sandboxes die."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2b import Sandbox

from cifixer_exec import AppConfig, create_sandbox
from cifixer_exec.backends.e2b import E2BBackend, machines
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.errors import (
    BackendUnavailableError,
    CapacityError,
    CircuitOpenError,
    ExecutorError,
    InvalidRequestError,
    SandboxLostError,
    SandboxStartError,
)
from cifixer_exec.model import Inspection, SandboxHandle
from tests.support.e2b_accounts import account_of, backend_of, machine_of, machines_of, processes_in, spec_of
from tests.support.e2b_service import service
from tests.support.kubernetes.waiting import until

Json = dict[str, Any]


@pytest.fixture
def config(namespace: str) -> Iterator[AppConfig]:
    with account_of(namespace) as made_here:
        yield made_here


@pytest.fixture
def backend(config: AppConfig) -> E2BBackend:
    return backend_of(config)


def creates() -> list[Json]:
    found: list[Json] = service().asked()["creates"]
    return found


def requests() -> dict[str, int]:
    found: dict[str, int] = service().asked()["requests"]
    return found


def death_of(backend: E2BBackend, handle: SandboxHandle) -> Inspection:
    until(lambda: not backend.inspect(handle).alive)
    return backend.inspect(handle)


def left_s(handle: SandboxHandle) -> float:
    return next(float(found["left_s"]) for found in service().order("sandboxes") if found["sandboxID"] == machine_of(handle))


class TestWhatIsAsked:
    def test_a_create_says_whose_it_is_how_long_it_lives_and_what_it_may_reach(self, config: AppConfig, backend: E2BBackend) -> None:
        backend.create(spec_of(image="cifixer", lifetime_s=600, network="none", labels={"job": "7"}, env={"TOKEN": "secret-57ad"}))
        (asked,) = creates()
        body = asked["body"]
        assert body["templateID"] == "cifixer"
        assert body["timeout"] == 615
        assert body["allow_internet_access"] is False
        assert body["network"] == {"allowPublicTraffic": False}
        assert body["metadata"] == {
            "cifixer_app": "cifixer-exec",
            "cifixer_namespace": f"{config.namespace}/direct",
            "cifixer_sandbox_id": "one",
            "cifixer_labels": '{"job": "7"}',
        }
        assert not body.get("autoPause")
        assert re.fullmatch("[0-9a-f]{64}", asked["headers"]["idempotency-key"])
        assert asked["headers"]["x-api-key"] == config.e2b_api_key
        assert "secret-57ad" not in json.dumps(asked)

    def test_what_may_be_reached_is_said(self, config: AppConfig) -> None:
        backend_of(config, e2b_allow_out=("packages.example", "10.0.0.0/8"), e2b_template="code-interpreter-v1").create(
            spec_of(network="internet")
        )
        (asked,) = creates()
        assert asked["body"]["templateID"] == "code-interpreter-v1"
        assert asked["body"]["allow_internet_access"] is True
        network = {"allowOut": ["packages.example", "10.0.0.0/8"], "denyOut": ["0.0.0.0/0"], "allowPublicTraffic": False}
        assert asked["body"]["network"] == network

    def test_the_pace_is_asked_once_for_each_that_is_made_and_never_for_one_that_is_adopted(self, config: AppConfig) -> None:
        asked: list[tuple[str, float]] = []

        def pace(account: str, per_s: float, _most_wait_s: float) -> float:
            asked.append((account, per_s))
            return 0.0

        backend = backend_of(config, e2b_creates_per_s=2.5)
        backend._pace = pace
        backend.create(spec_of())
        backend.create(spec_of())
        assert asked == [(backend._account.fingerprint, 2.5)]

    def test_creations_keep_the_pace_that_is_set(self, config: AppConfig) -> None:
        backend, begun = backend_of(config, e2b_creates_per_s=2.0), time.monotonic()
        for name in ("a", "b", "c"):
            backend.create(spec_of(name))
        assert time.monotonic() - begun >= 1.0


class TestOneAndTheSame:
    def test_a_second_create_adopts_it(self, config: AppConfig, backend: E2BBackend) -> None:
        first = backend.create(spec_of())
        assert backend_of(config).create(spec_of()) == first
        assert len(creates()) == 1

    def test_eight_at_once_make_one_with_one_runner(self, config: AppConfig) -> None:
        with ThreadPoolExecutor(8) as threads:
            handles = list(threads.map(lambda _: backend_of(config).create(spec_of()), range(8)))
        assert len({machine_of(handle) for handle in handles}) == 1
        assert len(machines_of(config.namespace)) == 1
        assert len(processes_in(machine_of(handles[0]), "enclosed")) == 1
        assert backend_of(config).inspect(handles[0]).alive

    @pytest.mark.parametrize("times", [1, 2])
    def test_an_answer_that_was_lost_behind_503_makes_no_second_one(self, config: AppConfig, backend: E2BBackend, times: int) -> None:
        service().fault(method="POST", path="/v2/sandboxes$", status=503, after=True, times=times)
        handle = backend.create(spec_of())
        assert [found["sandboxID"] for found in machines_of(config.namespace)] == [machine_of(handle)]
        assert len({asked["headers"]["idempotency-key"] for asked in creates()}) == 1
        assert len(creates()) == times + 1

    def test_an_answer_whose_connection_was_lost_makes_no_second_one(self, config: AppConfig, backend: E2BBackend) -> None:
        service().fault(method="POST", path="/v2/sandboxes$", drop=True, after=True)
        handle = backend.create(spec_of())
        assert [found["sandboxID"] for found in machines_of(config.namespace)] == [machine_of(handle)]
        assert backend.inspect(handle).alive

    def test_what_was_begun_and_given_up_can_be_destroyed_by_its_name(self, config: AppConfig, backend: E2BBackend) -> None:
        service().fault(method="POST", path="/v2/sandboxes$", drop=True, after=True, times=2)
        with pytest.raises(BackendUnavailableError):
            backend.create(spec_of())
        assert len(machines_of(config.namespace)) == 1
        backend.destroy(SandboxHandle(backend="e2b", sandbox_id="one", placement=backend.placement))
        assert machines_of(config.namespace) == []

    def test_a_dead_one_of_the_same_name_gives_way_though_the_service_remembers_it(self, backend: E2BBackend) -> None:
        former = backend.create(spec_of())
        service().order("vanish", sandbox=machine_of(former))
        again = backend.create(spec_of())
        assert machine_of(again) != machine_of(former)
        assert backend.inspect(again).alive
        backend.destroy(former)
        assert backend.inspect(again).alive

    def test_a_name_may_be_used_again_for_something_else(self, config: AppConfig, backend: E2BBackend) -> None:
        """The service remembers keys, and refuses one that comes with another request."""
        with pytest.raises(SandboxStartError, match="there is no template"):
            backend.create(spec_of(image="no-such"))
        former = backend.create(spec_of(lifetime_s=600))
        backend.destroy(former)
        again = backend.create(spec_of(lifetime_s=700))
        assert machine_of(again) != machine_of(former)
        assert [found["sandboxID"] for found in machines_of(config.namespace)] == [machine_of(again)]

    def test_one_whose_runner_has_ended_gives_way(self, config: AppConfig, backend: E2BBackend) -> None:
        former = backend.create(spec_of())
        kill_runner(former)
        death_of(backend, former)
        again = backend.create(spec_of())
        assert machine_of(again) != machine_of(former)
        assert backend.inspect(again).alive
        assert [found["sandboxID"] for found in machines_of(config.namespace)] == [machine_of(again)]

    def test_one_without_a_runner_gets_it(self, config: AppConfig, backend: E2BBackend) -> None:
        """As when who made it died before it could start one."""
        made = Sandbox.create("base", timeout=60, metadata=backend._names.metadata(spec_of()), **backend._account.options)
        handle = backend.create(spec_of())
        assert machine_of(handle) == made.sandbox_id
        assert creates()[0]["body"]["templateID"] == "base"
        assert len(creates()) == 1
        with create_sandbox(config, sandbox_id="one") as sandbox:
            assert sandbox.run_command("echo here").text == "here\n"

    def test_a_handle_works_in_any_form(self, backend: E2BBackend) -> None:
        handle = backend.create(spec_of())
        bare = SandboxHandle(backend="e2b", sandbox_id="one", placement=backend.placement)
        (owned,) = backend.list_owned()
        for form in (SandboxHandle.from_json(json.loads(json.dumps(handle.to_json()))), owned.handle, bare):
            assert backend.inspect(form).alive
        backend.destroy(bare)
        assert not backend.inspect(handle).alive


class TestRates:
    @pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {}], ids=["that says when", "that does not"])
    def test_too_many_requests_are_waited_for(self, backend: E2BBackend, headers: dict[str, str]) -> None:
        service().fault(method="POST", path="/v2/sandboxes$", status=429, times=2, headers=headers)
        begun = time.monotonic()
        assert backend.inspect(backend.create(spec_of())).alive
        assert len(creates()) == 1  # what is refused is none
        assert time.monotonic() - begun > (2.0 if headers else 0.1)

    @pytest.mark.parametrize("says_when", [True, False])
    def test_who_is_faster_than_the_plan_allows_gets_all_of_them_later(self, backend: E2BBackend, says_when: bool) -> None:
        """As when somebody else uses the account without our pace."""
        service().set(create_per_s=0.5, create_burst=1, retry_after=says_when)
        handles = [backend.create(spec_of(name)) for name in ("a", "b")]
        assert all(backend.inspect(handle).alive for handle in handles)

    def test_a_rate_that_stays_is_an_end_in_time(self, config: AppConfig) -> None:
        service().fault(method="POST", path="/v2/sandboxes$", status=429, times=10_000)
        begun = time.monotonic()
        with pytest.raises(CapacityError, match="CIFIXER_E2B_CREATES_PER_S"):
            backend_of(config, start_timeout_s=3.0).create(spec_of())
        assert time.monotonic() - begun < 20

    def test_a_limit_of_sandboxes_is_want_of_room_in_its_own_words(self, config: AppConfig, backend: E2BBackend) -> None:
        service().set(concurrent=1)
        backend.create(spec_of("a"))
        begun = time.monotonic()
        with pytest.raises(CapacityError, match=r"maximum number of concurrent E2B sandboxes \(1\).*tear sandboxes down"):
            backend.create(spec_of("b"))
        assert time.monotonic() - begun < 10
        assert len(machines_of(config.namespace)) == 1
        assert backend.breaker_state == "closed"

    def test_of_a_sandbox_that_lives_too_many_requests_say_nothing(self, backend: E2BBackend) -> None:
        """Want of room would say that nothing was begun."""
        handle = backend.create(spec_of())
        service().fault(path="/sandboxes", status=429, times=10_000)
        verbs: list[Callable[[], object]] = [
            lambda: backend.inspect(handle),
            lambda: backend.destroy(handle),
            lambda: backend.extend(handle, time.time() + 60),
            lambda: list(backend.list_owned()),
        ]
        for verb in verbs:
            with pytest.raises(BackendUnavailableError, match="429"):
                verb()
        service().order("clear_faults")
        assert backend.inspect(handle).alive


#: What is set, members of the spec, the error, its words.
FAILURES: dict[str, tuple[Json, Json, type[ExecutorError], str]] = {
    "a template that is nowhere": (
        {},
        {"image": "no-such"},
        SandboxStartError,
        "there is no template 'no-such'.*CIFIXER_E2B_TEMPLATE.*e2b template build",
    ),
    "a template of the settings that is nowhere": ({"e2b_template": "gone"}, {}, SandboxStartError, "there is no template 'gone'"),
    "a user that the template has not": (
        {"e2b_user": "nobody-here"},
        {},
        SandboxStartError,
        "has no user 'nobody-here': set CIFIXER_E2B_USER",
    ),
    "more time than the plan allows": ({}, {"lifetime_s": 90_000}, InvalidRequestError, "Timeout cannot be greater than 24 hours"),
    "memory that only a template can give": ({}, {"memory_bytes": 1 << 30}, InvalidRequestError, "build a template of that size"),
    "a name that is none": ({}, {"image": "a b"}, InvalidRequestError, "image='a b' is not usable"),
    "a network that is not there": ({}, {"network": "host"}, InvalidRequestError, "take one of none, internet"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_start_that_fails_says_why_soon_and_leaves_nothing(config: AppConfig, what: str) -> None:
    settings, members, kind, said = FAILURES[what]
    begun = time.monotonic()
    with pytest.raises(kind, match=said) as caught:
        backend_of(config, **settings).create(spec_of(**members))
    assert type(caught.value) is kind
    assert time.monotonic() - begun < 10
    assert machines_of(config.namespace) == []


@pytest.mark.parametrize("runner", ["of another machine", "that ends at once"])
def test_a_runner_that_cannot_run_is_told_and_leaves_nothing(
    config: AppConfig, backend: E2BBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runner: str
) -> None:
    (tmp_path / "fails").write_text("#!/bin/sh\necho it is broken >&2\nexit 9\n")
    path, said = (runner_path("aarch64"), "x86_64") if runner == "of another machine" else (tmp_path / "fails", "it is broken")
    monkeypatch.setattr(machines, "runner_path", lambda _: path)
    begun = time.monotonic()
    with pytest.raises(SandboxStartError, match=said):
        backend.create(spec_of())
    assert time.monotonic() - begun < 10
    assert machines_of(config.namespace) == []


@pytest.mark.parametrize("path", ["/files", "/process.Process/Start"])
@pytest.mark.parametrize("how", [{"status": 500}, {"status": 502}, {"drop": True}, {"drop": True, "after": True}], ids=str)
def test_what_fails_within_the_machine_leaves_nothing(config: AppConfig, backend: E2BBackend, path: str, how: Json) -> None:
    service().fault(method="POST", path=path, times=10_000, **how)
    with pytest.raises((SandboxStartError, BackendUnavailableError), match=r"did not start|E2B (does not answer|refused)"):
        backend.create(spec_of())
    until(lambda: not machines_of(config.namespace))


class TestKeys:
    def test_a_wrong_key_is_said_at_once_and_not_tried_again(self, config: AppConfig) -> None:
        backend = backend_of(config, e2b_api_key="e2b_wrong")
        handle = SandboxHandle(backend="e2b", sandbox_id="one", placement=backend.placement, data={"e2b_id": "i0"})
        verbs: list[Callable[[], object]] = [
            lambda: backend.create(spec_of()),
            lambda: backend.inspect(handle),
            lambda: backend.destroy(handle),
            lambda: list(backend.list_owned()),
        ]
        for count, verb in enumerate(verbs, start=1):
            with pytest.raises(BackendUnavailableError, match="E2B_API_KEY"):
                verb()
            assert sum(requests().values()) == count
        health = backend.probe()
        assert not health.ok
        assert "E2B_API_KEY" in health.remedy

    def test_a_key_that_was_revoked_is_told_of_a_sandbox_that_lives(self, config: AppConfig, backend: E2BBackend) -> None:
        handle, another = backend.create(spec_of()), service().key(config.namespace)
        service().order("revoke_key", key=config.e2b_api_key)
        with pytest.raises(BackendUnavailableError, match="E2B_API_KEY"):
            backend.inspect(handle)
        assert backend_of(config, e2b_api_key=another).inspect(handle).alive

    def test_another_key_of_the_account_does_as_well(self, config: AppConfig, backend: E2BBackend) -> None:
        handle, other = backend.create(spec_of()), backend_of(config, e2b_api_key=service().key(config.namespace))
        assert other.inspect(handle).alive
        assert machine_of(other.create(spec_of())) == machine_of(handle)
        other.extend(handle, time.time() + 100)
        with create_sandbox(config, e2b_api_key=service().key(config.namespace), sandbox_id="one") as sandbox:
            assert sandbox.run_command("echo here").text == "here\n"
        assert not backend.inspect(handle).alive

    def test_with_a_new_key_of_a_named_account_what_is_gone_is_known_to_be_gone(self, config: AppConfig) -> None:
        """Else its record would stay for ever once a key was changed."""
        backend = backend_of(config, e2b_account="mine")
        other = backend_of(config, e2b_account="mine", e2b_api_key=service().key(config.namespace))
        handle = backend.create(spec_of())
        assert other.inspect(handle).alive
        backend.destroy(handle)
        assert not other.inspect(handle).alive
        other.destroy(handle)

    def test_to_another_account_it_is_not_lost(self, config: AppConfig, backend: E2BBackend) -> None:
        """Two accounts under one Redis can have one placement: one must not close the records of the other."""
        handle, other = backend.create(spec_of()), backend_of(config, e2b_api_key=service().key("other-team"))
        assert other.placement == backend.placement
        verbs: list[Callable[[], object]] = [
            lambda: other.inspect(handle),
            lambda: other.destroy(handle),
            lambda: other.extend(handle, time.time() + 100),
        ]
        for verb in verbs:
            with pytest.raises(BackendUnavailableError, match=r"was made with another key.*CIFIXER_E2B_ACCOUNT"):
                verb()
        assert list(other.list_owned()) == []
        assert backend.inspect(handle).alive


class TestNobodyThere:
    def test_it_is_left_alone_after_a_while_and_found_again(self, backend: E2BBackend) -> None:
        handle = backend.create(spec_of())
        service().order("stop", port="api")
        try:
            give_up = time.monotonic() + 60
            while backend.breaker_state == "closed":
                assert time.monotonic() < give_up, "the breaker does not open"
                with pytest.raises(BackendUnavailableError):
                    backend.inspect(handle)
            with pytest.raises(CircuitOpenError, match="does not answer for a while"):
                backend.create(spec_of("two"))
            assert not backend.probe().ok
        finally:
            service().order("start", port="api")
        assert until(lambda: is_alive(backend, handle))
        assert backend.breaker_state == "closed"
        assert backend.probe().ok

    def test_a_listing_that_fails_is_never_an_empty_one(self, backend: E2BBackend) -> None:
        service().fault(path="/v2/sandboxes", status=500, times=10_000)
        with pytest.raises(BackendUnavailableError):
            list(backend.list_owned())


def is_alive(backend: E2BBackend, handle: SandboxHandle) -> bool:
    try:
        return backend.inspect(handle).alive
    except BackendUnavailableError:
        return False


class TestLifetimes:
    def test_the_deadline_moves_both_ways(self, backend: E2BBackend) -> None:
        handle = backend.create(spec_of(lifetime_s=600))
        assert left_s(handle) == pytest.approx(615, abs=10)
        backend.extend(handle, time.time() + 1200)
        assert left_s(handle) == pytest.approx(1215, abs=5)
        backend.extend(handle, time.time() + 60)
        assert left_s(handle) == pytest.approx(75, abs=5)
        (owned,) = backend.list_owned()
        assert owned.expires_at_s == pytest.approx(time.time() + 60, abs=5)

    def test_looking_at_it_does_not_lengthen_its_life(self, config: AppConfig, backend: E2BBackend) -> None:
        handle = backend.create(spec_of(lifetime_s=600))
        backend.extend(handle, time.time() + 40)
        backend_of(config, e2b_api_key=service().key(config.namespace)).inspect(handle)
        assert left_s(handle) < 60

    def test_a_sandbox_that_was_extended_outlives_its_first_end(self, config: AppConfig) -> None:
        with create_sandbox(config, sandbox_id="one", lifetime_s=4.0) as sandbox:
            begun = time.monotonic()
            sandbox.extend(60)
            time.sleep(max(0.0, begun + 6.0 - time.monotonic()))
            assert sandbox.run_command("echo alive").text == "alive\n"

    def test_the_end_of_its_lifetime_is_told(self, backend: E2BBackend) -> None:
        assert death_of(backend, backend.create(spec_of(lifetime_s=2))).cause == "its lifetime ended"

    def test_the_longest_that_a_plan_allows_is_taken(self, backend: E2BBackend) -> None:
        handle = backend.create(spec_of(lifetime_s=3600))
        assert creates()[0]["body"]["timeout"] == 3600
        backend.extend(handle, time.time() + 3600)
        assert left_s(handle) == pytest.approx(3600, abs=5)


def kill_runner(handle: SandboxHandle) -> None:
    (pid,) = processes_in(machine_of(handle), "enclosed")
    service().order("kill", pid=pid)


DEATHS: dict[str, tuple[Callable[[SandboxHandle], object], str]] = {
    "its time at the service is over": (lambda handle: service().order("expire", sandbox=machine_of(handle)), "reached its time-out"),
    "its node died": (lambda handle: service().order("vanish", sandbox=machine_of(handle)), "E2B lost it"),
    "its runner was killed": (kill_runner, "its runner was killed"),
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_death_is_told(backend: E2BBackend, how: str) -> None:
    end, cause = DEATHS[how]
    handle = backend.create(spec_of())
    backend.inspect(handle)  # so that there are connections
    end(handle)
    assert cause in death_of(backend, handle).cause
    backend.destroy(handle)
    with pytest.raises(SandboxLostError):
        backend.extend(handle, time.time() + 100)
    assert not backend.inspect(handle).alive


def test_one_that_somebody_has_killed_is_gone(backend: E2BBackend) -> None:
    handle = backend.create(spec_of())
    Sandbox.kill(machine_of(handle), **backend._account.options)
    assert "killed" in backend.inspect(handle).cause
    for _ in range(3):
        backend.destroy(handle)


def test_a_command_in_one_that_dies_is_lost_and_says_so(config: AppConfig, backend: E2BBackend) -> None:
    with create_sandbox(config, sandbox_id="one") as sandbox:
        command = sandbox.start_command("exec sleep 600")
        (owned,) = backend.list_owned()
        service().order("vanish", sandbox=machine_of(owned.handle))
        result = command.wait()
        assert (result.status, result.exit_code) == ("sandbox_lost", None)
        assert "microVM is gone" in result.cause


class TestPaused:
    """By somebody, or by a rule of the account."""

    def test_one_that_was_paused_is_alive_and_goes_on(self, config: AppConfig, backend: E2BBackend) -> None:
        with create_sandbox(config, sandbox_id="one") as sandbox:
            assert sandbox.run_command("echo before").text == "before\n"
            (owned,) = backend.list_owned()
            assert backend.inspect(owned.handle).alive
            service().order("pause", sandbox=machine_of(owned.handle))
            assert backend.inspect(owned.handle).alive
            assert sandbox.run_command("echo after").text == "after\n"

    def test_one_that_is_paused_is_listed_and_can_be_destroyed(self, config: AppConfig, backend: E2BBackend) -> None:
        handle = backend.create(spec_of())
        service().order("pause", sandbox=machine_of(handle))
        assert [owned.handle for owned in backend.list_owned()] == [handle]
        backend.destroy(handle)
        assert machines_of(config.namespace) == []

    def test_its_command_goes_on_with_its_output(self, config: AppConfig, backend: E2BBackend) -> None:
        with create_sandbox(config, sandbox_id="one") as sandbox:
            command = sandbox.start_command("for i in $(seq 100); do echo $i; sleep 0.03; done")
            (owned,) = backend.list_owned()
            service().order("pause", sandbox=machine_of(owned.handle))
            assert command.wait().text == "".join(f"{i}\n" for i in range(1, 101))
