"""What a run does, drawn from its seed: how long, which lives the workers have, which faults come when.

Each stream of decisions has random numbers of its own, made from the seed and the stream's name. So what a worker or a story
does depends on the seed alone; only how their steps fall between one another depends on the machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from tests.support.failpoints import Arm, points_of

LEASE_S = 1.5
DRAIN_S = 0.5
#: How soon the next owner should have what a killed one left; measured and shown, not asserted.
ADOPTION_BOUND_S = LEASE_S + 2.0
#: An op whose record is final is kept this long: the audit looks at each within a few seconds.
RETENTION_S = 90.0
COLLECTED_S = 45.0
#: No call of a client may take longer; all commands are much shorter.
CALL_BOUND_S = 75.0
#: A worker that was told to end: the drain and what may be slow about it.
TERM_BOUND_S = 20.0

Fate = Literal["killpoint", "kill", "freezepoint", "pause", "term"]
#: Points that only a worker passes that is told to end.
_AT_THE_END = tuple(f"{verb}.{side}" for verb in ("release", "ring", "leave") for side in ("before", "after"))
#: Passed all the time without any op, so that the first passing would always be at the start.
_BACKGROUND = ("renew", "sweep", "cancelled_ops")
#: Where a command can be caught, more often than the rest.
_OFTEN = {
    "take": 3,
    "start": 3,
    "output": 3,
    "publish": 3,
    "finish": 4,
    "call": 2,
    "create": 2,
    "destroy": 2,
    "ready": 2,
    "daemon": 4,
    "api": 4,
    "service": 4,
}
#: A worker that waits for its point lives so much longer, where sandboxes take their time: else it dies at random before.
_PATIENCE = {"local": 1.0, "docker_local": 1.7, "kubernetes": 1.7, "e2b": 1.7}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line. ``kills`` or ``seconds``, whichever comes first, ends the faults."""

    backend: str = "local"
    seed: int = 1
    kills: int = 1000
    seconds: float = 3600.0
    workers: int = 3
    sandboxes: int = 6
    #: Whether stories move files too.
    files: bool = True


@dataclass(frozen=True, kw_only=True)
class Life:
    """A worker's: ``fate`` strikes at an armed point or after ``after_s``; a pause lasts ``pause_s``, and then it is killed."""

    fate: Fate
    after_s: float
    pause_s: float = 0.0
    arm: Arm | None = None


def stream(seed: int, name: str) -> random.Random:
    """The random numbers of one stream of decisions."""
    return random.Random(f"{seed}/{name}")


def life(rng: random.Random, backend: str) -> Life:
    """The next worker's."""
    fate: Fate = rng.choices(("killpoint", "kill", "freezepoint", "pause", "term"), (50, 20, 10, 7, 13))[0]
    pause_s = rng.uniform(1.3, 2.6) * LEASE_S
    if fate in ("killpoint", "freezepoint"):
        arm = _arm(rng, "kill" if fate == "killpoint" else "freeze", backend)
        after_s = rng.uniform(1.0, 2.5) if arm.point in _AT_THE_END else rng.uniform(2.0, 4.5) * _PATIENCE[backend]
        return Life(fate=fate, after_s=after_s, pause_s=pause_s, arm=arm)
    return Life(fate=fate, after_s=rng.uniform(0.2, 2.5), pause_s=pause_s)


def ends_by_term(plan: Life) -> bool:
    """Whether the worker is told to end, be it to make it pass its point."""
    return plan.fate == "term" or (plan.arm is not None and plan.arm.point in _AT_THE_END)


def _arm(rng: random.Random, action: str, backend: str) -> Arm:
    points = [p for p in points_of(backend) if action == "kill" or p not in _AT_THE_END]
    point = rng.choices(points, [_OFTEN.get(p.split(".")[0], 1) for p in points])[0]
    most = 12 if point.split(".")[0] in _BACKGROUND else 3
    return Arm(point=point, action=action, hit=rng.randint(1, most))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A fault of the network at one port: the name of the port's method and its arguments."""

    kind: str
    arguments: tuple[float, ...]


def cut(rng: random.Random) -> Cut:
    """The next one. None lasts as long as a client's patience."""
    kind = rng.choices(("reset", "reset_after_bytes", "stall", "refuse", "slow"), (30, 35, 15, 10, 10))[0]
    arguments: tuple[float, ...] = ()
    if kind == "reset_after_bytes":
        arguments = (rng.choice((0, 0, 0, 40, 300, 5000, 60_000)),)
    elif kind == "stall":
        arguments = (rng.uniform(0.3, 2.5 * LEASE_S),)
    elif kind == "refuse":
        arguments = (rng.uniform(0.2, 2 * LEASE_S),)
    elif kind == "slow":
        arguments = (rng.uniform(0.005, 0.15), rng.uniform(0.5, 3.0))
    return Cut(kind=kind, arguments=arguments)
