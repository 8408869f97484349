"""What sandboxes can reach, by policy.

``none``      nothing, which is the default.
``internal``  what the operator attaches to the network ``cifixer-internal`` (a mirror, a database) and other sandboxes of this policy;
              nothing outside of it.
``bridge``    all that the daemon's host can reach, but no other sandbox; or whatever the network does that the operator names instead.

Both networks are made when they are first wanted and stay, like an image: one of each per daemon. A daemon keeps these promises with packet
filters, so one that runs with ``--iptables=false`` does not; and no filter of its keeps containers from the ports of its own host.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from docker.errors import APIError, NotFound

from cifixer_exec.backends.docker_local.daemon import Daemon, Facts
from cifixer_exec.errors import SandboxStartError

INTERNAL, BRIDGE = "cifixer-internal", "cifixer-bridge"
_LABEL = "cifixer.network"
#: https://docs.docker.com/engine/network/drivers/bridge/: containers of one network cannot reach each other without it.
_BETWEEN_CONTAINERS = "com.docker.network.bridge.enable_icc"
_OPTIONS: Mapping[str, dict[str, Any]] = {
    INTERNAL: {"internal": True},
    BRIDGE: {"options": {_BETWEEN_CONTAINERS: "false"}},
}
_making = threading.Lock()


def possible_networks(facts: Facts, named: str) -> tuple[str, ...]:
    """The policies that can be kept here. Podman has no way to keep containers of one network apart."""
    if not facts.bridges:
        return ("none",)
    return ("none", "internal") if facts.podman and not named else ("none", "internal", "bridge")


def network_mode(daemon: Daemon, policy: str | None, named: str) -> str:
    """The network of a new container, which is there now. ``named``: the operator's own for ``bridge``, or empty.

    Raises:
        SandboxStartError: the operator's is not there, or ours is not what it should be.
    """
    if policy not in ("internal", "bridge"):
        return "none"
    if policy == "bridge" and named:
        if _find(daemon, named) is None:
            mend = f"make it (docker network create {named}), or unset CIFIXER_DOCKER_NETWORK"
            raise SandboxStartError(f"the Docker daemon has no network {named!r}: {mend}", mend)
        return named
    return _ours(daemon, INTERNAL if policy == "internal" else BRIDGE)


def _ours(daemon: Daemon, name: str) -> str:
    with _making:
        found = _find(daemon, name) or _make(daemon, name)
    internal = _OPTIONS[name].get("internal", False)
    between = _OPTIONS[name].get("options", {}).get(_BETWEEN_CONTAINERS)
    if bool(found.get("Internal")) != internal or (found.get("Options") or {}).get(_BETWEEN_CONTAINERS) != between:
        mend = f"remove it (docker network rm {name}), and it is made anew"
        raise SandboxStartError(f"the Docker network {name!r} is not as this package makes it: {mend}", mend)
    return name


def _make(daemon: Daemon, name: str) -> dict[str, Any]:
    with daemon.asked(f"making the network {name!r}"):
        try:
            daemon.api.create_network(name, driver="bridge", check_duplicate=True, labels={_LABEL: name}, **_OPTIONS[name])
        except APIError as error:
            if error.status_code != 409:  # another process was quicker
                raise
        return dict(daemon.api.inspect_network(name))


def _find(daemon: Daemon, name: str) -> dict[str, Any] | None:
    with daemon.asked(f"looking for the network {name!r}"):
        try:
            return dict(daemon.api.inspect_network(name))
        except NotFound:
            return None
