"""What the clients do: stories of sandboxes, each op of which knows what must come of it.

Every command begins with a line in the file ``ledger`` of its sandbox, which is read before the sandbox is torn down.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from cifixer_exec import AppConfig, AsyncSandboxEnvironment, ExecResult, create_async_sandbox
from cifixer_exec.errors import ExecutorError, InvalidRequestError, QueueUnavailableError, SandboxFileError
from cifixer_exec.model import Status
from cifixer_exec.store.journal import Journal
from tests.chaos.plan import CALL_BOUND_S, Options, stream
from tests.chaos.report import Report

T = TypeVar("T")
_PAUSE_S = 0.2


class HungError(Exception):
    """A call took longer than any may; it is in the report."""


@dataclass
class Expected:
    """One command op. ``ends``: (exit code, sha256 of stdout) of each command, None: it is killed. ``lines``: its ledger lines."""

    op_id: str
    sandbox_id: str
    shape: str
    ends: tuple[tuple[int, str], ...] | None
    lines: tuple[str, ...]
    #: Any end is right: the sandbox is torn down under it.
    free: bool = False
    #: What its callers were given: one list per caller.
    seen: list[list[ExecResult]] = field(default_factory=list)


def sha(data: bytes) -> str:
    """As hex."""
    return hashlib.sha256(data).hexdigest()


class Load:
    """All stories of a run. ``configs`` are as many ways to Redis as there are kinds of clients; ``journal`` looks on from aside."""

    def __init__(self, options: Options, configs: list[AppConfig], journal: Journal, report: Report) -> None:
        self.options = options
        self.report = report
        self.book: dict[str, Expected] = {}
        self.stopping = asyncio.Event()
        self._configs = configs
        self._journal = journal
        self._numbers = itertools.count(1)

    async def run(self) -> None:
        """Keep telling stories until :attr:`stopping`; returns when the last is over."""
        await asyncio.gather(*(self._stories() for _ in range(self.options.sandboxes)))

    async def _stories(self) -> None:
        while not self.stopping.is_set():
            number = next(self._numbers)
            story = Story(self, f"{self._configs[0].namespace}-{number}", stream(self.options.seed, f"story/{number}"))
            try:
                await story.tell()
            except HungError:
                pass
            except ExecutorError as error:
                self.report.lost.append(f"{story.sandbox_id}: {story.at}: {type(error).__name__}: {error}")
            finally:
                await story.end()

    def client(self, sandbox_id: str, way: int = 0) -> AsyncSandboxEnvironment:
        """A client of its own, with connections of its own."""
        return create_async_sandbox(self._configs[way % len(self._configs)], sandbox_id=sandbox_id)

    async def bounded(self, what: str, call: Awaitable[T], op_id: str = "") -> T:
        """The answer of ``call``. Raises HungError."""
        try:
            async with asyncio.timeout(CALL_BOUND_S):
                return await call
        except TimeoutError:
            record = await self._journal.op(op_id) if op_id else None
            self.report.hung.append(f"{what}: no answer in {CALL_BOUND_S:g} s; the journal says {record}")
            raise HungError(what) from None

    async def insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """As a good client does: the same call (and op id) again when Redis could not be asked."""
        while True:
            try:
                return await call()
            except QueueUnavailableError as error:
                if " in time" in error.message:
                    raise  # that is the op's own end
                self.report.retries += 1
            await asyncio.sleep(_PAUSE_S)


class Story:
    """One sandbox from its creation to its end."""

    def __init__(self, load: Load, sandbox_id: str, rng: random.Random) -> None:
        self.sandbox_id = sandbox_id
        self.at = "begin"
        self._load = load
        self._rng = rng
        self._ops = itertools.count(1)
        self._clients: list[AsyncSandboxEnvironment] = []
        self._main = self._client()
        self._leaving: asyncio.Task[None] | None = None

    def _client(self) -> AsyncSandboxEnvironment:
        client = self._load.client(self.sandbox_id, self._rng.randrange(8))
        self._clients.append(client)
        return client

    async def tell(self) -> None:
        """Raises HungError, or what the sandbox should not have answered."""
        if not await self._create():
            return
        self._load.report.sandboxes += 1
        for _ in range(self._rng.randint(3, 7)):
            if self._load.stopping.is_set():
                break
            steps = [self._step() for _ in range(self._rng.choice((1, 1, 2, 3)))]
            for result in await asyncio.gather(*steps, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
        await self._check_ledger()
        if self._rng.random() < 0.3:
            self._leaving = asyncio.create_task(self._run_into_the_end(self._expect("cut short", None, free=True)))
            await asyncio.sleep(self._rng.uniform(0.0, 0.8))

    async def end(self) -> None:
        """Tear it down, whatever came before; and wait for who was still at work in it."""
        self.at = "teardown"
        with suppress(HungError):
            await self._load.bounded(f"{self.sandbox_id}: teardown", self._load.insist(self._client().teardown))
        if self._leaving is not None:
            with suppress(HungError):
                await self._leaving
        for client in self._clients:
            await client.close()

    # ------------------------------------------------------------------------------------------------- the sandbox

    async def _create(self) -> bool:
        """False if a client gave up, as it may when Redis is away: then what it asked for is not to be."""
        self.at = "create"
        calls = [self._main.init()]
        if self._rng.random() < 0.2:
            calls.append(self._client().init())  # a caller that asks twice gets one sandbox
        what = f"{self.sandbox_id}: create"
        asked = self._load.bounded(what, asyncio.gather(*calls, return_exceptions=True), f"create-{self.sandbox_id}")
        errors = [e for e in await asked if isinstance(e, BaseException)]
        if any(isinstance(e, QueueUnavailableError) for e in errors):
            self._load.report.notes["creations given up"] += 1
            return False
        for error in errors:
            raise error
        return True

    async def _check_ledger(self) -> None:
        """Every command that was told to have run has written its line once."""
        self.at = "ledger"
        answer = await self._load.bounded(
            f"{self.sandbox_id}: ledger", self._load.insist(lambda: self._main.run_command("touch ledger && cat ledger", timeout_s=30))
        )
        if not answer.ok:
            self._load.report.lost.append(f"{self.sandbox_id}: the ledger cannot be read: {answer}")
            return
        lines = Counter(answer.text.split())
        for expected in [e for e in self._load.book.values() if e.sandbox_id == self.sandbox_id]:
            for line in expected.lines:
                self._check_line(expected, line, lines.pop(line, 0))
        self._load.report.findings.extend(f"{self.sandbox_id}: {line} is in the ledger and was never asked for" for line in lines)

    def _check_line(self, expected: Expected, line: str, count: int) -> None:
        said = f"{line} ({expected.shape})"
        if count > 1:
            self._load.report.doubled.append(f"{said}: {count} lines in the ledger")
        elif count == 0 and expected.ends is not None:
            self._load.report.lost.append(f"{said}: no line in the ledger")
        before = any(r.cause.startswith("it was cancelled before") for results in expected.seen for r in results)
        if count and before:
            self._load.report.findings.append(f"{said}: it ran, and its caller was told that it never started")

    # ------------------------------------------------------------------------------------------------ the commands

    def _step(self) -> Coroutine[Any, Any, None]:
        steps: list[tuple[Callable[[], Coroutine[Any, Any, None]], int]] = [
            (self._short, 5),
            (self._pieces, 4),
            (self._input, 2),
            (self._typed, 2),
            (self._batch, 3),
            (self._killed, 3),
            (self._twins, 3),
            (self._taken_up, 3),
            (self._extend, 1),
            (self._files, 3 if self._load.options.files else 0),
        ]
        return self._rng.choices([s for s, _ in steps], [w for _, w in steps])[0]()

    def _expect(self, shape: str, ends: tuple[tuple[int, str], ...] | None, *, lines: int = 0, free: bool = False) -> Expected:
        op_id = f"{self.sandbox_id}.{next(self._ops)}"
        names = tuple(f"{op_id}.{n}" for n in range(lines)) or (op_id,)
        expected = self._load.book[op_id] = Expected(op_id, self.sandbox_id, shape, ends, names, free)
        self._load.report.shapes[shape] += 1
        self._load.report.commands += 1
        return expected

    async def _run(self, expected: Expected, command: str, client: AsyncSandboxEnvironment | None = None, stdin: bytes = b"") -> None:
        run = (client or self._main).run_command
        command = f"echo {expected.op_id} >> ledger; {command}"
        call = self._load.insist(lambda: run(command, op_id=expected.op_id, timeout_s=40, stdin=stdin))
        self._check(expected, [await self._load.bounded(f"{expected.op_id} ({expected.shape})", call, expected.op_id)])

    def _check(self, expected: Expected, results: list[ExecResult]) -> None:
        """What one caller was given against what must be."""
        expected.seen.append([replace(r, stdout=b"", stderr=b"") for r in results])  # a long run has gigabytes of output
        if expected.ends is None:
            if [r.status for r in results] != [Status.KILLED]:
                self._load.report.lost.append(f"{expected.op_id} ({expected.shape}): it was killed, and its caller was told {results}")
            return
        told = [(r.status.value, r.exit_code) for r in results]
        if told != [("exited", code) for code, _ in expected.ends]:
            causes = [r.cause for r in results]
            self._load.report.lost.append(f"{expected.op_id} ({expected.shape}): {told} instead of {expected.ends}: {causes}")
        elif [sha(r.stdout) for r in results] != [digest for _, digest in expected.ends]:
            sizes = [(r.stdout_bytes, len(r.stdout), r.truncated) for r in results]
            self._load.report.findings.append(f"{expected.op_id} ({expected.shape}): wrong output: {sizes}")

    async def _short(self) -> None:
        code = self._rng.choice((0, 0, 1, 7, 255))
        word = f"{self._rng.getrandbits(64):x}"
        await self._run(self._expect("short", ((code, sha(f"{word}\n".encode())),)), f"echo {word}; exit {code}")

    async def _pieces(self) -> None:
        await self._run(*self._pieces_of("pieces"))

    def _pieces_of(self, shape: str) -> tuple[Expected, str]:
        """Some hundred KB in pieces, over a second or two."""
        count, size, first = self._rng.randint(2, 8), self._rng.choice((10, 800, 6000)), self._rng.randrange(100_000)
        pause_s = self._rng.choice((0.05, 0.2, 0.4))
        text = "".join(f"{n}\n" for i in range(count) for n in range(first + i, first + i + size))
        line = f"i=0; while [ $i -lt {count} ]; do seq $(({first}+i)) $(({first}+i+{size}-1)); i=$((i+1)); sleep {pause_s}; done; exit 3"
        return self._expect(shape, ((3, sha(text.encode())),)), line

    async def _input(self) -> None:
        data = self._rng.randbytes(self._rng.choice((0, 10, 150_000)))
        await self._run(self._expect("input", ((0, sha(f"{sha(data)}  -\n".encode())),)), "sha256sum", stdin=data)

    async def _typed(self) -> None:
        """Input that is sent while the command runs."""
        parts = [self._rng.randbytes(self._rng.choice((1, 2000, 90_000))) for _ in range(self._rng.randint(1, 3))]
        expected = self._expect("typed", ((0, sha(f"{sha(b''.join(parts))}  -\n".encode())),))
        insist, what = self._load.insist, f"{expected.op_id} (typed)"
        command = f"echo {expected.op_id} >> ledger; sha256sum"

        async def call() -> ExecResult:
            handle = await insist(lambda: self._main.start_command(command, op_id=expected.op_id, timeout_s=40, stdin_open=True))
            for part in parts:
                await insist(lambda part=part: handle.send_stdin(part))  # type: ignore[misc]
            await insist(handle.close_stdin)
            return await insist(handle.wait)

        self._check(expected, [await self._load.bounded(what, call(), expected.op_id)])

    async def _batch(self) -> None:
        """Three commands and a fourth that must not start, because the third fails."""
        ends = tuple((5 * (n == 2), sha(f"{n}\n".encode())) for n in range(3))
        expected = self._expect("batch", ends, lines=3)
        commands = [f"echo {expected.op_id}.{n} >> ledger; echo {n}; sleep 0.{n}; exit {5 * (n == 2)}" for n in range(4)]
        call = self._load.insist(lambda: self._main.run_batch(commands, op_id=expected.op_id, timeout_s=40))
        self._check(expected, await self._load.bounded(f"{expected.op_id} (batch)", call, expected.op_id))

    async def _killed(self) -> None:
        """At once, so that it may never start; or a little later."""
        expected = self._expect("killed", None)
        insist = self._load.insist
        command = f"echo {expected.op_id} >> ledger; sleep 600"

        async def call() -> ExecResult:
            handle = await insist(lambda: self._main.start_command(command, op_id=expected.op_id))
            await asyncio.sleep(self._rng.choice((0.0, 0.0, 0.05, 0.4, 1.5)))
            await insist(handle.kill)
            return await insist(handle.wait)

        self._check(expected, [await self._load.bounded(f"{expected.op_id} (killed)", call(), expected.op_id)])

    async def _twins(self) -> None:
        """Two callers, one op."""
        expected, command = self._pieces_of("twins")
        await asyncio.gather(self._run(expected, command), self._run(expected, command, self._client()))

    async def _taken_up(self) -> None:
        """The caller dies in the middle, and another asks for the same op."""
        expected, command = self._pieces_of("taken up")
        first = asyncio.create_task(self._run(expected, command, self._client()))
        await asyncio.wait([first], timeout=self._rng.uniform(0.0, 1.5))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        if self._rng.random() < 0.5:
            handle = self._client().command(expected.op_id)
            call = self._load.bounded(f"{expected.op_id} (taken up)", self._load.insist(handle.wait), expected.op_id)
            with suppress(InvalidRequestError):  # it had not even asked
                self._check(expected, [await call])
                return
        await self._run(expected, command, self._client())

    async def _run_into_the_end(self, expected: Expected) -> None:
        """Any result and any error is right, but for silence."""
        call = self._main.run_command(f"echo {expected.op_id} >> ledger; sleep 20", op_id=expected.op_id)
        with suppress(ExecutorError):
            expected.seen.append([await self._load.bounded(f"{expected.op_id} (cut short)", call, expected.op_id)])

    async def _extend(self) -> None:
        self._load.report.shapes["extend"] += 1
        await self._load.bounded(f"{self.sandbox_id}: extend", self._load.insist(lambda: self._main.extend(300)))

    async def _files(self) -> None:
        """Write, read, remove; each may be asked for twice."""
        self._load.report.shapes["files"] += 1
        path, data = f"file{next(self._ops)}", self._rng.randbytes(self._rng.choice((3, 50_000, 1_300_000)))
        insist, bounded, what = self._load.insist, self._load.bounded, f"{self.sandbox_id}: {path}"
        await bounded(f"{what}: write", insist(lambda: self._main.write_file(path, data)))
        if sha(await bounded(f"{what}: read", insist(lambda: self._main.read_file(path)))) != sha(data):
            self._load.report.findings.append(f"{what} is not what was written")
        attempts = itertools.count()
        try:
            await bounded(f"{what}: remove", insist(lambda: self._remove(path, attempts)))
        except SandboxFileError as error:
            # The client's own repetition is a new op, which may truthfully say so; the worker's is not.
            if error.code != "not_found" or next(attempts) == 1:
                raise
            self._load.report.notes["remove: not_found"] += 1

    async def _remove(self, path: str, attempts: Iterator[int]) -> None:
        next(attempts)
        await self._main.remove(path)
