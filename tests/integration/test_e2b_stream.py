"""Commands in E2B microVMs while streams, connections and whole servers go and come: all output once, every byte as it was."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cifixer_exec import AppConfig, SandboxEnvironment, create_sandbox
from cifixer_exec.backends.e2b import E2BBackend, stream
from cifixer_exec.errors import BackendUnavailableError
from cifixer_exec.model import MIB, SandboxHandle
from tests.support.e2b_accounts import account_of, backend_of, machine_of, overheard, processes_in
from tests.support.e2b_service import service
from tests.support.kubernetes.waiting import until

#: Takes about four seconds, says 800 lines, and each only once.
LINES = 800
TALK = f"for i in $(seq {LINES}); do echo line $i; echo other $i >&2; sleep 0.005; done"
SAID = "".join(f"line {i}\n" for i in range(1, LINES + 1)).encode()
SAID_TOO = "".join(f"other {i}\n" for i in range(1, LINES + 1)).encode()


@pytest.fixture
def config(namespace: str) -> Iterator[AppConfig]:
    with account_of(namespace) as made_here:
        yield made_here


@pytest.fixture
def sandbox(config: AppConfig) -> Iterator[SandboxEnvironment]:
    with create_sandbox(config, sandbox_id="one") as made_here:
        assert made_here.run_command("true").exit_code == 0
        yield made_here


@pytest.fixture
def machine(config: AppConfig, sandbox: SandboxEnvironment) -> str:
    (owned,) = backend_of(config).list_owned()
    return machine_of(owned.handle)


@contextmanager
def meanwhile(trouble: Callable[[], object], *, every_s: float = 0.4) -> Iterator[list[int]]:
    """``trouble`` again and again, in a thread; how often it came to pass."""
    over, counts = threading.Event(), [0]

    def make() -> None:
        while not over.wait(every_s):
            trouble()
            counts[0] += 1

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


def all_of_it(sandbox: SandboxEnvironment) -> None:
    """The command's output is there, whole and once, also as it was told while it ran."""
    told: list[str] = []
    result = sandbox.run_command(TALK, on_output=lambda chunk: told.append(str(chunk)), timeout_s=120)
    assert (result.status, result.exit_code) == ("exited", 0)
    assert result.stdout == SAID
    assert result.stderr == SAID_TOO
    assert told


@pytest.mark.parametrize("how", ["frame", "reset", "clean", "error"])
def test_streams_that_are_cut(sandbox: SandboxEnvironment, machine: str, how: str) -> None:
    cuts = 0

    def cut() -> None:
        nonlocal cuts
        cuts += service().order("cut_streams", sandbox=machine, how=how)

    with meanwhile(cut):
        all_of_it(sandbox)
    assert cuts >= 3


def test_connections_that_are_reset(sandbox: SandboxEnvironment, machine: str) -> None:
    with meanwhile(lambda: service().order("cut_connections", sandbox=machine)) as counts:
        all_of_it(sandbox)
    assert counts[0] >= 3


def test_a_sandbox_from_which_nothing_comes_for_a_while(sandbox: SandboxEnvironment, machine: str) -> None:
    def freeze() -> None:
        service().order("freeze", sandbox=machine)
        time.sleep(1.0)
        service().order("thaw", sandbox=machine)

    with meanwhile(freeze) as counts:
        all_of_it(sandbox)
    assert counts[0] >= 2


@pytest.mark.parametrize("port", ["sandbox", "api"])
def test_a_server_that_is_away_for_three_seconds(sandbox: SandboxEnvironment, port: str) -> None:
    def outage() -> None:
        time.sleep(0.8)
        service().order("stop", port=port)
        time.sleep(3.0)
        service().order("start", port=port)

    thread = threading.Thread(target=outage)
    thread.start()
    try:
        all_of_it(sandbox)
    finally:
        thread.join()


def test_an_api_that_does_not_answer_keeps_no_command_waiting(sandbox: SandboxEnvironment) -> None:
    service().order("freeze")
    try:
        begun = time.monotonic()
        all_of_it(sandbox)
        assert time.monotonic() - begun < 25
    finally:
        service().order("thaw")


def test_requests_for_input_that_fail_send_nothing_twice(sandbox: SandboxEnvironment) -> None:
    """Whether a request that failed had been carried out is not known: half of these had."""
    data = os.urandom(2 * MIB)
    for after in (True, False, True, False):
        service().fault(path="SendInput", status=503, after=after, skip=1)
        service().fault(path="SendInput", drop=True, after=after, skip=2)
    result = sandbox.run_command("echo once >> runs; cat", stdin=data, timeout_s=120)
    assert result.stdout == data
    assert sandbox.run_command("cat runs").text == "once\n"
    assert service().asked()["faults"].keys() >= {"503", "drop"}


