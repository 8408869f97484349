"""The async API has the same names and does the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cifixer_exec import AsyncSandboxEnvironment, ExecResult, SandboxFileError, Status, attach_async
from tests.support.contract_stack import Stack
from tests.support.run import run


async def scenario(sandbox: AsyncSandboxEnvironment, number: int) -> None:
    """Commands, files, a background command and a failure, as an agent would."""
    await sandbox.write_file("src/fix.txt", f"fix {number}")
    assert (await sandbox.run_command("cat src/fix.txt", timeout_s=60)).text == f"fix {number}"
    batch = await sandbox.run_batch(["mkdir out", "echo built > out/log", "exit 2", "true"])
    assert [r.exit_code for r in batch] == [0, 0, 2]
    handle = await sandbox.start_command("read x; echo got $x; sleep 1000", stdin_open=True)
    await handle.send_stdin(f"{number}\n")
    async for chunk in handle.output():
        assert chunk.data == f"got {number}\n".encode()
        break
    await handle.kill()
    assert (await handle.wait()).status is Status.KILLED
    assert await sandbox.read_text("out/log") == "built\n"
    assert [f.name for f in await sandbox.list_files()] == ["out", "src"]
    with pytest.raises(SandboxFileError):
        await sandbox.stat("missing")


def test_the_core_scenario(stack: Stack) -> None:
    async def go() -> None:
        async with stack.create_async() as sandbox:
            await scenario(sandbox, 1)

    run(go(), 60)


def test_ten_sandboxes_at_once(stack: Stack) -> None:
    async def one(number: int) -> None:
        async with stack.create_async() as sandbox:
            await scenario(sandbox, number)

    async def go() -> None:
        await asyncio.gather(*(one(n) for n in range(10)))

    run(go(), 100)


def test_fifty_commands_at_once(stack: Stack) -> None:
    async def go() -> list[ExecResult]:
        async with stack.create_async() as sandbox:
            return await asyncio.gather(*(sandbox.run_command(f"echo {n}; exit {n}") for n in range(50)))

    assert [(r.exit_code, r.text) for r in run(go(), 60)] == [(n, f"{n}\n") for n in range(50)]


def test_a_cancelled_wait_leaves_the_command_running(stack: Stack) -> None:
    async def go() -> ExecResult:
        async with stack.create_async() as sandbox:
            handle = await sandbox.start_command("read x; echo $x", stdin_open=True)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(handle.wait(), 0.3)
            await handle.send_stdin("still here\n")
            return await handle.wait()

    assert run(go(), 60).text == "still here\n"


def test_stream_command_yields_output_and_then_the_result(stack: Stack) -> None:
    async def go() -> list[object]:
        async with stack.create_async() as sandbox:
            return [item async for item in sandbox.stream_command("echo one; exit 4")]

    *chunks, result = run(go(), 60)
    assert [str(c) for c in chunks] == ["one\n"]
    assert isinstance(result, ExecResult)
    assert result.exit_code == 4


def test_attach_to_a_sandbox_of_another_owner(stack: Stack) -> None:
    async def go() -> str:
        async with stack.create_async() as sandbox:
            await sandbox.write_file("file", "shared")
            other = await attach_async(sandbox.sandbox_id, stack.config)
            try:
                return await other.read_text("file")
            finally:
                await other.close()

    assert run(go(), 60) == "shared"


def test_directories_up_and_down(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_bytes(b"content")

    async def go() -> None:
        async with stack.create_async() as sandbox:
            await sandbox.upload(tmp_path / "here", "tree")
            await sandbox.download("tree", tmp_path / "back")

    run(go(), 60)
    assert (tmp_path / "back" / "file").read_bytes() == b"content"
