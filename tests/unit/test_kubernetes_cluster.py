"""Requests to an API server that is not at its best, with a clock and a sleep of the test's own."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cifixer_exec.backends.breaker import BLINK_S, FIRST_PAUSE_S, Breaker, BreakerState
from cifixer_exec.backends.kubernetes import cluster as module
from cifixer_exec.backends.kubernetes.cluster import MOST_PAUSE_S, PAUSES_S, POOL_SIZE, Cluster, cluster_at
from cifixer_exec.backends.kubernetes.credentials import Address
from cifixer_exec.backends.kubernetes.refusals import RefusedError
from cifixer_exec.errors import (
    BackendError,
    BackendUnavailableError,
    CapacityError,
    CircuitOpenError,
    ExecutorError,
    InvalidRequestError,
    SandboxLostError,
)
from tests.support.kubeconfigs import kubeconfig
from tests.support.scripted_server import Asked, Reply, ScriptedServer, refusal, scripted_server

Answers = Callable[[Asked], Reply]
OK = Reply(document={"kind": "Thing"})
PATH = "/api/v1/namespaces/ns/things"


@dataclass
class World:
    """A cluster, its server, and the time, which passes only by sleeping."""

    server: ScriptedServer
    cluster: Cluster
    slept: list[float] = field(default_factory=list)
    now_s: float = 1000.0

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def ask(self, method: str = "GET") -> dict[str, Any]:
        return self.cluster.ask(method, PATH, "asking", body={"a": 1} if method != "GET" else None).document

    def listed(self) -> list[Any]:
        return [item for page in self.cluster.pages(PATH, "listing", selector="app=x") for item in page]

    def watched(self, timeout_s: int = 5) -> list[tuple[str, Any]]:
        return list(self.cluster.watch(PATH, "watching", selector="app=x", timeout_s=timeout_s))


@contextmanager
def world_of(tmp_path: Path, answer: Answers) -> Iterator[World]:
    with scripted_server(answer) as server:
        made = Cluster(Address(kubeconfig=kubeconfig(tmp_path / "k", server.url)), sleep=lambda s: world.sleep(s), jitter=lambda: 1.0)
        world = World(server, made)
        made.breaker = Breaker("the Kubernetes API", made.ping, clock=lambda: world.now_s)
        yield world


def then(*replies: Reply) -> Answers:
    """One after the other; the last one for ever."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


METHODS = ("GET", "POST", "PATCH", "DELETE")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_not_now_is_asked_again_after_a_pause(tmp_path: Path, method: str, code: int) -> None:
    with world_of(tmp_path, then(refusal(code), refusal(code), OK)) as world:
        assert world.ask(method) == {"kind": "Thing"}
        assert world.slept == list(PAUSES_S[:2])
        assert {a.body for a in world.server.asked} == ({b""} if method == "GET" else {b'{"a": 1}'})


def test_pauses_are_spread(tmp_path: Path) -> None:
    with world_of(tmp_path, then(refusal(503), OK)) as world:
        world.cluster._jitter = lambda: 0.25
        world.ask()
        assert world.slept == [0.25 * PAUSES_S[0]]


@pytest.mark.parametrize(
    ("said", "waited_s"), [("3", 3.0), ("0", PAUSES_S[0]), ("3600", MOST_PAUSE_S), ("soon", PAUSES_S[0]), ("", PAUSES_S[0])]
)
def test_the_pause_is_the_servers_as_far_as_it_is_bearable(tmp_path: Path, said: str, waited_s: float) -> None:
    with world_of(tmp_path, then(refusal(429, Retry_After=said), OK)) as world:
        world.ask()
        assert world.slept == [waited_s]


@pytest.mark.parametrize(("code", "kind"), [(429, BackendUnavailableError), (500, BackendUnavailableError), (503, BackendUnavailableError)])
def test_not_now_for_ever_is_an_error_with_the_servers_words(tmp_path: Path, code: int, kind: type[ExecutorError]) -> None:
    with world_of(tmp_path, then(refusal(code, message="the server is currently unable"))) as world:
        with pytest.raises(kind, match="the Kubernetes API refused asking: the server is currently unable"):
            world.ask()
        assert len(world.server.asked) == len(PAUSES_S) + 1