class TestBytes:
    def test_five_mebibytes_of_anything_go_in_and_come_out(self, sandbox: SandboxEnvironment) -> None:
        data = os.urandom(5 * MIB)
        assert sandbox.run_command("cat", stdin=data, timeout_s=120).stdout == data

    def test_every_byte_and_broken_text_survive_on_both_streams(self, sandbox: SandboxEnvironment) -> None:
        data = bytes(range(256)) * 64 + b"\xff\xfe\xc3\r\n\x00\xe2\x82" + b"no newline"
        result = sandbox.run_command("tee /dev/stderr", stdin=data)
        assert result.stdout == data
        assert result.stderr == data

    def test_much_output_that_nobody_reads_at_once_is_whole(self, sandbox: SandboxEnvironment) -> None:
        result = sandbox.run_command("head -c 12000000 /dev/zero | tr '\\0' 'x'", timeout_s=120)
        assert result.stdout == b"x" * 12_000_000

    def test_what_a_login_shell_says_is_not_in_the_channel(self, config: AppConfig, sandbox: SandboxEnvironment, machine: str) -> None:
        """As templates' own profiles do. Root's, because the bridge is root's."""
        said = "printf 'Welcome to a template\\nwithout an end: '; echo noise >&2\n"
        backend_of(config)._account.sandbox(machine).files.write("/root/.bash_profile", said, user="root")
        service().order("cut_streams", sandbox=machine, how="reset")
        assert sandbox.run_command("printf 'a\\377b'").stdout == b"a\xffb"


def test_one_that_hangs_is_told_in_time_and_is_not_taken_for_the_whole_service(
    config: AppConfig, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And bridges that nobody has heard of are ended by the next one."""
    monkeypatch.setattr(stream, "DIAL_TIMEOUT_S", 1.0)
    backend = backend_of(config)
    (owned,) = backend.list_owned()
    service().order("freeze", sandbox=machine)
    for _ in range(6):
        with pytest.raises(BackendUnavailableError, match="has not opened a channel within 1 s"):
            asyncio.run(dialled(backend, owned.handle))
    assert backend.breaker_state == "closed"
    service().order("thaw", sandbox=machine)
    monkeypatch.undo()
    asyncio.run(dialled(backend, owned.handle))
    until(lambda: len(processes_in(machine, "bridge")) <= 1)


async def dialled(backend: E2BBackend, handle: SandboxHandle) -> None:
    (await backend.dial(handle)()).close()


def test_bridges_do_not_pile_up(sandbox: SandboxEnvironment, machine: str) -> None:
    for number in range(20):
        assert service().order("cut_streams", sandbox=machine, how="reset") >= 1
        assert sandbox.run_command(["echo", str(number)]).text == f"{number}\n"
    until(lambda: len(processes_in(machine, "bridge")) <= 1)
    assert len(processes_in(machine, "enclosed")) == 1


def test_nothing_is_left_in_the_machine_when_a_client_goes(config: AppConfig, sandbox: SandboxEnvironment, machine: str) -> None:
    """A transport that is closed takes its bridge along: envd does not hear that nobody listens."""
    backend: E2BBackend = backend_of(config)
    (owned,) = backend.list_owned()

    async def open_and_close() -> None:
        transport = await backend.dial(owned.handle)()
        assert len(processes_in(machine, "bridge")) >= 1
        transport.close()
        await asyncio.to_thread(until, lambda: len(processes_in(machine, "bridge")) <= 1)

    asyncio.run(open_and_close())


def test_the_channel_has_no_time_limit_and_other_requests_have(config: AppConfig) -> None:
    """The SDK's own would end it after a minute (its header is Connect-Timeout-Ms)."""
    with overheard(config.e2b_sandbox_url) as (url, said):
        with create_sandbox(config, e2b_sandbox_url=url, sandbox_id="one") as sandbox:
            assert sandbox.run_command("echo on").text == "on\n"
        requests = starts_in(bytes(said))
    bridges = [head for head, body in requests if b"bridge --text" in body]
    scripts = [head for head, body in requests if b"enclose --directory" in body]
    assert len(bridges) >= 1
    assert len(scripts) == 1
    assert not any(b"connect-timeout-ms" in head.lower() for head in bridges)
    assert all(b"connect-timeout-ms: 60000" in head.lower() for head in scripts)


def starts_in(said: bytes) -> list[tuple[bytes, bytes]]:
    """Head and the rest of each request that starts a process."""
    parts = said.split(b"POST /process.Process/Start")[1:]
    return [(head, body) for head, _, body in (part.partition(b"\r\n\r\n") for part in parts)]
