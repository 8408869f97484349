"""Why a container is dead, as far as its daemon can tell.

https://docs.docker.com/reference/api/engine/: "Inspect a container" has the state, "Monitor events" what happened to it lately; a daemon
keeps its last 256 events, and none over a restart.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from cifixer_exec.backends.docker_local.daemon import Daemon
from cifixer_exec.backends.docker_local.vendor_errors import VENDOR_ERRORS
from cifixer_exec.backends.readings import unix_time
from cifixer_exec.errors import BackendUnavailableError

#: Exit codes of the container: SIGKILL, SIGTERM; of the runner: its lifetime ended.
_KILLED, _TERMINATED, _EXPIRED = 137, 143, 3
#: How close to the end an event must be to be its reason.
_NEAR_S = 5.0
#: How long behind the end it may be known that the daemon itself was asked for it.
_LATE_S = 0.5
#: A daemon that is being stopped kills its containers first and goes a moment later.
_WATCH_S, _LOOK_S = 0.8, 0.1
#: How far the clocks of daemon and worker may be apart.
_SKEW_S = 30.0
REMOVED = "its container was removed"
_RESTARTED = "the Docker daemon was stopped or restarted, and its containers with it"


def cause_of_death(daemon: Daemon, found: Mapping[str, Any]) -> str:
    """One sentence. ``found``: the inspected container, which does not run."""
    state = found["State"]
    code, error = int(state.get("ExitCode") or 0), str(state.get("Error") or "")
    if state.get("Status") == "created":
        return "its container was never started" + (f": {error}" if error else "")
    if state.get("Status") in ("removing", "dead"):  # a removal by force kills it first
        return REMOVED
    if code == _EXPIRED:
        return "its lifetime ended"
    if code in (_KILLED, _TERMINATED):
        return _cause_of_kill(daemon, found)
    said = error or _last_words(daemon, str(found["Id"]))
    return f"its container ended with exit code {code}" + (f": {said}" if said else "")


def _cause_of_kill(daemon: Daemon, found: Mapping[str, Any]) -> str:
    ended_at_s = unix_time(str(found["State"].get("FinishedAt") or ""))
    happened = _events(daemon, str(found["Id"]), ended_at_s)
    if "kill" not in happened:  # the daemon writes it down once the signal is sent, which may be behind the end
        happened = _events(daemon, str(found["Id"]), ended_at_s, until_s=ended_at_s + _LATE_S)
    asked_for = "kill" in happened
    if not asked_for and ("oom" in happened or found["State"].get("OOMKilled")):
        return "out of memory: the kernel killed its first process"
    if daemon.breaker.was_silent(ended_at_s, within_s=_SKEW_S) or (asked_for and _is_going(daemon, ended_at_s)):
        return _RESTARTED
    return "its container was killed from outside" + (", by way of the Docker daemon" if asked_for else "")


def _events(daemon: Daemon, container: str, ended_at_s: float, *, until_s: float | None = None) -> list[str]:
    """What happened to it just before its end, by name. A moment that is still to come is waited for."""
    wanted = {"type": ["container"], "container": [container], "event": ["kill", "oom"]}
    with suppress(*VENDOR_ERRORS):
        until_s = until_s or ended_at_s  # past by the daemon's own clock, or the answer would wait for it
        events = daemon.api.events(since=ended_at_s - _NEAR_S, until=until_s, filters=wanted, decode=True)
        return [str(event.get("Action") or event.get("status")) for event in events]
    return []


def _is_going(daemon: Daemon, ended_at_s: float) -> bool:
    """Whether the daemon goes away now, just behind the container."""
    give_up = time.monotonic() + _WATCH_S
    while time.time() - ended_at_s < _SKEW_S and time.monotonic() < give_up:
        try:
            daemon.ping()
        except BackendUnavailableError:
            return True
        time.sleep(_LOOK_S)
    return False


def _last_words(daemon: Daemon, container: str) -> str:
    with suppress(*VENDOR_ERRORS):
        return bytes(daemon.api.logs(container, tail=5)).decode("utf-8", "replace").strip()[-1500:]
    return ""
