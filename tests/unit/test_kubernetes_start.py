"""Waiting for a Pod, with an API server of the test's that tells it what it likes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.credentials import Address
from cifixer_exec.backends.kubernetes.names import Names
from cifixer_exec.backends.kubernetes.start import LEAST_WATCH_S, MEND_S, PassingError, Start
from cifixer_exec.errors import CapacityError, SandboxStartError
from tests.support.kubeconfigs import kubeconfig
from tests.support.scripted_server import Asked, Reply, refusal, scripted_server

Json = dict[str, Any]
NAMES = Names("ours")
JOB_UID = "job-uid"
RUNNING: Json = {"running": {}}
CREATING: Json = {"waiting": {"reason": "ContainerCreating"}}


def pod(state: Json | None, *, owner: str = JOB_UID, **status: Any) -> Json:
    states = [] if state is None else [{"name": "sandbox", "state": state}]
    metadata = {"name": "p", "uid": f"pod-of-{owner}", "ownerReferences": [{"kind": "Job", "uid": owner}]}
    return {"metadata": metadata, "status": {"containerStatuses": states, **status}}


@dataclass
class Api:
    """What it tells: the events of each watch, one list after the other (the last one again and again), the Job, and other events.

    Time passes here: ``tick_s`` by each watch.
    """

    watches: list[list[tuple[str, Json]]]
    job: Json | None = field(default_factory=lambda: {"metadata": {"uid": JOB_UID}})
    told: dict[str, list[Json]] = field(default_factory=dict)
    tick_s: float = 1.0
    now_s: float = 100.0
    slept: list[float] = field(default_factory=list)
    begun: int = 0

    def answer(self, asked: Asked) -> Reply:
        if asked.query.get("watch"):
            self.begun += 1
            self.now_s += self.tick_s
            events = self.watches.pop(0) if len(self.watches) > 1 else self.watches[0]
            return Reply(pieces=tuple(json.dumps({"type": t, "object": o}).encode() + b"\n" for t, o in events) or (b"\n",))
        if asked.path.endswith("/events"):
            uid = asked.query["fieldSelector"].removeprefix("involvedObject.uid=")
            return Reply(document={"items": self.told.get(uid, [])})
        return refusal(404, message='jobs.batch "x" not found') if self.job is None else Reply(document=self.job)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


@contextmanager
def started(tmp_path: Path, api: Api) -> Iterator[Callable[[], Json]]:
    with scripted_server(api.answer) as server:
        cluster = Cluster(Address(kubeconfig=kubeconfig(tmp_path / "k", server.url)))
        start = Start(cluster, NAMES, "one", JOB_UID, clock=lambda: api.now_s, sleep=api.sleep)
        yield lambda: start.running(api.now_s + 60)


def failing(tmp_path: Path, api: Api) -> SandboxStartError | CapacityError:
    with started(tmp_path, api) as start, pytest.raises((SandboxStartError, CapacityError)) as caught:
        start()
    assert isinstance(caught.value, SandboxStartError | CapacityError)
    return caught.value


def test_the_pod_is_given_when_its_container_runs(tmp_path: Path) -> None:
    running = pod(RUNNING)
    with started(tmp_path, Api([[("ADDED", pod(None)), ("MODIFIED", pod(CREATING)), ("MODIFIED", running)]])) as start:
        assert start() == running


def test_watches_that_end_are_begun_again(tmp_path: Path) -> None:
    api = Api([[("ADDED", pod(None))], [], [("ADDED", pod(CREATING))], [("ADDED", pod(RUNNING))]])
    with started(tmp_path, api) as start:
        start()
    assert (api.begun, api.slept) == (4, [])


def test_a_server_that_ends_each_watch_at_once_is_not_flooded(tmp_path: Path) -> None:
    gone = ("ERROR", {"kind": "Status", "code": 410})
    api = Api([*[[gone]] * 20, [("ADDED", pod(RUNNING))]], tick_s=0.0)
    with started(tmp_path, api) as start:
        start()
    assert api.slept == [LEAST_WATCH_S] * 20


def test_the_pod_of_a_former_job_of_this_name_is_not_it(tmp_path: Path) -> None:
    former = pod({"terminated": {"exitCode": 137}}, owner="former", phase="Failed")
    with started(tmp_path, Api([[("ADDED", former), ("DELETED", former), ("ADDED", pod(RUNNING))]])) as start:
        assert start()["metadata"]["uid"] == f"pod-of-{JOB_UID}"


def test_what_will_never_run_is_said_at_once(tmp_path: Path) -> None:
    waiting = {"waiting": {"reason": "InvalidImageName", "message": "couldn't parse image name"}}
    api = Api([[("ADDED", pod(waiting))]])
    error = failing(tmp_path, api)
    assert "its Pod does not start: InvalidImageName: couldn't parse image name" in str(error)
    assert error.code == "correct the name of the image"
    assert (api.begun, isinstance(error, PassingError)) == (1, False)


def test_a_pod_that_is_deleted_while_it_starts_is_worth_another_try(tmp_path: Path) -> None:
    error = failing(tmp_path, Api([[("ADDED", pod(CREATING)), ("DELETED", pod(CREATING))]]))
    assert isinstance(error, PassingError)


@pytest.mark.parametrize("job", [None, {"metadata": {"uid": "another"}}], ids=["gone", "another"])
def test_a_job_that_is_deleted_while_it_starts_is_worth_another_try(tmp_path: Path, job: Json | None) -> None:
    assert isinstance(failing(tmp_path, Api([[]], job=job)), PassingError)


def test_a_job_that_failed_before_it_had_a_pod_says_why(tmp_path: Path) -> None:
    condition = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "was active longer"}
    api = Api([[]], job={"metadata": {"uid": JOB_UID}, "status": {"conditions": [condition]}})
    assert "its Job failed before it ran: DeadlineExceeded: was active longer" in str(failing(tmp_path, api))


def failed_create(message: str) -> Json:
    return {"reason": "FailedCreate", "type": "Warning", "message": message, "lastTimestamp": "2026-01-01T00:00:00Z"}


NOT_LET: dict[str, tuple[str, type[Exception]]] = {
    "quota": ('pods "p" is forbidden: exceeded quota: q, requested: pods=1, used: pods=5, limited: pods=5', CapacityError),
    "Pod Security": ('pods "p" is forbidden: violates PodSecurity "restricted:latest": seccompProfile', SandboxStartError),
    "LimitRange": ('pods "p" is forbidden: maximum cpu usage per Container is 500m, but limit is 1', SandboxStartError),
    "webhook": ('admission webhook "policy.example" denied the request: no latest tags', SandboxStartError),
    "an invalid Pod": ('Pod "p" is invalid: spec.containers[0].resources.requests: Invalid value: "2"', SandboxStartError),
    "service account": ('pods "p" is forbidden: error looking up service account ns/sa: serviceaccount "sa" not found', SandboxStartError),
}
UNDECIDED = (
    'Internal error occurred: failed calling webhook "w": context deadline exceeded',
    "etcdserver: request timed out",
    'pods "p" is forbidden: Operation cannot be fulfilled on resourcequotas "q": the object has been modified',
)


@pytest.mark.parametrize("who", NOT_LET)
def test_who_does_not_let_the_pod_be_is_quoted_within_the_first_watch(tmp_path: Path, who: str) -> None:
    words, kind = NOT_LET[who]
    api = Api([[]], told={JOB_UID: [failed_create("something older") | {"lastTimestamp": "2025"}, failed_create(words)]})
    error = failing(tmp_path, api)
    assert type(error) is kind
    assert str(error) == f"the cluster does not let its Pod be: {words}"
    assert api.begun == 1


@pytest.mark.parametrize("words", UNDECIDED)
def test_who_could_not_be_asked_about_the_pod_is_asked_again_by_its_job_for_a_while(tmp_path: Path, words: str) -> None:
    told = {JOB_UID: [failed_create(words)]}
    error = failing(tmp_path, Api([[]], told=told))
    assert words in str(error)
    mended = Api([[], [], [("ADDED", pod(RUNNING))]], told=told)
    with started(tmp_path, mended) as start:
        start()


def test_a_pull_that_fails_has_a_moment_to_mend_itself(tmp_path: Path) -> None:
    failing_pull = pod({"waiting": {"reason": "ErrImagePull", "message": "dial tcp: i/o timeout"}})
    api = Api([[("ADDED", failing_pull)]])
    error = failing(tmp_path, api)
    assert "ErrImagePull: dial tcp: i/o timeout" in str(error)
    assert "imagePullSecrets" in error.code
    assert MEND_S < api.now_s - 100 < MEND_S + 3
    mended = Api([[("ADDED", failing_pull)]] * 5 + [[("ADDED", pod(RUNNING))]])
    with started(tmp_path, mended) as start:
        start()


def test_what_events_tell_before_the_status_does_is_heard(tmp_path: Path) -> None:
    """Behind an init container a kubelet says in the status why the next one does not start when it looks again, 10 to 15 s later."""
    words = 'Failed to apply default image tag "UP": couldn\'t parse image name "UP": invalid reference format'
    event = {"reason": "InspectFailed", "type": "Warning", "message": words, "lastTimestamp": "2026-01-01T00:00:00Z"}
    api = Api([[("ADDED", pod({"waiting": {"reason": "PodInitializing"}}))]], told={f"pod-of-{JOB_UID}": [event]})
    assert f"its Pod does not start: InvalidImageName: {words}: correct the name" in str(failing(tmp_path, api))
    assert api.begun == 1


def test_events_that_may_not_be_read_keep_nothing_from_starting(tmp_path: Path) -> None:
    class Silent(Api):
        def answer(self, asked: Asked) -> Reply:
            return refusal(403, message="events is forbidden: cannot list") if asked.path.endswith("/events") else super().answer(asked)

    with started(tmp_path, Silent([[("ADDED", pod(CREATING))], [("ADDED", pod(RUNNING))]])) as start:
        start()


def test_a_pull_that_fails_behind_an_init_container_has_no_longer_a_moment(tmp_path: Path) -> None:
    """There the status says nothing for long, and the events say it again and again."""
    event = {"reason": "Failed", "type": "Warning", "message": 'Failed to pull image "x": dial tcp: i/o timeout', "lastTimestamp": "2026"}
    api = Api([[("ADDED", pod({"waiting": {"reason": "PodInitializing"}}))]], told={f"pod-of-{JOB_UID}": [event]})
    assert 'ErrImagePull: Failed to pull image "x": dial tcp: i/o timeout' in str(failing(tmp_path, api))
    assert MEND_S < api.now_s - 100 < MEND_S + 3


def test_want_of_room_is_waited_for_and_then_told_in_the_schedulers_words(tmp_path: Path) -> None:
    words = "0/1 nodes are available: 1 Insufficient cpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    api = Api([[("ADDED", pod(None, conditions=[condition]))]])
    error = failing(tmp_path, api)
    assert isinstance(error, CapacityError)
    assert f"its Pod does not run in time: Unschedulable: {words}" in str(error)
    assert api.now_s - 100 >= 60


def test_what_only_events_tell_is_told_when_it_takes_too_long(tmp_path: Path) -> None:
    events = [
        {"reason": "FailedMount", "type": "Warning", "message": f'volume "v" {n}', "lastTimestamp": f"2026-0{n}"} for n in range(1, 9)
    ]
    normal = {"reason": "Scheduled", "type": "Normal", "message": "fine", "lastTimestamp": "2027"}
    api = Api([[("ADDED", pod(CREATING))]], told={f"pod-of-{JOB_UID}": [*reversed(events), normal]})
    said = str(failing(tmp_path, api))
    assert said.startswith("its Pod does not run in time (its events: FailedMount: volume")
    assert [n for n in range(1, 9) if f'"v" {n}' in said] == [4, 5, 6, 7, 8]
    assert "Scheduled" not in said
