"""Making and finding the microVMs of sandboxes, and starting the runner in them."""

from __future__ import annotations

import math
import secrets
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2b import CommandExitException, Sandbox, SandboxInfo

from cifixer_exec.backends.e2b.account import Account
from cifixer_exec.backends.e2b.names import Names
from cifixer_exec.backends.e2b.vendor_errors import LOG_IN, SLOWER
from cifixer_exec.backends.limits import limit_arguments, root_arguments
from cifixer_exec.backends.pace import Pace
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.errors import BackendUnavailableError, CapacityError, CircuitOpenError, ExecutorError, SandboxLostError, SandboxStartError
from cifixer_exec.model import SandboxSpec

#: In the microVM. Root's, and others can only pass through.
DIRECTORY = "/run/cifixer"
RUNNER, SOCKET, ENDED = f"{DIRECTORY}/runner", f"{DIRECTORY}/channel/socket", f"{DIRECTORY}/ended"
#: On its disk: /run is memory, and small.
SPOOL = "/var/lib/cifixer/spool"
#: Of what runs as root: the SDK always starts a login shell, and bash in POSIX mode reads no profile. A profile calls programs by name, and
#: in E2B's templates everybody may write to /usr/local, which is in front of root's PATH (e2b-dev/infra, configure.sh): any command of a
#: sandbox could so become root with the next bridge.
NO_PROFILE = {"POSIXLY_CORRECT": "1"}
_TRUSTED_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
WORKSPACE, TMP = "/workspace", "/tmp"  # noqa: S108
#: Its runner listens already, or has ended.
BRIDGE = f"exec {RUNNER} bridge --text --wait 0.2 --socket {SOCKET}"
#: The microVM ends so long behind the runner, so that the reason can still be told; no longer than plans allow
#: (https://e2b.dev/docs/sandbox: an hour, and a day).
SLACK_S, _PLANS_S = 15, (3600, 86_400)
#: Whose clock is a little ahead, asks for that much more than his plan has.
_SKEW_S = 2.0
_SCRIPT_TIMEOUT_S = 60.0
#: For some megabytes.
_UPLOAD_TIMEOUT_S = 60.0
_LOOK_S = 0.2
_NO_RUNNER, _NO_USER, _IS_ROOT, _CANNOT_RUN = 66, 67, 68, 126
NONE, INTERNET = "none", "internet"
_ALL = "0.0.0.0/0"


@dataclass(frozen=True, kw_only=True)
class E2BOptions:
    """How sandboxes are made, whatever their spec. ``allow_out`` and ``deny_out``: addresses, blocks and host names, for ``internet``."""

    template: str = "base"
    user: str = "user"
    allow_out: tuple[str, ...] = ()
    deny_out: tuple[str, ...] = ()
    #: Of the account, at all its workers together.
    creates_per_s: float = 1.0
    start_timeout_s: float = 110.0


def lease_s(lifetime_s: float) -> int:
    """E2B's time-out for a sandbox of that lifetime."""
    wanted = math.ceil(lifetime_s) + SLACK_S
    return next((plan for plan in _PLANS_S if lifetime_s - _SKEW_S <= plan < wanted), wanted)


def egress(network: str | None, options: E2BOptions) -> dict[str, Any]:
    """Of ``Sandbox.create``. Nobody reaches the ports of a sandbox without its token (https://e2b.dev/docs/sandbox/internet-access)."""
    if network != INTERNET:
        return {"allow_internet_access": False, "network": {"allow_public_traffic": False}}
    denied = options.deny_out or ((_ALL,) if options.allow_out else ())  # to allow some means to forbid the rest
    lists = {"allow_out": list(options.allow_out), "deny_out": list(denied)}
    given = {name: addresses for name, addresses in lists.items() if addresses}
    return {"allow_internet_access": True, "network": {**given, "allow_public_traffic": False}}


