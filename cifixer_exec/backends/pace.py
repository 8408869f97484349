"""How fast sandboxes may be made: an account has so many a second, whoever asks (https://e2b.dev/docs/sandbox/rate-limits)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: ``pace(account, per_s, most_wait_s)``: how long to wait before the next creation, in seconds, whose turn is taken with that;
#: None when it would be more than ``most_wait_s``, and then nothing is taken.
Pace = Callable[[str, float, float], float | None]


class ProcessPace:
    """For one process: where there is no Redis to share a pace through."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at_s: dict[str, float] = {}

    def __call__(self, account: str, per_s: float, most_wait_s: float) -> float | None:
        with self._lock:
            now = self._clock()
            turn = max(now, self._free_at_s.get(account, now))
            if turn - now > most_wait_s:
                return None
            self._free_at_s[account] = turn + 1 / per_s
            return turn - now