REFUSALS: dict[int, tuple[str, type[ExecutorError], str]] = {
    400: ("bad", InvalidRequestError, "bad"),
    403: ('jobs.batch is forbidden: User "u" cannot create resource "jobs"', BackendUnavailableError, "kubectl apply -f k8s/rbac/k8s.yaml"),
    404: ("things not found", SandboxLostError, "things not found"),
    405: ("not allowed", BackendError, "not allowed"),
    409: ("object has been modified", BackendError, "modified"),
    410: ("too old", BackendError, "too old"),
    413: ("too large", BackendError, "too large"),
    422: ("spec: Invalid value", InvalidRequestError, "Invalid value"),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_no_is_asked_once_and_leaves_the_breaker_closed(tmp_path: Path, code: int) -> None:
    message, kind, said = REFUSALS[code]
    with world_of(tmp_path, then(refusal(code, message=message))) as world:
        with pytest.raises(RefusedError):
            world.ask()
        assert (len(world.server.asked), world.slept) == (1, [])
        with pytest.raises(kind, match=said):
            list(world.cluster.watch(PATH, "watching", selector="", timeout_s=1))
        assert world.cluster.breaker.state is BreakerState.CLOSED


def test_a_quota_is_want_of_room_and_no_want_of_rights(tmp_path: Path) -> None:
    said = 'jobs.batch "x" is forbidden: exceeded quota: q, requested: count/jobs.batch=1, used: 5, limited: 5'
    with world_of(tmp_path, then(refusal(403, message=said))) as world, pytest.raises(CapacityError, match="exceeded quota: q"):
        world.cluster.get(PATH, "asking")


def test_a_namespace_that_is_not_there_is_no_loss_of_a_sandbox(tmp_path: Path) -> None:
    answer, said = refusal(404, message='namespaces "ns" not found'), "create it, or set CIFIXER_KUBERNETES_NAMESPACE"
    with world_of(tmp_path, then(answer)) as world, pytest.raises(BackendUnavailableError, match=said):
        world.cluster.get(PATH, "asking")


def test_what_is_not_there_is_none_and_deleting_it_no_error(tmp_path: Path) -> None:
    with world_of(tmp_path, then(refusal(404, message='things "x" not found'))) as world:
        assert world.cluster.get(PATH, "asking") is None
        assert world.cluster.patch(PATH, "changing", {}) is None
        assert world.cluster.delete(PATH, "deleting", {"propagationPolicy": "Background"}) is False
        sent = world.server.asked[-1]
        assert (sent.query, json.loads(sent.body)) == ({}, {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"})


def test_another_of_its_name_is_not_deleted(tmp_path: Path) -> None:
    with world_of(tmp_path, then(refusal(409, "Conflict", "the UID in the precondition does not match"))) as world:
        assert world.cluster.delete(PATH, "deleting", {"preconditions": {"uid": "u"}}) is False
        assert len(world.server.asked) == 1


def test_a_patch_is_a_merge_patch(tmp_path: Path) -> None:
    with world_of(tmp_path, then(OK)) as world:
        world.cluster.patch(PATH, "changing", {"spec": {"x": None}})
        (sent,) = world.server.asked
        assert (sent.method, sent.headers["Content-Type"]) == ("PATCH", "application/merge-patch+json")
        assert json.loads(sent.body) == {"spec": {"x": None}}


def test_a_proxys_page_is_not_shown_whole(tmp_path: Path) -> None:
    page = Reply(status=502, text=b"<html>Bad Gateway " + b"x" * 100_000)
    with world_of(tmp_path, then(page)) as world, pytest.raises(BackendUnavailableError, match="Bad Gateway") as caught:
        world.ask()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_that_is_cut_is_asked_for_again(tmp_path: Path, method: str) -> None:
    with world_of(tmp_path, then(Reply(text=b'{"kind": ', cut=True), OK)) as world:
        assert world.ask(method) == {"kind": "Thing"}
        assert world.slept == [PAUSES_S[0]]


def test_an_answer_that_is_no_json_is_no_answer(tmp_path: Path) -> None:
    answer = Reply(text=b"<html>log in here</html>")
    with world_of(tmp_path, then(answer)) as world, pytest.raises(BackendUnavailableError, match="does not answer while asking"):
        world.ask()


def test_a_server_that_is_away_is_said_with_the_remedy(tmp_path: Path) -> None:
    with world_of(tmp_path, then(OK)) as world:
        pass
    with pytest.raises(BackendUnavailableError, match=r"refused.*start the API server, or check the server's address"):
        world.ask()
    assert world.slept == list(PAUSES_S)


def test_a_server_that_comes_back_meanwhile_is_no_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    slept: list[float] = []
    with scripted_server(then(OK)) as server:
        path = tmp_path / "k"
        made = Cluster(Address(kubeconfig=kubeconfig(path, f"http://127.0.0.1:{port}")), sleep=slept.append, jitter=lambda: 1.0)

        def come_back(seconds: float) -> None:
            slept.append(seconds)
            made.credentials.configuration.host = server.url

        made._sleep = come_back
        assert made.ask("GET", PATH, "asking").document == {"kind": "Thing"}
    assert len(slept) == 1


def test_a_refused_token_is_read_anew_and_the_request_sent_again_at_once(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Reply:
        return OK if asked.headers.get("Authorization") == "Bearer newer" else refusal(401, "Unauthorized", "Unauthorized")

    with world_of(tmp_path, answer) as world:
        world.cluster.credentials.headers()
        kubeconfig(tmp_path / "k", world.server.url, user={"token": "newer"})
        assert world.ask() == {"kind": "Thing"}
        assert ([a.headers["Authorization"] for a in world.server.asked], world.slept) == (["Bearer a-token", "Bearer newer"], [])


def test_a_token_that_stays_refused_is_tried_twice_and_said(tmp_path: Path) -> None:
    with world_of(tmp_path, then(refusal(401, "Unauthorized", "Unauthorized"))) as world:
        with pytest.raises(BackendUnavailableError, match="log in again, or check the token"):
            world.cluster.get(PATH, "asking")
        assert len(world.server.asked) == 2
        assert world.cluster.breaker.state is BreakerState.CLOSED


def opened(world: World) -> None:
    for _ in range(3):
        with pytest.raises(BackendUnavailableError):
            world.ask()
    assert world.cluster.breaker.state is BreakerState.OPEN


def test_a_server_that_is_down_for_long_is_not_asked_any_more_and_then_is_again(tmp_path: Path) -> None:
    down = True
    with world_of(tmp_path, lambda _: refusal(503) if down else OK) as world:
        assert sum(PAUSES_S) > BLINK_S  # or the breaker could not open within one request
        opened(world)
        before = len(world.server.asked)
        with pytest.raises(CircuitOpenError, match="the Kubernetes API does not answer for a while now"):
            world.ask()
        assert len(world.server.asked) == before
        world.now_s += FIRST_PAUSE_S
        with pytest.raises(CircuitOpenError):
            world.ask()
        assert [a.path for a in world.server.asked[before:]] == ["/readyz"]
        down = False
        world.now_s += 2 * FIRST_PAUSE_S
        assert world.ask() == {"kind": "Thing"}
        assert world.cluster.breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("code", [200, 401, 403, 404])
def test_who_may_not_ask_whether_it_is_ready_has_been_answered(tmp_path: Path, code: int) -> None:
    with world_of(tmp_path, then(refusal(code))) as world:
        world.cluster.ping()


@pytest.mark.parametrize("code", [500, 503])
def test_a_server_that_is_not_ready_is_unavailable(tmp_path: Path, code: int) -> None:
    with (
        world_of(tmp_path, then(refusal(code, message="etcd failed"))) as world,
        pytest.raises(BackendUnavailableError, match="etcd failed"),
    ):
        world.cluster.ping()


def pages_of(count: int, size: int, gone_at: tuple[int, ...] = ()) -> Answers:
    """A listing of ``count``; the requests with these numbers meet an expired continue token."""
    asked = [0]

    def answer(request: Asked) -> Reply:
        asked[0] += 1
        if asked[0] in gone_at:
            return refusal(410, "Expired", "The provided continue parameter is too old")
        at = int(request.query.get("continue") or 0)
        more = {"continue": str(at + size)} if at + size < count else {}
        return Reply(document={"metadata": more, "items": list(range(at, min(count, at + size)))})

    return answer


def test_a_listing_goes_on_to_its_last_page(tmp_path: Path) -> None:
    with world_of(tmp_path, pages_of(1250, 500)) as world:
        assert world.listed() == list(range(1250))
        assert [a.query.get("continue") for a in world.server.asked] == [None, "500", "1000"]
        assert {(a.query["limit"], a.query["labelSelector"]) for a in world.server.asked} == {("500", "app=x")}


def test_pages_are_asked_for_as_they_are_wanted(tmp_path: Path) -> None:
    with world_of(tmp_path, pages_of(1250, 500)) as world:
        pages = world.cluster.pages(PATH, "listing", selector="app=x")
        assert len(next(pages)) == 500
        assert len(world.server.asked) == 1


@pytest.mark.parametrize("gone_at", [(1,), (2,), (3,)])
def test_a_listing_whose_snapshot_has_gone_begins_again(tmp_path: Path, gone_at: tuple[int, ...]) -> None:
    with world_of(tmp_path, pages_of(1250, 500, gone_at)) as world:
        assert set(world.listed()) == set(range(1250))


def test_a_listing_that_goes_again_and_again_is_an_error_and_no_short_list(tmp_path: Path) -> None:
    with world_of(tmp_path, pages_of(1250, 500, (2, 4))) as world, pytest.raises(BackendError, match="too old"):
        world.listed()


def test_an_empty_listing_may_have_null_for_its_items(tmp_path: Path) -> None:
    with world_of(tmp_path, then(Reply(document={"metadata": {}, "items": None}))) as world:
        assert world.listed() == []


def event(kind: str, number: int) -> bytes:
    return json.dumps({"type": kind, "object": {"number": number}}).encode() + b"\n"


THREE = event("ADDED", 1) + event("MODIFIED", 2) + event("DELETED", 3)
TOLD = [("ADDED", {"number": 1}), ("MODIFIED", {"number": 2}), ("DELETED", {"number": 3})]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_whole_wherever_the_answer_is_cut_in_pieces(tmp_path: Path, size: int) -> None:
    pieces = tuple(THREE[at : at + size] for at in range(0, len(THREE), size))
    with world_of(tmp_path, then(Reply(pieces=pieces))) as world:
        assert world.watched(timeout_s=5) == TOLD
        (asked,) = world.server.asked
        assert (asked.query["watch"], asked.query["timeoutSeconds"], asked.query["labelSelector"]) == ("true", "5", "app=x")


@pytest.mark.parametrize("end", [b'{"type": "MODIF', b"\xff\n", b"{}{}\n"])
def test_a_watch_that_is_cut_within_an_event_has_told_those_before(tmp_path: Path, end: bytes) -> None:
    with world_of(tmp_path, then(Reply(pieces=(THREE, end), cut=True))) as world:
        assert world.watched() == TOLD


def test_a_watch_from_too_long_ago_just_ends(tmp_path: Path) -> None:
    gone = json.dumps({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}).encode() + b"\n"
    with world_of(tmp_path, then(Reply(pieces=(event("ADDED", 1), gone, event("ADDED", 2))))) as world:
        assert world.watched() == TOLD[:1]


def test_an_event_is_told_when_it_comes_and_not_when_the_watch_ends(tmp_path: Path) -> None:
    go_on = threading.Event()
    with world_of(tmp_path, then(Reply(pieces=(event("ADDED", 1),), hold=lambda: go_on.wait(10)))) as world:
        watch = world.cluster.watch(PATH, "watching", selector="", timeout_s=5)
        assert next(watch) == TOLD[0]
        assert not go_on.is_set()
        go_on.set()
        assert list(watch) == []


def test_a_watch_that_the_server_forgets_to_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_SLACK_S", -0.7)
    go_on = threading.Event()
    with world_of(tmp_path, then(Reply(pieces=(event("ADDED", 1),), hold=lambda: go_on.wait(10)))) as world:
        assert world.watched(timeout_s=1) == TOLD[:1]
        assert not go_on.is_set()
        go_on.set()


def test_the_servers_own_time_is_told(tmp_path: Path) -> None:
    with world_of(tmp_path, then(OK)) as world:
        answer = world.cluster.get(PATH, "asking")
        assert answer is not None
        assert answer.at_s == pytest.approx(time.time(), abs=5)


def test_a_process_has_one_way_to_a_cluster_with_room_for_its_threads(tmp_path: Path) -> None:
    address = Address(kubeconfig=kubeconfig(tmp_path / "k", "http://127.0.0.1:1"))
    assert cluster_at(address) is cluster_at(Address(kubeconfig=address.kubeconfig))
    assert cluster_at(address) is not cluster_at(Address(kubeconfig=address.kubeconfig, namespace="other"))
    assert cluster_at(address).credentials.configuration.connection_pool_maxsize == POOL_SIZE == 160


def test_forty_threads_at_once_each_get_their_own_answer(tmp_path: Path) -> None:
    got: list[str] = []
    with world_of(tmp_path, lambda asked: Reply(document={"path": asked.path})) as world:

        def ask(number: int) -> None:
            for turn in range(5):
                path = f"/{number}/{turn}"
                got.append("" if world.cluster.ask("GET", path, "asking").document["path"] == path else path)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert got == [""] * 200
