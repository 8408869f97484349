"""The values that everything else passes around: frozen, keyword-only, JSON both ways where they travel.

Units are in the names. Bytes are bytes: output and files are never decoded on the way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from math import inf
from typing import Any, Self

from cifixer_exec.errors import InvalidRequestError

MIB = 1024 * 1024

#: execve(2) refuses one argument longer than this ("MAX_ARG_STRLEN", 32 pages, less the final NUL).
#: https://man7.org/linux/man-pages/man2/execve.2.html
MAX_ARGUMENT_BYTES = 131_071
#: What one op may carry through Redis besides file content.
MAX_PAYLOAD_BYTES = 256 * 1024
#: One chunk of file content or of stdin; the runner's limit for a frame's body.
MAX_BODY_BYTES = MIB
#: What one op carries of a file: an op costs some milliseconds whatever it carries.
MAX_PIECE_BYTES = 2 * MIB
#: What is kept of the end of a stream when it is longer than the output limit.
TAIL_BYTES = MIB

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_ENV_NAME = re.compile(r"[^=\x00]+\Z")


class Status(StrEnum):
    """How a command ended. ``UNKNOWN`` is an answer of its own, never a success."""

    EXITED = "exited"
    SIGNALED = "signaled"
    TIMED_OUT = "timed_out"
    KILLED = "killed"
    OUT_OF_MEMORY = "out_of_memory"
    SANDBOX_LOST = "sandbox_lost"
    UNKNOWN = "unknown"


class Stream(StrEnum):
    """Which of a command's two output streams."""

    STDOUT = "stdout"
    STDERR = "stderr"


def check_id(value: str, what: str) -> str:
    """Return ``value`` if it can be a sandbox or op id.

    Raises:
        InvalidRequestError: it has other characters than ``[A-Za-z0-9._-]`` or more than 100.
    """
    if not isinstance(value, str) or not _ID.match(value):
        raise InvalidRequestError(
            f"{what} {value!r} is not usable: take 1 to 100 of the characters A-Z a-z 0-9 . _ - and begin with a letter or digit"
        )
    return value


