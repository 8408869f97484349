"""Everything that happens to the containers of one namespace on a daemon, as the daemon tells it."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import docker

from tests.support.docker_daemon import docker_host


class ContainerEvents:
    """Listens in a thread from its making until :meth:`close`. Counters and sets are read when it is closed."""

    def __init__(self, namespace: str) -> None:
        self.counts: Counter[str] = Counter()
        self.created: set[str] = set()
        self.destroyed: set[str] = set()
        #: exec id -> container id, of those whose end was not told; of those that end with their container it is not always.
        self.open_execs: dict[str, str] = {}
        #: How many were open in one container when it was killed, at the most.
        self.most_execs = 0
        self._api = docker.APIClient(base_url=docker_host(), version="auto", timeout=60)
        self._stream: Any = self._api.events(filters={"label": f"cifixer.namespace={namespace}"}, decode=True)
        self._thread = threading.Thread(target=self._listen, name="docker-events")
        self._thread.start()

    def close(self) -> None:
        """No more of them."""
        self._stream.close()
        self._thread.join()
        self._api.close()

    def running_execs(self) -> list[str]:
        """Those that the daemon calls running, whatever was told of them."""
        api = docker.APIClient(base_url=docker_host(), version="auto", timeout=60)
        try:
            return [e for e in self.open_execs if _runs(api, e)]
        finally:
            api.close()

    def _listen(self) -> None:
        for event in self._stream:
            self._take(event["Action"].partition(":")[0], event["Actor"])

    def _take(self, action: str, actor: dict[str, Any]) -> None:
        self.counts[action] += 1
        container, attributes = actor["ID"], actor["Attributes"]
        if action == "create":
            self.created.add(container)
        elif action == "destroy":
            self.destroyed.add(container)
        elif action == "kill":
            self.most_execs = max(self.most_execs, sum(c == container for c in self.open_execs.values()))
        elif action == "exec_start":
            self.open_execs[attributes["execID"]] = container
        elif action == "exec_die":
            self.open_execs.pop(attributes["execID"], None)


def _runs(api: Any, exec_id: str) -> bool:
    try:
        return bool(api.exec_inspect(exec_id)["Running"])
    except docker.errors.NotFound:
        return False
