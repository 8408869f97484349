"""``logs``: the output of an op as the journal has it."""

from __future__ import annotations

from cifixer_exec.cli.live import LiveOutput
from cifixer_exec.cli.reach import ask
from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import OutputChunk
from cifixer_exec.settings import AppConfig
from cifixer_exec.store.journal import Journal
from cifixer_exec.store.records import End


def show_output(config: AppConfig, sandbox_id: str, op_id: str, *, follow: bool) -> None:
    """Write the output from its first byte; ``follow``: until the op ends, else what is there now.

    Raises:
        InvalidRequestError: the sandbox has no such op. ExecutorError: as the op failed.
    """

    async def showing(journal: Journal) -> None:
        op = await journal.op(op_id)
        if op is None or op.sandbox_id != sandbox_id:
            raise InvalidRequestError(f"op {op_id!r} of sandbox {sandbox_id!r} is not (or no longer) in the journal: check both ids")
        write = LiveOutput()
        if follow or op.final:
            async for item in journal.follow(op_id, patience_s=config.redis_patience_s):
                _show(item, write)
        else:
            after = "0"
            while entries := await journal.read(op_id, after=after, block_s=0):
                after = entries[-1].entry_id
                for entry in entries:
                    _show(entry.item, write)

    ask(config, showing)


def _show(item: OutputChunk | End, write: LiveOutput) -> None:
    if isinstance(item, OutputChunk):
        write(item)
    elif item.error is not None:
        raise item.error
