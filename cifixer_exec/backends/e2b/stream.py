"""The channel to a runner in a microVM: a process of E2B's envd, whose standard input and output it is.

Input is bytes, one request after the other, each of which is answered when the process has it. Output is told as text, which would not
survive as bytes (the SDK decodes it, and replaces what is no UTF-8), so the runner's bridge writes lines of base64. Output that nobody
reads keeps the bridge waiting: the SDK takes the next piece when it is done with the last.
"""

from __future__ import annotations

import asyncio
import binascii
from collections import deque
from typing import Any

from e2b import AsyncSandbox, CommandExitException

from cifixer_exec.backends.e2b.account import KEEP_S, Account
from cifixer_exec.backends.e2b.machines import BRIDGE, NO_PROFILE
from cifixer_exec.backends.e2b.vendor_errors import GONE, NO_ANSWER, is_vendors, translate
from cifixer_exec.backends.outgoing import Outgoing
from cifixer_exec.backends.threads import asking
from cifixer_exec.channel.transport import MOST_WAITING_BYTES
from cifixer_exec.errors import BackendUnavailableError

DIAL_TIMEOUT_S = 15.0
BEGIN = "cifixer-exec:1"
#: Of one request; as base64 of a JSON document it is a third longer.
_MOST_INPUT_BYTES = 1024 * 1024
_MOST_SAID = 4096
#: Farewells that nobody waits for.
_closing: set[asyncio.Task[None]] = set()


class BridgeEndedError(ConnectionError):
    """The bridge ended before it began: the microVM is there, and what has become of the runner is for an inspection to find out."""


class BridgeTransport:
    """A transport over the standard input and output of the runner's bridge."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._begun = False
        self._rest = ""
        self._said = ""
        self._received: deque[bytes] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._taken.set()
        self._over: BaseException | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._outgoing = Outgoing(self._write, most_bytes=_MOST_INPUT_BYTES, failures=(Exception,))
        self._closed = False

    async def begin(self, handle: Any) -> None:
        """Wait for the bridge's first line. Raises BridgeEndedError when it ends instead, and what the SDK raises."""
        self._handle = handle
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        while not self._begun:
            if isinstance(self._over, EOFError | CommandExitException):
                raise BridgeEndedError(f"the bridge to the runner did not begin: {self._said.strip() or self._over}")
            if self._over is not None:
                raise self._over
            self._changed.clear()
            await self._changed.wait()

    async def on_stdout(self, text: str) -> None:
        """The SDK's callback."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if not self._begun:  # what a login shell said is not ours, and need not end with a line
                self._begun = line.endswith(BEGIN)
            elif line and self._over is None:  # behind what was no base64 there would be a gap
                self._add(line)
        self._changed.set()
        if self._size >= MOST_WAITING_BYTES:
            self._taken.clear()
            await self._taken.wait()

    def on_stderr(self, text: str) -> None:
        """The same."""
        self._said = (self._said + text)[-_MOST_SAID:]

    def _add(self, line: str) -> None:
        try:
            data = binascii.a2b_base64(line, strict_mode=True)
        except ValueError as error:
            self._over = ConnectionError(f"the bridge to the runner said what is no base64: {error}")
            return
        self._received.append(data)
        self._size += len(data)

    async def _watch(self) -> None:
        try:
            await self._handle.wait()
            self._over = self._over or EOFError("it has ended")
        except asyncio.CancelledError:
            self._over = self._over or ConnectionError("the connection was closed")
            raise
        except Exception as error:  # noqa: BLE001  # the SDK's have no common base
            self._over = self._over or error
        finally:
            self._changed.set()
            self._outgoing.let_go()

    async def receive(self) -> bytes:
        while not self._received:
            if self._over is not None:
                return self._end()
            self._changed.clear()
            await self._changed.wait()
        data = self._received.popleft()
        self._size -= len(data)
        if self._size < MOST_WAITING_BYTES:
            self._taken.set()
        return data

    def _end(self) -> bytes:
        if isinstance(self._over, EOFError):
            return b""
        raise ConnectionError(f"the connection to the sandbox broke: {self._said.strip() or self._over}")

    def send(self, data: bytes) -> None:
        if self._over is None:
            self._outgoing.add(data)

    async def drain(self) -> None:
        await self._outgoing.emptied()
        if self._over is not None:
            raise ConnectionResetError("the connection was lost") from self._outgoing.broken

    async def _write(self, parts: list[memoryview]) -> None:
        try:
            await self._handle.send_stdin(b"".join(parts))
        except Exception as error:  # as in _watch; whether the bytes went in is not known, so this stream is over
            self._over = self._over or error
            self._changed.set()
            raise

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._outgoing.drop()
        self._over = self._over or ConnectionError("the connection was closed")
        for event in (self._changed, self._taken):
            event.set()
        if self._handle is not None:
            task = asyncio.get_running_loop().create_task(self._say_farewell())
            _closing.add(task)
            task.add_done_callback(_closing.discard)

    async def _say_farewell(self) -> None:
        """End the bridge too, which does not hear that nobody listens; where that fails, the runner ends it when the next owner comes."""
        tasks = [task for task in (self._outgoing.writer, self._watcher) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._handle.disconnect()
            await self._handle.kill()
        except Exception:  # noqa: BLE001, S110  # the sandbox may be gone
            pass


async def open_bridge(account: Account, e2b_id: str) -> BridgeTransport:
    """A bridge of its own in the microVM.

    Raises:
        ConnectionError: the sandbox is gone, or its runner; for an inspection to find out.
        BackendUnavailableError: E2B does not answer, or not to us.
    """
    transport = BridgeTransport()
    doing = f"opening a channel to its sandbox {e2b_id}"
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            options = await asking(lambda: account.options)
            sandbox = await AsyncSandbox.connect(e2b_id, KEEP_S, **options)
            handle = await sandbox.commands.run(
                BRIDGE,
                background=True,
                user="root",
                envs=NO_PROFILE,
                cwd="/",
                stdin=True,
                timeout=0,  # the SDK's default would end it after a minute
                request_timeout=0,  # ours is around it: who cancels the SDK's own leaves a task whose end nobody asks for
                on_stdout=transport.on_stdout,
                on_stderr=transport.on_stderr,
                retain_output=False,
            )
            await transport.begin(handle)
        account.breaker.succeeded()
        return transport
    except TimeoutError:
        transport.close()
        # One sandbox that hangs must not open the breaker for all others.
        await asking(account.breaker.look)
        raise BackendUnavailableError(f"E2B has not opened a channel within {DIAL_TIMEOUT_S:g} s") from None
    except BridgeEndedError:
        transport.close()
        raise
    except GONE as error:
        transport.close()
        raise ConnectionError(str(error)) from None
    except BaseException as error:
        transport.close()
        if not is_vendors(error):
            raise
        if isinstance(error, NO_ANSWER):
            account.breaker.heard(translate(error, doing))
        raise BackendUnavailableError(*translate(error, doing).args) from None
