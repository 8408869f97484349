"""The E2B service that tests use: the real one if ``CIFIXER_TEST_E2B`` is set, which costs money; else a stand-in of this process."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.backends.registry import make_backend
from tests.support.e2b.stand_in import Service, StandIn
from tests.support.own_process import NotHereError

#: Any text; then ``E2B_API_KEY`` and its kin say where.
REAL = "CIFIXER_TEST_E2B"
#: Of the stand-in for most tests: as for those who pay.
KNOBS = {"max_timeout_s": 86_400}
#: So that whatever goes wrong costs little.
MOST_LIFETIME_S = 900.0


class NoServiceError(Exception):
    """Why there is none."""


def is_real() -> bool:
    """Whether the tests were told to use the real service."""
    return bool(os.environ.get(REAL))


@cache
def service_settings() -> dict[str, Any]:
    """Members of an AppConfig. Raises NoServiceError."""
    if is_real():
        if not os.environ.get("E2B_API_KEY"):
            raise NoServiceError(f"{REAL} is set and E2B_API_KEY is not")
        return {"e2b_creates_per_s": 1.0}
    return settings_on(service())


@cache
def service() -> Service:
    """The one of this process, which ends with it. Raises NoServiceError."""
    own = StandIn()
    try:
        started = own.start()
    except NotHereError as error:
        raise NoServiceError(str(error)) from None
    atexit.register(own.close)
    started.set(**KNOBS)
    return started


@contextmanager
def machines_of(memory_bytes: int | None) -> Iterator[None]:
    """The microVMs that are made in the ``with`` block are of that size, which in the real service only another template has."""
    if memory_bytes is None:
        yield
        return
    if is_real():
        pytest.skip("the size of a microVM is its template's")
    service().set(memory_bytes=memory_bytes)
    try:
        yield
    finally:
        service().set(memory_bytes=2 << 30)


def settings_on(found: Service) -> dict[str, Any]:
    """On a stand-in, which lets us make as many a second as we like."""
    return {
        "e2b_api_key": found.api_key,
        "e2b_api_url": found.api_url,
        "e2b_sandbox_url": found.sandbox_url,
        "e2b_creates_per_s": 1000.0,
    }


def left_in_service(namespace: str) -> list[str]:
    """What is there of one namespace of ours."""
    found = []
    for dispatch in ("queue", "direct"):
        config = AppConfig(execution_backend="e2b", dispatch=dispatch, namespace=namespace, **service_settings())
        found += [f"sandbox {o.handle.sandbox_id} ({dispatch}) {o.handle.data}" for o in make_backend(config).list_owned()]
    return found
