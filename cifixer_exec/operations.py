"""What an op says: its id and the payload of a command op, on its way through the journal."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import Command


def new_op_id() -> str:
    """A random op id."""
    return uuid.uuid4().hex


def commands_payload(commands: Sequence[Command]) -> tuple[dict[str, Any], bytes]:
    """The payload and body of a ``start`` op: stdin of all commands goes, in order, into the body."""
    return {"commands": [c.to_json() for c in commands]}, b"".join(c.stdin for c in commands)


def run_time_s(commands: Sequence[Command]) -> float:
    """How long the commands may take together at the most; a year for one without a limit."""
    return min(366 * 86_400.0, sum((366 * 86_400.0 if c.timeout_s is None else c.timeout_s) + c.grace_s for c in commands))


def commands_from(payload: Mapping[str, Any], body: bytes) -> list[Command]:
    """The inverse of :func:`commands_payload`.

    Raises:
        InvalidRequestError: not such a payload.
    """
    commands, position = [], 0
    try:
        for data in payload["commands"]:
            size = int(data.get("stdin_bytes", 0))
            commands.append(Command.from_json(data, body[position : position + size]))
            position += size
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"the op's payload is no list of commands: {error!r}") from None
    return commands
