"""cifixer-exec: the place where AI agents that repair failing CI run untrusted commands."""

from cifixer_exec.blocking import CommandHandle, SandboxEnvironment
from cifixer_exec.client import attach, attach_async, create_async_sandbox, create_sandbox
from cifixer_exec.environment import AsyncCommandHandle, AsyncSandboxEnvironment
from cifixer_exec.errors import (
    BackendError,
    BackendUnavailableError,
    CapacityError,
    CircuitOpenError,
    ExecutorError,
    InvalidRequestError,
    OperationConflictError,
    OutcomeUnknownError,
    QueueUnavailableError,
    SandboxFileError,
    SandboxLostError,
    SandboxNotFoundError,
    SandboxStartError,
)
from cifixer_exec.model import ExecResult, FileInfo, OutputChunk, Status, Stream
from cifixer_exec.settings import AppConfig

__all__ = [
    "AppConfig",
    "AsyncCommandHandle",
    "AsyncSandboxEnvironment",
    "BackendError",
    "BackendUnavailableError",
    "CapacityError",
    "CircuitOpenError",
    "CommandHandle",
    "ExecResult",
    "ExecutorError",
    "FileInfo",
    "InvalidRequestError",
    "OperationConflictError",
    "OutcomeUnknownError",
    "OutputChunk",
    "QueueUnavailableError",
    "SandboxEnvironment",
    "SandboxFileError",
    "SandboxLostError",
    "SandboxNotFoundError",
    "SandboxStartError",
    "Status",
    "Stream",
    "attach",
    "attach_async",
    "create_async_sandbox",
    "create_sandbox",
]