def encoded_size(value: str, what: str) -> int:
    """How many bytes ``value`` has outside Python; bytes that are not UTF-8 are ``\\udc80…\\udcff`` surrogates (PEP 383).

    Raises:
        InvalidRequestError: it has other surrogates, which stand for nothing.
    """
    try:
        return len(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{what} has the lone surrogate {value[error.start]!r}, which is no text: remove it") from None


def check_path(value: str) -> str:
    """Return ``value`` if it can be a path in a sandbox (allowed roots are checked by the runner).

    Raises:
        InvalidRequestError: empty, with a NUL or a lone surrogate, or longer than 4096 bytes.
    """
    if not isinstance(value, str):
        raise InvalidRequestError(f"path {value!r} is a {type(value).__name__}: give a str")
    if not value:
        raise InvalidRequestError("path '' is empty: give a path below the workspace")
    if "\0" in value:
        raise InvalidRequestError(f"path {value!r} has a NUL character, which no file name can have: remove it")
    if encoded_size(value, f"path {value[:40]!r}") > 4096:
        raise InvalidRequestError(f"path {value[:40]!r}… is longer than 4096 bytes: shorten it")
    return value


def check_timeout_s(value: float | None, what: str = "timeout_s") -> float | None:
    """Return ``value`` if it is None or a positive number of seconds (at most a year).

    Raises:
        InvalidRequestError: anything else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 366 * 86400:
        raise InvalidRequestError(f"{what}={value!r} is not a time-out: give seconds greater than 0, or None for no limit")
    return float(value)


def check_env(env: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of ``env`` if names and values can be an environment.

    Raises:
        InvalidRequestError: a name or value that is no ``str``, has a NUL, is too long, or a name with ``=``. Values are never shown.
    """
    if not isinstance(env, Mapping | None):
        raise InvalidRequestError(f"env is a {type(env).__name__}: give a mapping of str to str")
    checked: dict[str, str] = {}
    for name, value in (env or {}).items():
        if not isinstance(name, str) or not _ENV_NAME.match(name):
            raise InvalidRequestError(f"env name {name!r} is not usable: give a non-empty str without '=' and NUL")
        if not isinstance(value, str):
            raise InvalidRequestError(f"env[{name!r}] is a {type(value).__name__}: give a str")
        if "\0" in value:
            raise InvalidRequestError(f"env[{name!r}] has a NUL character: remove it")
        size = encoded_size(f"{name}=", "an env name") + encoded_size(value, f"env[{name!r}]")
        if size > MAX_ARGUMENT_BYTES:
            raise InvalidRequestError(
                f"env[{name!r}] with its name has {size} bytes; Linux takes at most {MAX_ARGUMENT_BYTES}: "
                "write it to a file with write_file, or pass it by stdin"
            )
        checked[name] = value
    return checked


def _check_argv(argv: Sequence[str]) -> tuple[str, ...]:
    for arg in argv:
        if not isinstance(arg, str):
            raise InvalidRequestError(f"command argument {arg!r} is a {type(arg).__name__}: give a str")
        if "\0" in arg:
            raise InvalidRequestError(f"command argument {arg[:40]!r} has a NUL character: remove it, or pass the data by stdin")
        size = encoded_size(arg, f"command argument {arg[:40]!r}")
        if size > MAX_ARGUMENT_BYTES:
            raise InvalidRequestError(
                f"the command has an argument of {size} bytes; Linux takes at most {MAX_ARGUMENT_BYTES}: "
                "write it to a file with write_file and run that, or pass it by stdin"
            )
    return tuple(argv)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command to run in a sandbox.

    ``argv`` is what is executed; :meth:`parse` makes it from a shell line or a list. ``env`` is added to the sandbox's
    environment. ``timeout_s`` None means: until the sandbox ends. ``output_limit_bytes`` bounds what the *result* holds of
    each stream (then head and tail are kept); ``spool_limit_bytes`` bounds what stays readable by offset in the sandbox.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    timeout_s: float | None = None
    grace_s: float = 2.0
    stdin: bytes = b""
    stdin_open: bool = False
    output_limit_bytes: int = 16 * MIB
    spool_limit_bytes: int = 128 * MIB

    @classmethod
    def parse(cls, command: str | Sequence[str], **options: Any) -> Self:
        """A command from a shell line (run by ``/bin/sh -c``) or from a list of arguments (run as it is).

        Raises:
            InvalidRequestError: empty, wrong types, NUL, too long, or a wrong option value.
        """
        if isinstance(command, str):
            if not command.strip():
                raise InvalidRequestError(f"command {command!r} is empty: give a shell line or a list of arguments")
            argv: tuple[str, ...] = ("/bin/sh", "-c", command)
        elif isinstance(command, Sequence) and command and not isinstance(command, (bytes, bytearray)):
            argv = tuple(command)
            if argv[0] == "":
                raise InvalidRequestError("the command's first argument is '': give the program to run")
        else:
            raise InvalidRequestError(f"command {command!r} is empty or of a wrong type: give a shell line or a list of arguments")
        return cls(argv=_check_argv(argv), **options)

    def __post_init__(self) -> None:
        object.__setattr__(self, "env", check_env(self.env))
        check_timeout_s(self.timeout_s)
        if isinstance(self.grace_s, bool) or not isinstance(self.grace_s, (int, float)) or not 0 <= self.grace_s <= 3600:
            raise InvalidRequestError(f"grace_s={self.grace_s!r} is not usable: give seconds from 0 to 3600")
        if self.cwd is not None:
            check_path(self.cwd)
        texts = [*self.argv, *(text for pair in self.env.items() for text in pair)]
        size = sum(len(text.encode("utf-8", "surrogateescape")) for text in texts)
        if size > MAX_PAYLOAD_BYTES:
            raise InvalidRequestError(
                f"the command's arguments and env are {size} bytes; at most {MAX_PAYLOAD_BYTES} are possible: "
                "write them to a file with write_file, or pass them by stdin"
            )
        if not isinstance(self.stdin, bytes):
            raise InvalidRequestError(f"stdin is a {type(self.stdin).__name__}: give bytes (or a str to run_command)")
        for name in ("output_limit_bytes", "spool_limit_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1 << 40:
                raise InvalidRequestError(f"{name}={value!r} is not usable: give a whole number of bytes, 0 or more")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict without ``stdin`` (which travels as bytes beside it)."""
        data = {name: getattr(self, name) for name in _COMMAND_MEMBERS}
        return {**data, "argv": list(self.argv), "env": dict(self.env), "stdin_bytes": len(self.stdin)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], stdin: bytes = b"") -> Self:
        """The inverse of :meth:`to_json`."""
        options = {name: data[name] for name in _COMMAND_MEMBERS if name in data}
        return cls(argv=tuple(data["argv"]), stdin=stdin, **options)


#: What :meth:`Command.to_json` copies; not ``asdict``, which copies deeply and takes longer than the rest of a submit.
_COMMAND_MEMBERS = tuple(f.name for f in fields(Command) if f.name not in ("argv", "stdin"))


@dataclass(frozen=True, kw_only=True)
class OutputChunk:
    """Consecutive bytes of one stream. ``offset`` is that of the first byte; ``index`` the command's place in a batch."""

    stream: Stream
    offset: int
    data: bytes
    index: int = 0

    def __str__(self) -> str:
        """The bytes as text, so that ``on_output=print`` shows what a person expects."""
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True, kw_only=True)
class ExecRecord:
    """How a command ended, as the runner (or the worker, for a lost sandbox) recorded it; without the output itself."""

    status: Status
    exit_code: int | None = None
    signal: str | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    spool_truncated: bool = False
    duration_s: float = 0.0
    cause: str = ""
    killed_processes: int = 0
    background_processes: int = 0
    oom_kills: int = 0

    @property
    def ok(self) -> bool:
        """True only for a command that exited with 0."""
        return self.status is Status.EXITED and self.exit_code == 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """From the runner's RECORD or from :meth:`to_json`. Unknown members are ignored, a missing status is ``unknown``."""
        known = {f.name for f in fields(cls)} - {"status", "cause"}
        values = {k: v for k, v in data.items() if k in known and v is not None}
        return cls(status=Status(data.get("status") or "unknown"), cause=str(data.get("cause") or ""), **values)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {name: getattr(self, name) for name in _RECORD_MEMBERS}


_RECORD_MEMBERS = tuple(f.name for f in fields(ExecRecord))

#: Of a command that was cancelled while it waited.
NEVER_BEGUN = ExecRecord(status=Status.KILLED, cause="it was cancelled before it started")


@dataclass(frozen=True, kw_only=True)
class ExecResult:
    """What happened, truthfully.

    ``exit_code`` is None unless ``status`` is ``exited``; ``signal`` is a name without ``SIG``. ``stdout``/``stderr`` hold what was kept;
    ``stdout_bytes``/``stderr_bytes`` count all that was written; ``truncated`` says that they differ (head and tail are kept).
    """

    status: Status
    exit_code: int | None
    signal: str | None
    stdout: bytes
    stderr: bytes
    truncated: bool
    stdout_bytes: int
    stderr_bytes: int
    duration_s: float
    cause: str
    op_id: str = ""

    @property
    def ok(self) -> bool:
        """True only for a command that exited with 0."""
        return self.status is Status.EXITED and self.exit_code == 0

    @property
    def text(self) -> str:
        """``stdout`` as UTF-8; what is not UTF-8 becomes U+FFFD."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def stderr_text(self) -> str:
        """``stderr`` as UTF-8; what is not UTF-8 becomes U+FFFD."""
        return self.stderr.decode("utf-8", "replace")


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One entry of a directory, by lstat. ``type``: file, directory, symlink or other. ``mode`` is the permission bits."""

    path: str
    name: str
    type: str
    size: int
    mode: int
    mtime_ns: int
    target: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """From the runner's FILE."""
        return cls(**{f.name: data.get(f.name) for f in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SandboxSpec:
    """What a sandbox should be. None means: the backend's default. ``lifetime_s`` is moved by ``extend``.

    ``network``: ``none`` or ``host``… as the backend's capabilities list them.
    """

    backend: str
    sandbox_id: str
    image: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cpus: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    max_processes: int | None = None
    network: str | None = None
    lifetime_s: float = 3600.0
    readonly_paths: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_id(self.sandbox_id, "sandbox id")
        object.__setattr__(self, "env", check_env(self.env))
        object.__setattr__(self, "readonly_paths", tuple(self.readonly_paths))
        if check_timeout_s(self.lifetime_s, "lifetime_s") is None:
            raise InvalidRequestError("lifetime_s=None is not usable: every sandbox ends; give seconds")
        for name in ("cpus", "memory_bytes", "disk_bytes", "max_processes"):
            value = getattr(self, name)
            least = 0.01 if name == "cpus" else 1  # less would be rounded to 0, which means "no limit" to kernels and daemons
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < inf):
                raise InvalidRequestError(f"{name}={value!r} is not usable: give a number of at least {least}, or None")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})


