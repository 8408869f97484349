"""What the tests of the stand-in share: one of them for each module, a namespace for each test, and unmodified clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.contract_stack import absent
from tests.support.kubernetes.exec_client import Done, execute
from tests.support.kubernetes.rest_client import client, rest_client
from tests.support.kubernetes.samples import ACCOUNT, RESTRICTED, pod_spec, with_runner
from tests.support.kubernetes.stand_in import OwnStandIn, StandIn
from tests.support.kubernetes.starting import NS, started
from tests.support.kubernetes.waiting import until
from tests.support.own_process import NotHereError

Exec = Callable[..., Done]


@pytest.fixture(scope="module", params=["http"])
def cluster(request: pytest.FixtureRequest) -> Iterator[StandIn]:
    """A module that wants it over TLS too gives the parameters."""
    own = OwnStandIn(tls=request.param == "https")
    try:
        stand_in = own.start()
    except NotHereError as error:
        absent("kubernetes", str(error))
    stand_in.namespace(NS, labels=RESTRICTED, accounts=(ACCOUNT,))
    yield stand_in
    own.close()


@pytest.fixture
def ns(cluster: StandIn, namespace: str) -> Iterator[str]:
    """A namespace of the cluster for one test; what is in it is gone at the end, and nothing is left on the node."""
    cluster.namespace(namespace, labels=RESTRICTED, accounts=(ACCOUNT,))
    yield namespace
    for resource in ("jobs", "pods"):
        for key in cluster.order("left")[resource]:
            options = {"propagationPolicy": "Background", "gracePeriodSeconds": 0}
            cluster.order("delete", resource=resource, namespace=key.partition("/")[0], name=key.partition("/")[2], options=options)
    until(lambda: not any(cluster.order("left").values()))


@pytest.fixture(scope="module")
def api(cluster: StandIn) -> Iterator[Any]:
    with rest_client(cluster.admin()) as made:
        yield made


@pytest.fixture(scope="module")
def jobs(api: Any) -> Any:
    return client.BatchV1Api(api)


@pytest.fixture(scope="module")
def core(api: Any) -> Any:
    return client.CoreV1Api(api)


@pytest.fixture(scope="module")
def pod(cluster: StandIn) -> str:
    """One for all tests, with the real runner as PID 1."""
    return started(cluster, "shared", with_runner(pod_spec()))


@pytest.fixture
def token(cluster: StandIn) -> str:
    return cluster.token(cluster.admin())


@pytest.fixture
def run(cluster: StandIn, token: str, pod: str) -> Exec:
    """Executes in the shared Pod."""
    return lambda *command, **options: execute(cluster, token, (NS, pod), list(command), **options)
