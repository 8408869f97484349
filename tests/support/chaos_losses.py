"""What a caller is told of a sandbox that died: under its command, and with whatever comes next."""

from __future__ import annotations

from cifixer_exec import ExecResult, SandboxEnvironment, SandboxLostError, Status

#: Within so long, where somebody is there to notice.
TOLD_S = 5.0
FOREVER = "echo started >> ran; echo begun; exec sleep 600"


def check_lost(result: ExecResult, said: str = "") -> None:
    """Of :data:`FOREVER`: lost, with what it had said until then, and a cause that has ``said``."""
    assert (result.status, result.exit_code, result.stdout) == (Status.SANDBOX_LOST, None, b"begun\n"), result
    assert result.cause
    assert said in result.cause, result.cause


def check_refused(sandbox: SandboxEnvironment, said: str = "") -> None:
    """Whatever comes next: lost with a cause that has ``said``, by result or by error."""
    try:
        result = sandbox.run_command("echo never")
    except SandboxLostError as error:
        cause = str(error).removeprefix(f"sandbox {sandbox.sandbox_id} is lost: ")
    else:
        assert (result.status, result.stdout) == (Status.SANDBOX_LOST, b""), result
        cause = result.cause
    assert cause
    assert said in cause, cause
