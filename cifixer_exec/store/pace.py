"""The pace of creations that all processes of an account keep together: one call of ``journal.lua``, whose clock is the server's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import redis

from cifixer_exec.store.script import SHA, TEXT

log = logging.getLogger(__name__)
#: Of the keys: an account's pace holds whatever the namespace of who asks.
NAMESPACE = "cifixer-pace"
_PATIENCE_S = 3.0


class SharedPace:
    """As :data:`cifixer_exec.backends.pace.Pace` has it; blocking. While Redis is away ``otherwise`` is asked."""

    def __init__(self, url: str, otherwise: Callable[[str, float, float], float | None]) -> None:
        self._url = url
        self._otherwise = otherwise
        self._lock = threading.Lock()
        self._client: Any = None

    def __call__(self, account: str, per_s: float, most_wait_s: float) -> float | None:
        arguments = (1, NAMESPACE, "pace", 0, account, max(1, round(1000 / per_s)), round(most_wait_s * 1000))
        try:
            word, wait_ms = self._evaluated(*arguments)
        except redis.RedisError as error:
            log.warning("Redis does not tell whose turn it is to make a sandbox, so only this process's own pace is kept: %s", error)
            return self._otherwise(account, per_s, most_wait_s)
        return int(wait_ms) / 1000 if word == b"ok" else None

    def _evaluated(self, *arguments: str | int) -> Any:
        with self._lock:
            if self._client is None:
                self._client = redis.Redis.from_url(self._url, socket_timeout=_PATIENCE_S, socket_connect_timeout=_PATIENCE_S)
        try:
            return self._client.execute_command("EVALSHA", SHA, *arguments)
        except redis.exceptions.NoScriptError:
            return self._client.execute_command("EVAL", TEXT, *arguments)
