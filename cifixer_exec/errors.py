"""Every error this package raises on purpose.

::

    ExecutorError
    ├── InvalidRequestError            the request can never work as it stands; nothing has started
    │   └── OperationConflictError     the op id is known, with another payload
    ├── SandboxNotFoundError           no such sandbox (never made, or torn down)
    ├── SandboxFileError               a path inside the sandbox: missing, not allowed, disk full … (see ``code``)
    ├── QueueUnavailableError          Redis cannot be reached, or no worker answers
    └── BackendError
        ├── BackendUnavailableError    the backend does not answer, or cannot work on this machine
        │   └── CircuitOpenError       it did not answer for a while, so it was not even asked
        ├── CapacityError              no room now: quota, process limit, rate limit
        ├── SandboxStartError          the sandbox could not be made; what was begun is removed
        ├── SandboxLostError           it was there and is gone (see ``cause`` in the message)
        └── OutcomeUnknownError        it was asked and the backend went away: done or not, nobody knows

``retryable`` means: *the command cannot have started*, so sending the same request again is safe even
under a new op id. A command that fails is not an error: it is an :class:`~cifixer_exec.model.ExecResult`.

Every error is built from its positional ``args`` alone, so it survives JSON (:func:`error_to_json`,
:func:`error_from_json`) and pickling without loss.
"""

from __future__ import annotations

from typing import Any


class ExecutorError(Exception):
    """Base of all errors of this package. ``args`` is ``(message,)`` or ``(message, code)``."""

    retryable: bool = False

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message, code)
        self.message = message
        self.code = code

    def __str__(self) -> str:
        return self.message


class InvalidRequestError(ExecutorError):
    """The request is wrong; the message names the value and the remedy. Nothing has started."""

    retryable = False


class OperationConflictError(InvalidRequestError):
    """The op id is already known with a different payload; choose a new op id."""


class SandboxNotFoundError(ExecutorError):
    """No sandbox of this id is registered, or it was torn down."""


class SandboxFileError(ExecutorError):
    """A file operation failed inside the sandbox; ``code`` is the runner's code (docs/protocol.md §3)."""


class QueueUnavailableError(ExecutorError):
    """Redis cannot be reached, or no worker serves the queue. Submit again with the same op id."""


class BackendError(ExecutorError):
    """The backend failed, not the command."""


class BackendUnavailableError(BackendError):
    """The backend does not answer or cannot work here; the message says what to do."""

    retryable = True


class CircuitOpenError(BackendUnavailableError):
    """The backend has not answered for a while and is left alone; the message says for how long. Nothing was asked."""


class CapacityError(BackendError):
    """There is no room now; nothing has started."""

    retryable = True


class SandboxStartError(BackendError):
    """The sandbox could not be made."""

    retryable = True


class SandboxLostError(BackendError):
    """The sandbox is gone. A command may have run, so this is not retryable."""


class OutcomeUnknownError(BackendError):
    """The request was sent, and the platform went away before the answer: it may have been done. Not retryable."""


_BY_NAME: dict[str, type[ExecutorError]] = {
    cls.__name__: cls
    for cls in (
        ExecutorError,
        InvalidRequestError,
        OperationConflictError,
        SandboxNotFoundError,
        SandboxFileError,
        QueueUnavailableError,
        BackendError,
        BackendUnavailableError,
        CircuitOpenError,
        CapacityError,
        SandboxStartError,
        SandboxLostError,
        OutcomeUnknownError,
    )
}


def error_to_json(error: ExecutorError) -> dict[str, Any]:
    """``{"error": class name, "args": [...]}``."""
    return {"error": type(error).__name__, "args": list(error.args)}


def error_from_json(data: dict[str, Any]) -> ExecutorError:
    """The inverse of :func:`error_to_json`; an unknown class name becomes :class:`ExecutorError`."""
    cls = _BY_NAME.get(str(data.get("error")), ExecutorError)
    args = [str(a) for a in data.get("args", [])] or ["an error without a message"]
    return cls(*args[:2])
