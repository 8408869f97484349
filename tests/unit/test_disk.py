"""How big the disk is where files are memory."""

from __future__ import annotations

import pytest

from cifixer_exec.backends.disk import disk_size_bytes
from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import MIB


@pytest.mark.parametrize(
    ("asked", "memory", "size"),
    [
        (None, None, 4096),
        (None, 2048, 1536),
        (None, 16_384, 4096),
        (100, 2048, 100),
        (2047, 2048, 2047),
        (8192, 16_384, 8192),
        (8192, None, 8192),
    ],
)
def test_files_leave_room_for_programs(asked: int | None, memory: int | None, size: int) -> None:
    found = disk_size_bytes(asked and asked * MIB, memory_bytes=memory and memory * MIB, most_bytes=4096 * MIB)
    assert found == size * MIB


def test_more_files_than_memory_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidRequestError, match=r"disk_bytes=200 .*memory_bytes=100.*CIFIXER_DOCKER_DISK"):
        disk_size_bytes(200, memory_bytes=100, most_bytes=1000)
