"""Sandboxes by the API: made, found, listed, kept alive, ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from tests.support.e2b.stand_in import Service
from tests.support.kubernetes.waiting import until

Create = Callable[..., Any]


class TestLife:
    def test_who_connects_finds_what_was_created(self, service: Service, e2b: Any, create: Create) -> None:
        made = create(metadata={"owner": "me"}, envs={"FROM_CREATE": "1"})
        found = e2b.Sandbox.connect(made.sandbox_id, **service.connection)
        found.files.write("/tmp/here", "yes")
        assert made.commands.run("cat /tmp/here; echo $FROM_CREATE").stdout == "yes1\n"
        info = made.get_info()
        assert (info.template_id, info.metadata, info.state.value, info.memory_mb) == ("base", {"owner": "me"}, "running", 2048)

    def test_the_asynchronous_sdk_does_the_same(self, service: Service, e2b: Any) -> None:
        async def live() -> tuple[str, bool, bool, bool]:
            made = await e2b.AsyncSandbox.create("base", timeout=60, **service.connection)
            found = await e2b.AsyncSandbox.connect(made.sandbox_id, **service.connection)
            out = (await found.commands.run("echo $HOME")).stdout
            ran = await found.is_running()
            return out, ran, await made.kill(), await found.is_running()

        assert asyncio.run(live()) == ("/home/user\n", True, True, False)

    def test_who_is_killed_is_gone_with_all_its_processes(self, service: Service, e2b: Any, create: Create) -> None:
        made = create()
        made.commands.run("sleep 100", background=True)
        pids = service.order("pids", sandbox=made.sandbox_id)
        assert len(pids) >= 2
        assert made.kill() is True
        assert service.left()["processes"] == []
        assert made.kill() is False
        assert made.is_running() is False
        with pytest.raises(e2b.SandboxNotFoundException):
            made.get_info()
        with pytest.raises(e2b.SandboxNotFoundException):
            e2b.Sandbox.connect(made.sandbox_id, **service.connection)
        with pytest.raises(e2b.exceptions.SandboxNotRunningException):
            made.commands.run("true")

    def test_its_time_ends_it(self, service: Service, e2b: Any, create: Create) -> None:
        made = create(timeout=1)
        handle = made.commands.run("sleep 100", background=True)
        with pytest.raises(e2b.exceptions.SandboxNotRunningException):
            handle.wait()
        until(lambda: service.left()["processes"] == [])
        with pytest.raises(e2b.SandboxNotFoundException):
            made.get_info()

    def test_its_time_is_set_from_now_and_connect_only_lengthens_it(self, service: Service, e2b: Any, create: Create) -> None:
        made = create(timeout=100)

        def left_s() -> float:
            return float(service.order("sandboxes")[0]["left_s"])

        e2b.Sandbox.connect(made.sandbox_id, timeout=10, **service.connection)
        assert 50 < left_s() <= 100
        e2b.Sandbox.connect(made.sandbox_id, timeout=1000, **service.connection)
        assert 900 < left_s() <= 1000
        made.set_timeout(30)
        assert 5 < left_s() <= 30

    @pytest.mark.parametrize("call", ["create", "set_timeout"])
    def test_more_time_than_allowed_is_refused(self, service: Service, e2b: Any, create: Create, call: str) -> None:
        service.set(max_timeout_s=7200)
        with pytest.raises(e2b.SandboxException, match="400: Timeout cannot be greater than 2 hours"):
            create(timeout=7201) if call == "create" else create(timeout=7200).set_timeout(7201)

    def test_a_template_that_it_does_not_know_is_not_found(self, create: Create, service: Service, e2b: Any) -> None:
        with pytest.raises(e2b.SandboxException, match="404: template 'mine' not found"):
            create("mine")
        service.set(templates=["mine"])
        assert create("mine").commands.run("echo $E2B_TEMPLATE_ID").stdout == "mine\n"

    def test_one_that_is_paused_goes_on_where_it_was(self, service: Service, e2b: Any, create: Create) -> None:
        made = create()
        handle = made.commands.run("for i in $(seq 1000); do echo $i >> /tmp/n; sleep 0.02; done", background=True)
        until(lambda: made.files.exists("/tmp/n"))
        service.order("pause", sandbox=made.sandbox_id)
        assert [i.sandbox_id for i in self.listed(service, e2b, state=[e2b.SandboxState.PAUSED])] == [made.sandbox_id]
        assert made.is_running() is False
        found = e2b.Sandbox.connect(made.sandbox_id, timeout=60, **service.connection)
        before = found.files.read("/tmp/n")
        until(lambda: found.files.read("/tmp/n") != before)
        assert [p.pid for p in found.commands.list()] == [handle.pid]
        until(lambda: found.files.read("/tmp/n").split()[:3] == ["1", "2", "3"])

    def listed(self, service: Service, e2b: Any, **query: Any) -> list[Any]:
        return list(e2b.Sandbox.list(query=e2b.SandboxQuery(**query), **service.connection).next_items())


class TestList:
    def test_pages_have_everything_once(self, service: Service, e2b: Any, create: Create) -> None:
        made = [create(metadata={"n": str(n)}).sandbox_id for n in range(5)]
        paginator = e2b.Sandbox.list(limit=2, order="asc", **service.connection)
        pages = []
        while paginator.has_next:
            pages.append([i.sandbox_id for i in paginator.next_items()])
        assert pages == [made[:2], made[2:4], made[4:]]
        newest = e2b.Sandbox.list(limit=3, **service.connection)
        assert [[i.sandbox_id for i in newest.next_items()] for _ in range(2)] == [made[:1:-1], made[1::-1]]

    def test_a_page_does_not_lose_what_follows_one_that_died(self, service: Service, e2b: Any, create: Create) -> None:
        made = [create() for _ in range(4)]
        paginator = e2b.Sandbox.list(limit=2, order="asc", **service.connection)
        assert len(paginator.next_items()) == 2
        made[1].kill()
        assert [i.sandbox_id for i in paginator.next_items()] == [m.sandbox_id for m in made[2:]]

    def test_metadata_is_a_filter_whatever_is_in_it(self, service: Service, e2b: Any, create: Create) -> None:
        odd = {"owner": "fbi test", "a&b": "c=d", "u": "ä/ü"}
        wanted = create(metadata={**odd, "more": "1"})
        create(metadata={"owner": "fbi test"})
        query = e2b.SandboxQuery(metadata=odd)
        assert [i.sandbox_id for i in e2b.Sandbox.list(query=query, **service.connection).next_items()] == [wanted.sandbox_id]


class TestIdempotency:
    def test_the_same_key_gives_the_same_sandbox(self, service: Service, create: Create) -> None:
        key = uuid4().hex
        assert create(idempotency_key=key).sandbox_id == create(idempotency_key=key).sandbox_id
        assert len(service.left()["sandboxes"]) == 1
        assert [c["headers"]["idempotency-key"] for c in service.asked()["creates"]] == [key, key]

    def test_also_while_the_first_is_being_made(self, service: Service, create: Create) -> None:
        service.set(create_s=0.5)
        key = uuid4().hex
        with ThreadPoolExecutor() as pool:
            made = list(pool.map(lambda _: create(idempotency_key=key).sandbox_id, range(3)))
        assert len(set(made)) == 1
        assert len(service.left()["sandboxes"]) == 1

    def test_the_sdk_tries_again_after_a_503_and_gets_what_was_made(self, service: Service, create: Create) -> None:
        service.fault(method="POST", path="^/v2/sandboxes$", status=503, after=True, times=2)
        made = create(idempotency_key=uuid4().hex)
        assert service.left()["sandboxes"] == [made.sandbox_id]
        assert service.asked()["requests"]["POST /v2/sandboxes"] == 3
        assert service.asked()["faults"] == {"503": 2}

    def test_without_a_key_each_is_another(self, service: Service, create: Create) -> None:
        service.fault(method="POST", path="^/v2/sandboxes$", status=503, after=True)
        create()
        assert len(service.left()["sandboxes"]) == 2

    def test_another_body_is_refused(self, e2b: Any, create: Create) -> None:
        create(idempotency_key="one")
        with pytest.raises(e2b.SandboxException, match="422"):
            create(idempotency_key="one", metadata={"other": "1"})

    def test_another_team_has_keys_of_its_own(self, service: Service, create: Create) -> None:
        first = create(idempotency_key="one")
        assert create(idempotency_key="one", api_key=service.key("others")).sandbox_id != first.sandbox_id

    def test_what_failed_is_tried_again(self, service: Service, e2b: Any, create: Create) -> None:
        with pytest.raises(e2b.SandboxException):
            create("mine", idempotency_key="two")
        service.set(templates=["mine"])
        assert create("mine", idempotency_key="two").is_running()


class TestTeams:
    def test_a_key_is_needed(self, service: Service, e2b: Any, create: Create) -> None:
        with pytest.raises(e2b.AuthenticationException, match="Invalid API key"):
            create(api_key="wrong")
        key = service.key("others")
        create(api_key=key)
        service.order("revoke_key", key=key)
        with pytest.raises(e2b.AuthenticationException):
            create(api_key=key)

    def test_a_sandbox_of_another_team_is_not_found(self, service: Service, e2b: Any, create: Create) -> None:
        made = create()
        theirs = {**service.connection, "api_key": service.key("others")}
        assert e2b.Sandbox.list(**theirs).next_items() == []
        assert e2b.Sandbox.kill(made.sandbox_id, **theirs) is False
        with pytest.raises(e2b.SandboxNotFoundException):
            e2b.Sandbox.connect(made.sandbox_id, **theirs)
        assert made.is_running()

    def test_there_is_a_limit_for_each_team(self, service: Service, e2b: Any, create: Create) -> None:
        service.set(concurrent=2)
        made = [create(), create()]
        with pytest.raises(e2b.RateLimitException, match="maximum number of concurrent E2B sandboxes \\(2\\)"):
            create(retries=0)
        create(api_key=service.key("others"))
        made[0].kill()
        create()

    def test_creates_come_at_a_rate(self, service: Service, e2b: Any, create: Create) -> None:
        service.set(create_per_s=2.0, create_burst=2, retry_after=False)
        key = service.key(uuid4().hex)
        began = time.monotonic()
        made = [create(api_key=key, retries=0) for _ in range(2)]
        refused = None
        while refused is None and time.monotonic() < began + 20:
            try:
                made.append(create(api_key=key, retries=0))
            except e2b.RateLimitException as error:
                refused = error
        assert refused is not None
        assert len(made) <= 2 + 2 * (time.monotonic() - began)

    def test_the_sdk_comes_again_when_it_is_told_to(self, service: Service, create: Create) -> None:
        service.set(create_per_s=1.0)
        key = service.key(uuid4().hex)
        create(api_key=key)
        began = time.monotonic()
        create(api_key=key)
        assert time.monotonic() - began > 0.5
        assert service.asked()["requests"]["POST /v2/sandboxes"] == 3

    def test_networks_are_recorded(self, service: Service, create: Create) -> None:
        made = create(allow_internet_access=False)
        made.update_network({"allow_out": ["192.0.2.1"]})
        assert service.asked()["creates"][0]["body"]["allow_internet_access"] is False
        assert service.asked()["networks"][0]["sandbox"] == made.sandbox_id
        assert made.get_info().network["allow_out"] == ["192.0.2.1"]
