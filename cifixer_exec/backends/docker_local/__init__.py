"""Sandboxes as containers on a Docker daemon. The vendor's package is the ``docker`` extra, imported only in here."""

from cifixer_exec.backends.docker_local.backend import DockerBackend
from cifixer_exec.backends.docker_local.containers import DockerOptions
from cifixer_exec.backends.docker_local.daemon import Address

__all__ = ["Address", "DockerBackend", "DockerOptions"]
