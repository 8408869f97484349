"""The channel to a Pod that no image brings the runner for: the first exec puts it in, and then is the bridge, like every later one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.job import BIN, BRIDGE, CONTAINER
from cifixer_exec.backends.kubernetes.stream import ExecTransport, exec_in
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.backends.threads import asking
from cifixer_exec.errors import BackendError, SandboxStartError

UPLOAD_TIMEOUT_S = 30.0
_THERE = "there"
_NO_PLACE, _NOT_WHOLE = 4, 5
#: Says which machine it is, is told how many bytes follow, takes them, moves them into place whole, and becomes the bridge. fd 3 keeps the
#: output open: else a container engine may take the end of ``head``'s for the end of all, and cut the input
#: (https://github.com/UKGovernmentBEIS/inspect_k8s_sandbox/issues/225). The old protocol cannot end an input, so the bytes are counted.
_SCRIPT = (
    f"exec 3>&1; cd {BIN} || exit {_NO_PLACE}; if ! [ -x runner ]; then uname -m; read -r n; t=.new.$$; "
    f'if head -c "$n" > $t && [ "$(wc -c < $t)" -eq "$n" ] && chmod 555 $t && mv -f $t runner; then :; '
    f"else rm -f $t; exit {_NOT_WHOLE}; fi; fi; echo {_THERE}; exec 3>&-; exec {' '.join(BRIDGE)}"
)
_MEND = "set CIFIXER_KUBERNETES_RUNNER_IMAGE, or take an image with sh, uname, head, wc, mv and chmod"


async def open_channel(cluster: Cluster, pod: str) -> ExecTransport:
    """An exec of the bridge, behind the upload of the runner where it is not there.

    Raises:
        SandboxStartError: the image has not the programs for it, or there is no runner for the machine. Else as :func:`exec_in`.
    """
    transport = await exec_in(cluster, pod=pod, container=CONTAINER, command=["/bin/sh", "-c", _SCRIPT])
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            machine = await transport.read_line()
            if machine != _THERE:
                await send_runner(transport, machine)
        return transport
    except ConnectionError as error:
        transport.close()
        # Anything else may be its container's end, which is for an inspection to find out; one without a shell has never started.
        if transport.status is not None and transport.status.exit_code in (_NO_PLACE, _NOT_WHOLE):
            raise SandboxStartError(f"the runner could not be put into Pod {pod!r}: {error}: {_MEND}", _MEND) from None
        raise
    except BaseException:
        transport.close()
        raise


async def send_runner(transport: ExecTransport, machine: str) -> None:
    """Answer the script. ``machine``: as ``uname -m`` has said there."""
    try:
        program = await asking(_program, machine)
    except BackendError as error:
        raise SandboxStartError(f"the Pod's node is a machine {machine!r}: {error}", error.code) from None
    transport.send(f"{len(program)}\n".encode())
    transport.send(program)
    await transport.drain()
    if await transport.read_line() != _THERE:
        raise ConnectionError("the runner was not taken whole")


def _program(machine: str) -> bytes:
    return Path(runner_path(machine)).read_bytes()
