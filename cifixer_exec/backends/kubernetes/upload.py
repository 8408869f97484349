"""The runner into a Pod that waits for it: by one exec, where no image brings it along."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cifixer_exec.backends.kubernetes.cluster import Cluster
from cifixer_exec.backends.kubernetes.job import BIN, CONTAINER, RUNNER
from cifixer_exec.backends.kubernetes.refusals import RefusedError, translate
from cifixer_exec.backends.kubernetes.stream import ExecTransport, exec_in
from cifixer_exec.backends.runner import runner_path
from cifixer_exec.errors import BackendError, SandboxStartError

UPLOAD_TIMEOUT_S = 30.0
_TRIES, _PAUSE_S = 4, 0.25
_THERE = "there"
#: Says which machine it is, is told how many bytes follow, takes them, and moves them into place whole. fd 3 keeps the output open: else a
#: container engine may take the end of ``head``'s for the end of all, and cut the input
#: (https://github.com/UKGovernmentBEIS/inspect_k8s_sandbox/issues/225). The old protocol cannot end an input, so the bytes are counted.
_SCRIPT = (
    f"exec 3>&1; cd {BIN} || exit 4; if [ -x runner ]; then echo {_THERE}; exit 0; fi; uname -m; read -r n; t=.new.$$; "
    f'if head -c "$n" > $t && [ "$(wc -c < $t)" -eq "$n" ] && chmod 555 $t && mv -f $t runner; then echo {_THERE}; '
    "else rm -f $t; exit 5; fi"
)


def upload_runner(cluster: Cluster, pod: str) -> None:
    """Put it at its place, unless it is there. Blocks; for threads without an event loop.

    Raises:
        SandboxStartError: the image has no shell, or the container is not what it should be.
        BackendUnavailableError: the cluster does not answer.
    """
    asyncio.run(_upload(cluster, pod))


async def _upload(cluster: Cluster, pod: str) -> None:
    said = ""
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(_PAUSE_S * 2**attempt)
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                if await _try(cluster, pod):
                    return
            said = "it came to no end"
        except RefusedError as error:
            if error.code < 500:
                raise translate(error, f"the exec that puts the runner into Pod {pod!r}") from None
            said = str(error)
        except OSError as error:  # an API server that has just gone, or a container that cannot run it
            said = str(error) or type(error).__name__
    mend = f"configure CIFIXER_KUBERNETES_RUNNER_IMAGE, or take an image with sh, head, wc, mv and chmod; nothing else may be at {RUNNER}"
    raise SandboxStartError(f"the runner could not be put into Pod {pod!r}: {said}: {mend}", mend)


async def _try(cluster: Cluster, pod: str) -> bool:
    transport = await exec_in(cluster, pod=pod, container=CONTAINER, command=["/bin/sh", "-c", _SCRIPT])
    try:
        machine = (await _line(transport)).strip()
        if machine == _THERE:
            return True
        try:
            program = await asyncio.to_thread(_program, machine)
        except BackendError as error:
            raise SandboxStartError(f"Pod {pod!r} runs on a machine {machine!r}: {error}", error.code) from None
        transport.send(f"{len(program)}\n".encode())
        transport.send(program)
        await transport.drain()
        return (await _line(transport)).strip() == _THERE
    finally:
        transport.close()


def _program(machine: str) -> bytes:
    return Path(runner_path(machine)).read_bytes()


async def _line(transport: ExecTransport) -> str:
    line = b""
    while not line.endswith(b"\n") and (data := await transport.receive()):
        line += data
    return line.decode("utf-8", "replace")
