"""The raw Celery message that rings for an op: protocol 2, as ``app.amqp.as_task_v2`` makes it, without Celery.

It carries ids only. ``journal.lua`` puts the queue and the delivery tag in when it rings, so the message travels in three parts.
https://docs.celeryq.dev/en/stable/internals/protocol.html
"""

from __future__ import annotations

import json
from typing import Any

TASK_NAME = "cifixer_exec.ring"

_QUEUE = "@queue@"
_TAG = "@tag@"
_NO_CALLBACKS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def message(sandbox_id: str, op_id: str, *, queue: str, delivery_tag: str) -> dict[str, Any]:
    """The whole message as kombu's Redis transport keeps it in a queue's list.

    The body is plain JSON text: without ``body_encoding`` kombu takes it as it is.
    """
    return {
        "body": _dumps([[sandbox_id, op_id], {}, _NO_CALLBACKS]),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": TASK_NAME,
            "id": op_id,
            "shadow": None,
            "eta": None,
            "expires": None,
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": op_id,
            "parent_id": None,
            "argsrepr": f"('{sandbox_id}', '{op_id}')",
            "kwargsrepr": "{}",
            "origin": "cifixer-exec",
            "ignore_result": True,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
        },
        "properties": {
            "correlation_id": op_id,
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "delivery_tag": delivery_tag,
        },
    }


def template(sandbox_id: str, op_id: str) -> str:
    """The message in three lines; between them belong the JSON of the queue's name and that of the delivery tag."""
    text = _dumps(message(sandbox_id, op_id, queue=_QUEUE, delivery_tag=_TAG))
    return text.replace(f'"{_QUEUE}"', "\n", 1).replace(f'"{_TAG}"', "\n", 1)
