"""What the E2B backend finds of its own: page by page, and never what is somebody else's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2b import Sandbox

from cifixer_exec import AppConfig
from cifixer_exec.backends.e2b import E2BBackend
from cifixer_exec.backends.e2b.names import Names
from tests.support.e2b_accounts import account_of, backend_of, machine_of, machines_of, spec_of
from tests.support.e2b_service import service

PAGE = 100


@pytest.fixture
def config(namespace: str) -> Iterator[AppConfig]:
    with account_of(namespace) as made_here:
        yield made_here


@pytest.fixture
def backend(config: AppConfig) -> E2BBackend:
    return backend_of(config)


def ids(backend: E2BBackend) -> list[str]:
    return sorted(owned.handle.sandbox_id for owned in backend.list_owned())


def made(backend: E2BBackend, metadata: dict[str, str] | None, **options: Any) -> str:
    """A microVM without a runner; E2B's id."""
    return str(Sandbox.create("base", timeout=300, metadata=metadata, **{**backend._account.options, **options}).sandbox_id)


def test_more_than_a_page_are_all_found_and_each_once(backend: E2BBackend) -> None:
    names = [f"s{number:03}" for number in range(2 * PAGE + 10)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: made(backend, backend._names.metadata(spec_of(name))), names))
    service().order("forget")
    assert ids(backend) == names
    assert service().asked()["requests"] == {"GET /v2/sandboxes": 3}
    service().order("forget")
    first = next(iter(backend.list_owned()))
    assert first.handle.sandbox_id in names
    assert service().asked()["requests"] == {"GET /v2/sandboxes": 1}  # by and by, as they are wanted
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(backend.destroy, [owned.handle for owned in backend.list_owned()]))
    assert ids(backend) == []


def test_what_is_found_can_be_used_and_says_its_times(backend: E2BBackend) -> None:
    handle = backend.create(spec_of(lifetime_s=600))
    (owned,) = backend.list_owned()
    assert owned.handle == handle
    assert owned.created_at_s == pytest.approx(time.time(), abs=30)
    assert owned.expires_at_s - owned.created_at_s == pytest.approx(600, abs=2)


def test_half_made_ones_are_found(backend: E2BBackend) -> None:
    e2b_id = made(backend, backend._names.metadata(spec_of("half")))
    (owned,) = backend.list_owned()
    assert (owned.handle.sandbox_id, machine_of(owned.handle)) == ("half", e2b_id)
    assert backend.inspect(owned.handle).alive
    backend.destroy(owned.handle)
    assert ids(backend) == []


def test_two_of_one_name_are_both_found(backend: E2BBackend) -> None:
    """A server that forgets idempotency keys makes them; one of them is nobody's."""
    metadata = backend._names.metadata(spec_of())
    there = {made(backend, metadata), made(backend, metadata)}
    assert {machine_of(owned.handle) for owned in backend.list_owned()} == there
    assert machine_of(backend.create(spec_of())) in there


def test_nobody_elses_is_found_or_touched(config: AppConfig, backend: E2BBackend) -> None:
    ours = backend._names.metadata(spec_of())
    strangers = {
        "without metadata": None,
        "of another program": {"cifixer_app": "another", "cifixer_namespace": backend._names.namespace, "cifixer_sandbox_id": "one"},
        "of another namespace": Names("another").metadata(spec_of()),
        "of a namespace that begins like ours": Names(f"{backend._names.namespace}x").metadata(spec_of()),
        "of the queue's sandboxes": Names(config.namespace).metadata(spec_of()),
        "with odd values": {"a": "b&c=d %20 ü", "cifixer_app": "cifixer-exec"},
    }
    for metadata in strangers.values():
        made(backend, metadata)
    made(backend, ours, api_key=service().key("other-team"))
    assert ids(backend) == []
    handle = backend.create(spec_of())
    assert [owned.handle for owned in backend.list_owned()] == [handle]
    backend.destroy(handle)
    there = machines_of(config.namespace)
    assert len(there) == len(strangers)
    for found in there:
        Sandbox.kill(found["sandboxID"], **backend._account.options)
    for found in machines_of("other-team"):
        Sandbox.kill(found["sandboxID"], **{**backend._account.options, "api_key": service().key("other-team")})


def test_a_page_that_fails_in_the_middle_is_an_error_and_not_the_end(backend: E2BBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifixer_exec.backends.e2b.account._PAGE", 2)
    for name in ("a", "b", "c"):
        made(backend, backend._names.metadata(spec_of(name)))
    service().fault(path="/v2/sandboxes", status=500, skip=1, times=10_000)
    found = iter(backend.list_owned())
    assert len({next(found).handle.sandbox_id for _ in range(2)}) == 2
    with pytest.raises(Exception, match="E2B refused listing its sandboxes"):
        next(found)


def test_one_that_ends_between_two_pages_keeps_no_other_from_being_found(backend: E2BBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifixer_exec.backends.e2b.account._PAGE", 2)
    names = ["a", "b", "c", "d", "e"]
    e2b_ids = {name: made(backend, backend._names.metadata(spec_of(name))) for name in names}
    found = iter(backend.list_owned())
    first = [next(found).handle.sandbox_id for _ in range(2)]
    service().order("vanish", sandbox=e2b_ids[first[1]])
    assert sorted(first + [owned.handle.sandbox_id for owned in found]) == names
