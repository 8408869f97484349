"""What the agent service uses: make a sandbox or attach to one, blocking or async, direct or through the queue."""

from __future__ import annotations

from typing import Any

from cifixer_exec import wiring
from cifixer_exec.blocking import SandboxEnvironment
from cifixer_exec.channel.portal import process_portal
from cifixer_exec.environment import AsyncSandboxEnvironment
from cifixer_exec.settings import AppConfig


def create_sandbox(config: AppConfig | None = None, *, sandbox_id: str | None = None, **overrides: Any) -> SandboxEnvironment:
    """A sandbox, not made yet: use it in a ``with`` block, or call ``init`` and ``teardown``.

    ``config`` None: from the environment. ``overrides`` are fields of :class:`AppConfig`. Nothing is contacted yet.

    Raises:
        InvalidRequestError: an unknown backend or a value that cannot work.
    """
    return SandboxEnvironment(create_async_sandbox(config, sandbox_id=sandbox_id, **overrides), process_portal())


def create_async_sandbox(config: AppConfig | None = None, *, sandbox_id: str | None = None, **overrides: Any) -> AsyncSandboxEnvironment:
    """As :func:`create_sandbox`, for ``async with``. Belongs to the event loop it is first used on."""
    return wiring.make_environment(_config(config, overrides), sandbox_id)


def attach(sandbox_id: str, config: AppConfig | None = None, **overrides: Any) -> SandboxEnvironment:
    """A sandbox that another process made.

    Raises:
        SandboxNotFoundError: none of this id is there, or it was torn down.
    """
    portal = process_portal()
    return SandboxEnvironment(portal.call(wiring.attach_environment(_config(config, overrides), sandbox_id)), portal)


async def attach_async(sandbox_id: str, config: AppConfig | None = None, **overrides: Any) -> AsyncSandboxEnvironment:
    """As :func:`attach`, on the caller's event loop."""
    return await wiring.attach_environment(_config(config, overrides), sandbox_id)


def _config(config: AppConfig | None, overrides: dict[str, Any]) -> AppConfig:
    if config is None:
        return AppConfig.from_env(**overrides)
    return config.with_(**overrides) if overrides else config
