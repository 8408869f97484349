"""Who asks: API keys, their teams, and how fast a team may create."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

from tests.support.e2b.knobs import Knobs
from tests.support.e2b.problems import HttpError


@dataclass
class Team:
    """``tokens`` of its bucket, as of ``at``; None before its first create."""

    name: str
    tokens: float | None = None
    at: float = 0.0

    def take(self, knobs: Knobs) -> None:
        """One create. Raises HttpError (429)."""
        if knobs.create_per_s <= 0:
            return
        now = asyncio.get_running_loop().time()
        before = float(knobs.create_burst) if self.tokens is None else self.tokens
        self.tokens = min(knobs.create_burst, before + (now - self.at) * knobs.create_per_s)
        self.at = now
        if self.tokens < 1:
            wait_s = max(1, round((1 - self.tokens) / knobs.create_per_s))
            raise HttpError(429, "Rate limit exceeded, please try again later", headers=_after(wait_s) if knobs.retry_after else {})
        self.tokens -= 1


def _after(wait_s: int) -> dict[str, str]:
    return {"Retry-After": str(wait_s)}


@dataclass
class Teams:
    """Each key is one team's."""

    of_key: dict[str, Team] = field(default_factory=dict)

    def add(self, name: str) -> str:
        """A new key; teams of the same name are one."""
        team = next((t for t in self.of_key.values() if t.name == name), Team(name))
        key = f"e2b_{secrets.token_hex(20)}"
        self.of_key[key] = team
        return key

    def revoke(self, key: str) -> None:
        """It is not known any more."""
        self.of_key.pop(key, None)

    def authenticate(self, key: str) -> Team:
        """Raises HttpError (401)."""
        if not key:
            raise HttpError(401, "Missing API key, please use the X-API-Key header")
        if key not in self.of_key:
            raise HttpError(401, "Invalid API key, please visit https://e2b.dev/docs/quickstart/api-key for more information.")
        return self.of_key[key]