@dataclass(frozen=True, kw_only=True)
class SandboxHandle:
    """What any worker of the placement needs to reach a sandbox. ``data`` belongs to the backend and is JSON-able."""

    backend: str
    sandbox_id: str
    placement: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend truly enforces on this machine: data, not promises. Asking for more is an InvalidRequestError."""

    images: bool = False
    memory: bool = False
    cpus: bool = False
    disk: bool = False
    max_processes: bool = False
    networks: tuple[str, ...] = ("none",)
    readonly_paths: bool = False


@dataclass(frozen=True, kw_only=True)
class Health:
    """The answer of a probe: ``ok``, why not, and the line that mends it."""

    ok: bool
    summary: str
    remedy: str = ""
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Whether a sandbox is alive; if not, the cause of its death as far as the platform tells."""

    alive: bool
    cause: str = ""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of a run: one record per command that was started, in order."""

    records: tuple[ExecRecord, ...]


OnOutput = Callable[[OutputChunk], object]


def payload_digest(kind: str, payload: Mapping[str, Any], body: bytes = b"") -> str:
    """The identity of an op's payload: sha256 over its canonical JSON and body, as hex."""
    text = json.dumps([kind, payload], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii") + b"\0" + body).hexdigest()


def with_env(command: Command, env: Mapping[str, str]) -> Command:
    """``command`` with ``env`` below its own variables."""
    return replace(command, env={**env, **command.env})
