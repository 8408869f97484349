"""Fixtures of the acceptance tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.programs import Up, User, up


@pytest.fixture
def user() -> Iterator[User]:
    """Somebody with an empty home."""
    home = Path(tempfile.mkdtemp(prefix="cx-"))  # short: a socket's path has at most 107 bytes
    yield User(home)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def stack() -> Iterator[tuple[User, Up]]:
    """A user with a running ``up``, shared by a module's tests."""
    home = Path(tempfile.mkdtemp(prefix="cx-"))
    try:
        shared = User(home)
        with up(shared) as running:
            yield shared, running
            running.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)