@dataclass(frozen=True)
class Machines:
    """Of one namespace of ours in one account."""

    account: Account
    names: Names
    options: E2BOptions
    pace: Pace
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def find(self, sandbox_id: str) -> SandboxInfo | None:
        """The one there is; of several, which a server that forgets idempotency keys may have made, the first."""
        pages = self.account.pages(f"looking for sandbox {sandbox_id!r}", self.names.query(sandbox_id))
        found = [info for page in pages for info in page if self.names.has(info.metadata, sandbox_id)]
        return min(found, key=lambda info: (info.started_at, info.sandbox_id), default=None)

    def make(self, spec: SandboxSpec) -> str:
        """Make it, or adopt the one there is, and start its runner; E2B's id.

        Raises: as :meth:`cifixer_exec.backends.base.Backend.create`.
        """
        deadline_s = self.clock() + self.options.start_timeout_s
        dead = ""
        while True:
            found = self.find(spec.sandbox_id)
            adopted = found is not None and found.sandbox_id != dead
            e2b_id = found.sandbox_id if found is not None and adopted else self._create(spec, dead, deadline_s)
            try:
                self._start(spec, e2b_id, is_new=not adopted)
                return e2b_id
            except SandboxLostError as error:  # the answer to an earlier request, or its runner has ended: it gives way
                self._undo(e2b_id)
                if self.clock() > deadline_s:
                    raise SandboxStartError(f"sandbox {spec.sandbox_id!r} did not start: {error}", error.code) from None
                dead = e2b_id
                self.sleep(_LOOK_S)
            except BaseException as error:
                if (isinstance(error, SandboxStartError) or not adopted) and not self._lives(e2b_id):
                    self._undo(e2b_id)
                if isinstance(error, ExecutorError) and not isinstance(error, BackendUnavailableError):
                    raise SandboxStartError(f"sandbox {spec.sandbox_id!r} did not start: {error}", error.code) from None
                raise

    def _create(self, spec: SandboxSpec, dead: str, deadline_s: float) -> str:
        template, unheard = spec.image or self.options.template, False
        while True:
            self._await_turn(deadline_s)
            try:
                return self._created(spec, template, dead)
            except CapacityError as error:  # somebody else uses the account too: the next turn may be ours
                if error.code != SLOWER or self.clock() > deadline_s:
                    raise
                self.sleep(_LOOK_S)
            except SandboxLostError as error:  # what is not found is the template
                mend = "correct image= or CIFIXER_E2B_TEMPLATE, or build it (e2b template build)"
                raise SandboxStartError(f"there is no template {template!r}: {error}: {mend}", mend) from None
            except BackendUnavailableError as error:  # it may be there and cost money; the same request finds it
                if unheard or isinstance(error, CircuitOpenError) or error.code == LOG_IN or self.clock() > deadline_s:
                    raise
                unheard = True

    def _created(self, spec: SandboxSpec, template: str, dead: str) -> str:
        account = self.account
        asked = {
            "template": template,
            "timeout": lease_s(spec.lifetime_s),
            "metadata": self.names.metadata(spec),
            "lifecycle": {"on_timeout": "kill"},
            **egress(spec.network, self.options),
        }
        key = self.names.key(spec.sandbox_id, asked, dead)
        sandbox = account.make(
            f"making sandbox {spec.sandbox_id!r}", lambda: Sandbox.create(**asked, idempotency_key=key, **account.options)
        )
        account.remember(sandbox)
        account.expect_end(sandbox.sandbox_id, lease_s(spec.lifetime_s))
        return str(sandbox.sandbox_id)

    def _await_turn(self, deadline_s: float) -> None:
        per_s, most_s = self.options.creates_per_s, deadline_s - self.clock()
        wait_s = self.pace(self.account.access.account or self.account.fingerprint, per_s, most_s)  # an account may have several keys
        if wait_s is None:
            mend = "raise CIFIXER_E2B_CREATES_PER_S if your plan allows more, or start_timeout_s"
            raise CapacityError(
                f"so many sandboxes wait to be made, at {per_s:g} a second, that there is no turn in {most_s:.0f} s: {mend}", mend
            )
        self.sleep(wait_s)

    def _start(self, spec: SandboxSpec, e2b_id: str, *, is_new: bool) -> None:
        """The runner, which is uploaded where it is not there."""
        sandbox, upload = self.account.sandbox(e2b_id), ""
        for attempt in (1, 2):
            if is_new or attempt > 1:
                upload = self._upload(sandbox)
            code, said = self._run(sandbox, self._script(spec, upload))
            if code == 0:
                return
            if code != _NO_RUNNER:
                break
        if code == _CANNOT_RUN:
            said = f"its machine does not run our runner, which is made for x86_64: {said}"
        if code == _NO_USER:
            mend = "set CIFIXER_E2B_USER to one that the template has"
            raise SandboxStartError(f"its template has no user {self.options.user!r}: {mend}", mend)
        if code == _IS_ROOT:  # the runner's files and root's programs would be its own
            mend = "set CIFIXER_E2B_USER to one that is not root"
            raise SandboxStartError(f"commands must not have uid 0, which user {self.options.user!r} of its template has: {mend}", mend)
        if "the sandbox has ended" in said:
            raise SandboxLostError(said)
        raise SandboxStartError(f"its runner does not start: {said or f'exit code {code}'}")

    def _lives(self, e2b_id: str) -> bool:
        """Whether another worker, which has adopted it while this one was held up, has started its runner."""
        try:
            return self._run(self.account.sandbox(e2b_id), f"[ -S {SOCKET} ]")[0] == 0
        except ExecutorError:
            return False

    def _upload(self, sandbox: Sandbox) -> str:
        """Under a name of its own: another worker may be at it too."""
        path = f"{RUNNER}.{secrets.token_hex(6)}"
        program = Path(runner_path("x86_64")).read_bytes()
        self.account.ask_inside(
            "uploading the runner", lambda: sandbox.files.write(path, program, user="root", request_timeout=_UPLOAD_TIMEOUT_S)
        )
        return path

    def _run(self, sandbox: Sandbox, script: str) -> tuple[int, str]:
        def run() -> tuple[int, str]:
            try:
                sandbox.commands.run(script, user="root", envs=NO_PROFILE, cwd="/", timeout=_SCRIPT_TIMEOUT_S)
            except CommandExitException as error:
                return int(error.exit_code), error.stderr.strip()[-1500:]
            return 0, ""

        return self.account.ask_inside("starting the runner", run)

    def _script(self, spec: SandboxSpec, upload: str) -> str:
        user = shlex.quote(self.options.user)
        put = f"chmod 111 {upload} && mv -f {upload} {RUNNER} || exit {_NO_RUNNER}" if upload else ""
        serve = [
            *("--socket", SOCKET, "--keep-socket", "--spool", SPOOL, "--volatile-spool", "--workspace", WORKSPACE),
            *root_arguments(WORKSPACE, TMP),
            *limit_arguments(spec),
        ]
        return "\n".join(
            (
                f"P=$PATH PATH={_TRUSTED_PATH}",
                f"mkdir -p {DIRECTORY} && chmod 711 {DIRECTORY} && [ ! -L {DIRECTORY} ] || exit 1",
                put,
                f"[ -x {RUNNER} ] || exit {_NO_RUNNER}",
                f"u=$(id -u {user}) && g=$(id -g {user}) || exit {_NO_USER}",
                f'[ "$u" != 0 ] || exit {_IS_ROOT}',
                f"h=$(getent passwd {user} | cut -d: -f6); h=${{h:-/home/{user}}}",
                f"export HOME=$h USER={user} LOGNAME={user} SHELL=/bin/sh TERM=dumb CI=true PATH=$P",
                "unset BASH_ENV ENV MAIL OLDPWD SHLVL POSIXLY_CORRECT",
                f'exec {RUNNER} enclose --directory {DIRECTORY} -- --user "$u:$g" --allow-root "$h" {shlex.join(serve)}',
            )
        )

    def _undo(self, e2b_id: str) -> None:
        """End what could not be started; what fails here, its time-out does."""
        with suppress(ExecutorError):
            self.remove(e2b_id)

    def remove(self, e2b_id: str) -> None:
        """One that is gone is no error. Raises BackendError when it may still be there."""
        self.account.forget(e2b_id)
        with suppress(SandboxLostError):
            self.account.ask(f"ending its sandbox {e2b_id}", lambda: Sandbox.kill(e2b_id, **self.account.options))
