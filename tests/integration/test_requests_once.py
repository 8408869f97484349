"""What changes something is done once, whoever asks again: over a connection that lost the answer, or after its worker died."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from cifixer_exec import AppConfig
from cifixer_exec.backends.base import Backend
from cifixer_exec.backends.registry import make_backend
from cifixer_exec.channel.channel import Channel
from cifixer_exec.channel.frames import FrameParser, FrameType
from cifixer_exec.channel.transport import Dial, Transport, dial_unix
from cifixer_exec.errors import ExecutorError, OperationConflictError, SandboxFileError
from cifixer_exec.model import Command, ExecRecord, OutputChunk, SandboxHandle, SandboxSpec, Status
from cifixer_exec.sandbox import ONCE_VERBS, VERBS, DirectPort, SandboxSession
from tests.support.contract_fake_runner import served, until_one_ends
from tests.support.contract_stack import check_present
from tests.support.run import run

ENV = {"PATH": "/usr/bin:/bin"}
REMOVE = {"path": "f", "recursive": False, "missing_ok": False}
COUNT_SIGNALS = "trap 'echo got' USR1; echo up; until [ -e stop ]; do sleep 0.05; done"


@asynccontextmanager
async def losing_proxy(dial: Dial, losses: int) -> AsyncIterator[tuple[Dial, list[int]]]:
    """A way to the same runner that ends instead of giving the first ``losses`` answers, and the list of those so far."""
    lost: list[int] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        upstream = await dial()

        async def up() -> None:
            while data := await reader.read(65536):
                upstream.send(data)
                await upstream.drain()

        async def down() -> None:
            parser = FrameParser()
            while data := await upstream.receive():
                answers = [f for f in parser.feed(data) if f.type in (FrameType.REPLY, FrameType.ERROR)]
                if answers and len(lost) < losses:
                    lost.append(number)
                    return
                writer.write(data)
                await writer.drain()

        try:
            await until_one_ends(up(), down())
        finally:
            upstream.close()

    async with served(forward) as path:

        async def through() -> Transport:
            return await dial_unix(path)

        yield through, lost


@dataclass
class Sandbox:
    """A real one, and the sessions of those who own it one after the other."""

    backend: Backend
    handle: SandboxHandle
    spec: SandboxSpec
    epoch: int = 0

    def owner(self, dial: Dial | None = None) -> SandboxSession:
        """The session of a newer owner, which fences all before it."""
        self.epoch += 1
        session = SandboxSession(self.backend, self.handle, self.spec, epoch=self.epoch, client="test")
        if dial is not None:
            session.channel = Channel(dial=dial, inspect=session.inspect, epoch=self.epoch, client="test")
        return session


def with_sandbox(directory: Path, work: Callable[[Sandbox], Awaitable[None]]) -> None:
    """Do ``work`` with a sandbox of the local backend."""
    config = AppConfig(dispatch="direct", state_dir=directory)
    check_present("local", config)
    backend = make_backend(config)

    async def go() -> None:
        spec = SandboxSpec(backend="local", sandbox_id="once", lifetime_s=120)
        handle = await asyncio.to_thread(backend.create, spec)
        try:
            await work(Sandbox(backend, handle, spec))
        finally:
            await asyncio.to_thread(backend.destroy, handle)

    run(go(), 60)


async def shell(session: SandboxSession, op_id: str, line: str) -> tuple[str, ExecRecord]:
    """The stdout and the record of a shell line."""
    said = b""
    async for item in session.channel.run(op_id, Command(argv=("/bin/sh", "-c", line), env=ENV, timeout_s=30)):
        if isinstance(item, ExecRecord):
            return said.decode(), item
        assert isinstance(item, OutputChunk)
        said += item.data
    raise AssertionError("the run ended without a record")


def test_a_remove_whose_answers_were_lost_has_removed(tmp_path: Path) -> None:
    async def work(sandbox: Sandbox) -> None:
        async with losing_proxy(sandbox.backend.dial(sandbox.handle), 3) as (dial, lost):
            session = sandbox.owner(dial)
            await session.channel.start("make", Command(argv=("touch", "f"), env=ENV))
            await shell(session, "there", "until [ -e f ]; do sleep 0.01; done")
            lost.clear()  # these answers are to be lost, not those before
            assert (await session.call("remove", REMOVE, request_id="op")).document == {"removed": True}
            assert len(lost) == 3

    with_sandbox(tmp_path, work)


def test_a_remove_that_a_dead_worker_did_is_not_done_again(tmp_path: Path) -> None:
    async def work(sandbox: Sandbox) -> None:
        session = sandbox.owner()
        await shell(session, "make", "touch f")
        assert (await session.call("remove", REMOVE, request_id="op")).document == {"removed": True}
        await shell(session, "make-anew", "touch f")
        adopter = sandbox.owner()
        assert (await adopter.call("remove", REMOVE, request_id="op")).document == {"removed": True}
        assert (await shell(adopter, "look", "ls"))[0] == "f\n"
        with pytest.raises(OperationConflictError):
            await adopter.call("remove", {**REMOVE, "path": "g"}, request_id="op")

    with_sandbox(tmp_path, work)


def test_a_signal_is_delivered_once(tmp_path: Path) -> None:
    async def work(sandbox: Sandbox) -> None:
        async with losing_proxy(sandbox.backend.dial(sandbox.handle), 2) as (dial, lost):
            plain = sandbox.owner()
            await plain.channel.start("count", Command(argv=("/bin/sh", "-c", f"({COUNT_SIGNALS}) > said"), env=ENV, timeout_s=30))
            await shell(plain, "up", "until grep -q up said; do sleep 0.01; done")
            signal = {"op_id": "count", "signal": "USR1"}
            first = await sandbox.owner(dial).call("signal", signal, request_id="op")
            adopter = sandbox.owner()
            for _ in range(3):
                assert await adopter.call("signal", signal, request_id="op") == first
            assert len(lost) == 2
            await shell(adopter, "stop", "until grep -q got said; do sleep 0.01; done; sleep 0.3; touch stop")
            said, _ = await shell(adopter, "look", "cat said")
            assert said == "up\ngot\n"

    with_sandbox(tmp_path, work)


def test_a_pack_leaves_one_archive(tmp_path: Path) -> None:
    async def work(sandbox: Sandbox) -> None:
        async with losing_proxy(sandbox.backend.dial(sandbox.handle), 2) as (dial, lost):
            session, pack = sandbox.owner(dial), {"path": ".", "excludes": []}
            packed = (await session.call("pack", pack, request_id="op")).document
            assert (await sandbox.owner().call("pack", pack, request_id="op")).document == packed
            assert len(lost) == 2
            said, _ = await shell(sandbox.owner(), "look", f"ls {Path(str(packed['archive'])).parent}")
            assert said.split() == [Path(str(packed["archive"])).name]

    with_sandbox(tmp_path, work)


def test_a_commit_does_not_undo_what_came_after_it(tmp_path: Path) -> None:
    async def work(sandbox: Sandbox) -> None:
        commit = {"size": 3, "sha256": sha256(b"old").hexdigest()}
        write: dict[str, Any] = {"path": "f", "transfer_id": "t", "offset": 0, "mode": None, "mkdir": True, "commit": commit}
        session = sandbox.owner()
        first = await session.call("write", write, b"old", request_id="op")
        await shell(session, "change", "printf newer > f")
        adopter = sandbox.owner()
        assert await adopter.call("write", write, b"old", request_id="op") == first
        assert (await shell(adopter, "look", "cat f"))[0] == "newer"

    with_sandbox(tmp_path, work)


def test_direct_use_names_each_call_anew_and_keeps_the_name_over_a_cut(tmp_path: Path) -> None:
    async def work(sandbox: Sandbox) -> None:
        async with losing_proxy(sandbox.backend.dial(sandbox.handle), 2) as (dial, lost):
            await shell(sandbox.owner(), "make", "touch f")
            port = DirectPort(sandbox.backend, sandbox.spec, client="test", session=sandbox.owner(dial))
            assert (await port.call("remove", REMOVE)).document == {"removed": True}
            assert len(lost) == 2
            with pytest.raises(SandboxFileError) as caught:
                await port.call("remove", REMOVE)
            assert caught.value.code == "not_found"

    with_sandbox(tmp_path, work)


def test_a_command_whose_record_was_dropped_does_not_run_again(tmp_path: Path) -> None:
    async def work(sandbox: Sandbox) -> None:
        session = sandbox.owner()
        assert (await shell(session, "op", "echo ran >> log; echo said"))[0] == "said\n"
        for _ in range(2):  # repeated, it does not say that there is no such command
            assert (await sandbox.owner().call("forget", {"op_id": "op"}, request_id="forget")).document == {}
        said, record = await shell(sandbox.owner(), "op", "echo ran >> log; echo said")
        assert (said, record.status, record.exit_code) == ("", Status.UNKNOWN, None)
        assert "record was dropped" in record.cause
        assert (await shell(sandbox.owner(), "look", "cat log"))[0] == "ran\n"

    with_sandbox(tmp_path, work)


def test_both_sides_agree_on_which_verbs_are_done_once(tmp_path: Path) -> None:
    async def heeds_an_id(session: SandboxSession, verb: str) -> bool:
        try:
            await session.channel.request(verb, {}, request_id="/")  # no id can be that, so who heeds it complains
        except ExecutorError as error:
            return "request_id" in str(error)
        return False

    async def work(sandbox: Sandbox) -> None:
        session = sandbox.owner()
        assert {verb for verb in VERBS if await heeds_an_id(session, verb)} == ONCE_VERBS

    with_sandbox(tmp_path, work)
