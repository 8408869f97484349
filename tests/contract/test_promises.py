"""What is easily promised and easily broken: nothing lost between handles, nothing left out silently, nothing that hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifixer_exec import SandboxEnvironment, SandboxFileError, SandboxNotFoundError, attach
from cifixer_exec.errors import InvalidRequestError
from tests.contract.conftest import Make
from tests.support.contract_stack import Stack


def test_a_second_handle_goes_on_behind_what_the_first_one_sent(sandbox: SandboxEnvironment) -> None:
    first = sandbox.start_command("cat", stdin_open=True)
    first.send_stdin("one ")
    sandbox.command(first.op_id).send_stdin("two", eof=True)
    assert first.wait().stdout == b"one two"


def test_stdin_of_many_threads_arrives_whole(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("cat", stdin_open=True)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: handle.send_stdin(bytes([65 + n]) * 1000), range(8)))
    handle.close_stdin()
    output = handle.wait().stdout
    assert sorted(output[n * 1000] for n in range(8)) == list(range(65, 73))
    assert all(output.count(bytes([65 + n])) == 1000 for n in range(8))


def test_input_for_a_command_that_is_not_there_is_an_error(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError, match="no-such-op"):
        sandbox.command("no-such-op").send_stdin("x")


def test_a_long_listing_is_complete(sandbox: SandboxEnvironment) -> None:
    sandbox.mkdir("many/deep/er")
    assert sandbox.run_command("cd many/deep/er && seq -f 'a-rather-long-name-of-a-file-%.0f' 12000 | xargs touch && touch ../z ../../a").ok
    names = {f.name for f in sandbox.list_files("many", recursive=True)}
    assert names == {"deep", "er", "z", "a", *(f"a-rather-long-name-of-a-file-{n}" for n in range(1, 12001))}
    sandbox.remove("many", recursive=True)


def test_a_listing_that_is_too_long_is_an_error(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("mkdir few && touch few/a few/b few/c").ok
    assert len(sandbox.list_files("few", limit=3)) == 3
    with pytest.raises(SandboxFileError, match="more than 2"):
        sandbox.list_files("few", limit=2)


def test_a_file_of_any_claimed_size_is_not_read_into_memory(sandbox: SandboxEnvironment) -> None:
    assert sandbox.run_command("truncate -s 3G huge").ok
    with pytest.raises(SandboxFileError, match="3221225472") as caught:
        sandbox.read_file("huge")
    assert caught.value.code == "too_large"
    sandbox.remove("huge")


def test_a_sandbox_that_was_torn_down_is_not_made_again(make: Make) -> None:
    sandbox = make()
    sandbox.teardown()
    with pytest.raises(SandboxNotFoundError, match=sandbox.sandbox_id):
        sandbox.init()


def test_twenty_five_commands_outlive_a_cut_of_the_channel(stack: Stack, make: Make) -> None:
    if stack.config.dispatch != "direct":
        pytest.skip("the channel is in the worker; tests/chaos cuts it there")
    sandbox = make()
    with ThreadPoolExecutor(25) as threads:
        running = [threads.submit(sandbox.run_command, f"sleep 1; echo {n}") for n in range(25)]
        while len(sandbox.run_command("pgrep -c sleep || true").text) == 0:
            pass
        port = sandbox._environment._port
        sandbox._portal.loop.call_soon_threadsafe(port._session.channel._connection._transport.close)  # type: ignore[attr-defined]
        assert sorted(int(r.result(60).text) for r in running) == list(range(25))


def test_a_forked_child_is_told_what_to_do(sandbox: SandboxEnvironment) -> None:
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads is what is tested
        child = os.fork()
    if child == 0:
        try:
            sandbox.run_command("true")
            said = "it worked"
        except RuntimeError as error:
            said = str(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        assert "attach" in pipe.read()
    assert sandbox.run_command("echo parent").stdout == b"parent\n"


def test_an_iterator_that_was_left_does_not_hang_the_exit(stack: Stack, sandbox: SandboxEnvironment) -> None:
    program = (
        "import sys\nfrom cifixer_exec import AppConfig, attach\n"
        "sandbox = attach(sys.argv[1])\nhandle = sandbox.start_command('echo x; sleep 30')\noutput = handle.output()\nprint(next(output))\n"
    )
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("CIFIXER_")}, **stack.config.to_env()}
    done = subprocess.run([sys.executable, "-c", program, sandbox.sandbox_id], env=environ, capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"x", b"")


def test_attaching_leaves_the_sandbox_when_closed(stack: Stack, sandbox: SandboxEnvironment) -> None:
    other = attach(sandbox.sandbox_id, stack.config)
    assert other.run_command("echo hello").stdout == b"hello\n"
    other.close()
    assert sandbox.run_command("echo still").stdout == b"still\n"


def test_a_kill_from_the_middle_of_the_output_is_prompt(sandbox: SandboxEnvironment) -> None:
    handle = sandbox.start_command("echo now; sleep 600")
    begun = time.monotonic()
    for chunk in handle.output():
        if b"now" in chunk.data:
            handle.kill()
    assert time.monotonic() - begun < 8
    assert handle.wait().status == "killed"


@pytest.mark.parametrize("name", ["int", "SIGINT", 2])
def test_a_signal_has_a_name_or_a_number(sandbox: SandboxEnvironment, name: str | int) -> None:
    handle = sandbox.start_command("exec sleep 600")
    handle.signal(name)
    assert handle.wait().signal == "INT"


def test_one_text_is_no_batch(sandbox: SandboxEnvironment) -> None:
    with pytest.raises(InvalidRequestError, match="list of commands"):
        sandbox.run_batch("echo a")
