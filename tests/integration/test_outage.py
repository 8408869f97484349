"""A platform that goes away: what waits, for how long, and what is said in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cifixer_exec.channel.channel import Channel
from cifixer_exec.channel.frames import FrameType, encode_frame
from cifixer_exec.channel.transport import dial_unix
from cifixer_exec.errors import BackendUnavailableError, CircuitOpenError, ExecutorError, OutcomeUnknownError, SandboxLostError
from cifixer_exec.model import Command, ExecRecord, Inspection, OutputChunk, Status
from tests.support.contract_fake_runner import FINISHED, Behaviour, Peer, served
from tests.support.run import run

RECONNECT_S = 0.5


class Platform:
    """Between the channel and a runner; while ``away`` is set, that is what asking it raises."""

    def __init__(self) -> None:
        self.away: ExecutorError | None = None
        self.death = ""

    @asynccontextmanager
    async def channel(self, behaviour: Behaviour) -> AsyncIterator[Channel]:
        async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
            await behaviour(Peer(reader, writer, number))

        async with served(behave) as path:

            async def dial() -> Any:
                if self.away is not None:
                    raise ConnectionRefusedError
                return await dial_unix(path)

            async def inspect() -> Inspection:
                if self.away is not None:
                    raise self.away
                return Inspection(alive=not self.death, cause=self.death)

            channel = Channel(dial=dial, inspect=inspect, epoch=1, client="test", reconnect_s=RECONNECT_S)
            try:
                yield channel
            finally:
                channel.close()

    async def returns_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.away = None


async def outcome(channel: Channel, *, timeout_s: float | None = 60.0) -> tuple[bytes, ExecRecord]:
    pieces: list[bytes] = []
    async for item in channel.run("op", Command(argv=("true",), timeout_s=timeout_s, grace_s=0.0)):
        if isinstance(item, ExecRecord):
            return b"".join(pieces), item
        assert isinstance(item, OutputChunk)
        pieces.append(item.data)
    raise AssertionError("no record")


def away() -> BackendUnavailableError:
    return BackendUnavailableError("the platform does not answer")


def cut_after_the_start(platform: Platform) -> Behaviour:
    """The command is started and has said "one "; then the platform goes. Whoever comes back gets the rest."""

    async def behave(peer: Peer) -> None:
        await peer.hello()
        call, document = await peer.request()
        offset = document["attach"]["stdout_offset"]
        if peer.number == 1:
            await peer.send(encode_frame(FrameType.OUTPUT, call, b"\1" + bytes(8) + b"one "))
            await asyncio.sleep(0.1)
            platform.away = away()
            return
        await peer.send(encode_frame(FrameType.OUTPUT, call, b"\1" + offset.to_bytes(8, "big") + b"one two"[offset:]))
        await peer.reply(call, {"record": {**FINISHED, "stdout_bytes": 7}})
        await peer.stay()

    return behave


async def silent(peer: Peer) -> None:
    await peer.hello()
    await peer.stay()


def test_a_command_that_runs_is_fetched_when_the_platform_is_back() -> None:
    """Although it was away for longer than a request would have waited."""

    async def go() -> tuple[bytes, ExecRecord]:
        platform = Platform()
        async with platform.channel(cut_after_the_start(platform)) as channel:
            running = asyncio.create_task(outcome(channel))
            await asyncio.sleep(0.3)
            await platform.returns_after(3 * RECONNECT_S)
            return await running

    stdout, record = run(go())
    assert (stdout, record.status) == (b"one two", Status.EXITED)


def test_a_command_that_may_run_no_longer_is_unknown_and_never_a_success() -> None:
    async def go() -> None:
        platform = Platform()
        async with platform.channel(cut_after_the_start(platform)) as channel:
            await outcome(channel, timeout_s=0.5)

    begun = time.monotonic()
    with pytest.raises(OutcomeUnknownError, match=r"not known.*the platform does not answer"):
        run(go())
    assert 0.5 < time.monotonic() - begun < 10


def test_a_sandbox_that_is_dead_when_the_platform_is_back_is_lost_with_its_cause() -> None:
    async def go() -> None:
        platform = Platform()

        async def behave(peer: Peer) -> None:
            if peer.number == 1:
                await cut_after_the_start(platform)(peer)

        async with platform.channel(behave) as channel:
            running = asyncio.create_task(outcome(channel))
            await asyncio.sleep(0.3)
            platform.death = "the daemon was restarted"
            await platform.returns_after(RECONNECT_S)
            await running

    with pytest.raises(SandboxLostError, match="the daemon was restarted"):
        run(go())


def test_what_was_never_sent_is_retryable() -> None:
    async def go() -> None:
        platform = Platform()
        platform.away = away()
        async with platform.channel(silent) as channel:
            await channel.request("mkdir", {"path": "x"}, request_id="r")

    with pytest.raises(BackendUnavailableError) as caught:
        run(go())
    assert caught.value.retryable


def test_a_request_waits_out_a_blink_of_the_platform() -> None:
    async def go() -> object:
        platform = Platform()
        platform.away = away()

        async def behave(peer: Peer) -> None:
            await peer.hello()
            call, _ = await peer.request()
            await peer.reply(call, {"ok": 1})
            await peer.stay()

        async with platform.channel(behave) as channel:
            waiting = asyncio.create_task(channel.request("stats", {}))
            await platform.returns_after(RECONNECT_S / 2)
            return (await waiting).document

    assert run(go()) == {"ok": 1}


def test_a_request_that_was_sent_and_not_answered_is_not_retryable() -> None:
    async def go() -> None:
        platform = Platform()

        async def behave(peer: Peer) -> None:
            await peer.hello()
            await peer.request()
            platform.away = away()

        async with platform.channel(behave) as channel:
            await channel.request("remove", {"path": "x"}, request_id="r")

    with pytest.raises(OutcomeUnknownError) as caught:
        run(go())
    assert not caught.value.retryable


def test_nobody_waits_for_a_platform_that_is_left_alone() -> None:
    async def go() -> None:
        platform = Platform()
        platform.away = CircuitOpenError("left alone for 15 s")
        async with platform.channel(silent) as channel:
            await channel.request("stats", {})

    begun = time.monotonic()
    with pytest.raises(CircuitOpenError):
        run(go())
    assert time.monotonic() - begun < RECONNECT_S


def test_but_a_command_that_runs_waits_also_then() -> None:
    async def go() -> tuple[bytes, ExecRecord]:
        platform = Platform()
        async with platform.channel(cut_after_the_start(platform)) as channel:
            running = asyncio.create_task(outcome(channel))
            await asyncio.sleep(0.3)
            platform.away = CircuitOpenError("left alone for 15 s")
            await platform.returns_after(2 * RECONNECT_S)
            return await running

    assert run(go())[0] == b"one two"


def test_impatient_calls_are_not_held_up_by_a_patient_one() -> None:
    async def go() -> None:
        platform = Platform()
        async with platform.channel(cut_after_the_start(platform)) as channel:
            running = asyncio.create_task(outcome(channel))
            await asyncio.sleep(0.3)
            platform.away = CircuitOpenError("left alone for 15 s")
            begun = time.monotonic()
            with pytest.raises(CircuitOpenError):
                await channel.request("stats", {})
            assert time.monotonic() - begun < RECONNECT_S
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    run(go())
