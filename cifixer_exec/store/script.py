"""Calls ``journal.lua``: by its hash, and with its text where the server does not know it yet."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

TEXT = files("cifixer_exec.store").joinpath("journal.lua").read_bytes()
SHA = hashlib.sha1(TEXT, usedforsecurity=False).hexdigest()


class Script:
    """The journal's script on one namespace."""

    def __init__(self, redis: Redis, namespace: str, retention_ms: int) -> None:
        self._execute: Any = redis.execute_command  # untyped in redis-py
        self._namespace = namespace
        self._retention_ms = retention_ms

    def command(self, verb: str, *arguments: bytes | str | int) -> tuple[bytes | str | int, ...]:
        """The whole EVALSHA command."""
        return ("EVALSHA", SHA, 1, self._namespace, verb, self._retention_ms, *arguments)

    async def __call__(self, verb: str, *arguments: bytes | str | int) -> list[Any]:
        """The reply of a verb. A server that was restarted has forgotten the script, so it may have to travel again."""
        command = self.command(verb, *arguments)
        try:
            reply: list[Any] = await self._execute(*command)
        except NoScriptError:
            reply = await self._execute("EVAL", TEXT, *command[2:])
        return reply
