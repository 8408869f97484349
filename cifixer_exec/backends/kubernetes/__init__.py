"""Sandboxes as Kubernetes Jobs."""

from cifixer_exec.backends.kubernetes.backend import KubernetesBackend
from cifixer_exec.backends.kubernetes.credentials import Address
from cifixer_exec.backends.kubernetes.job import KubernetesOptions

__all__ = ["Address", "KubernetesBackend", "KubernetesOptions"]
