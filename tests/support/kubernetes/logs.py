"""What a container has written to its standard streams: the last mebibyte."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

_KEPT_BYTES = 1 << 20
_LAST_WORDS_S = 0.2


class Log:
    """One container's."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._descriptor = -1
        self._ended = asyncio.Event()

    def read(self, descriptor: int) -> None:
        """From now on from this pipe, until its writers are gone."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._take)

    def _take(self) -> None:
        try:
            data = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return
        if not data:
            self._close()
            return
        self._kept += data
        del self._kept[:-_KEPT_BYTES]

    def _close(self) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
        self._ended.set()

    async def end(self) -> None:
        """The container has ended: what is still in the pipe is taken."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), _LAST_WORDS_S)
        self._close()

    def text(self, *, tail_lines: int | None, limit_bytes: int | None) -> bytes:
        """As GET pods/log answers."""
        found = bytes(self._kept)
        if tail_lines is not None:
            lines = found.splitlines(keepends=True)
            found = b"".join(lines[len(lines) - min(tail_lines, len(lines)) :])
        return found if limit_bytes is None else found[:limit_bytes]
