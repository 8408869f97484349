"""What a test can set about the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Knobs:
    """``images``: name → kind, one of host, empty, missing. Free CPU and memory are what the scheduler thinks the node has."""

    job_controller: bool = True
    job_batch_s: float = 1.0
    ttl_controller: bool = True
    collector: bool = True
    cpu: float = 64.0
    memory_bytes: int = 256 << 30
    max_pods: int = 1000
    node_labels: dict[str, str] = field(default_factory=lambda: {"kubernetes.io/hostname": "stand-in", "kubernetes.io/os": "linux"})
    images: dict[str, str] = field(default_factory=dict)
    pids_limit: int = 0
    #: On cgroup version 1 too, an out-of-memory kill ends all of a container, as kubelets since 1.28 have it on version 2.
    whole_container: bool = False
    host_network: bool = False
    #: Since 1.36 the API server hands WebSockets through to the kubelet, which then refuses by an HTTP status; before by a status frame.
    kubelet_websockets: bool = True
    #: What an exec's WebSocket is offered, best first.
    protocols: tuple[str, ...] = ("v5.channel.k8s.io", "v4.channel.k8s.io", "channel.k8s.io")
    bookmark_s: float = 60.0
    pull_backoff_s: float = 10.0
    #: How often the kubelet looks at volumes on its disk.
    eviction_s: float = 10.0
    continue_s: float = 300.0

    def set(self, **values: Any) -> None:
        """Raises AttributeError for a knob that is not there."""
        for name, value in values.items():
            if not hasattr(self, name):
                raise AttributeError(name)
            setattr(self, name, tuple(value) if name == "protocols" else value)
