"""Sandboxes as E2B microVMs."""

from cifixer_exec.backends.e2b.account import Access
from cifixer_exec.backends.e2b.backend import E2BBackend
from cifixer_exec.backends.e2b.machines import E2BOptions

__all__ = ["Access", "E2BBackend", "E2BOptions"]
