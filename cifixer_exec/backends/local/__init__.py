"""Sandboxes on this host, without a daemon: bubblewrap namespaces."""

from cifixer_exec.backends.local.backend import LocalBackend

__all__ = ["LocalBackend"]
