"""What a test can set about the service."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Knobs:
    """``templates`` are those that it knows; memory and processes are the limits of sandboxes that are made from now on."""

    templates: tuple[str, ...] = ("base", "code-interpreter-v1", "cifixer")
    #: The SDK asks for features by it, and before 0.5.2 there is no CloseStdin, no StreamInput.
    envd_version: str = "0.6.7"
    memory_bytes: int = 2 << 30
    #: Who is allowed the internet has this machine's network; without, nobody has.
    host_network: bool = True
    #: How long a create takes besides.
    create_s: float = 0.0
    max_processes: int = 2048
    #: Files beyond it have no space left. They are in the memory too, so it is the smaller one.
    disk_bytes: int = 1 << 30
    max_timeout_s: int = 3600
    #: Sandboxes that a team may have at once; 0: as many as it likes.
    concurrent: int = 0
    #: Creates of a team per second, in the long run and at once; 0: as many as it likes.
    create_per_s: float = 0.0
    create_burst: int = 1
    #: Whether a refusal for the rate says when to come again.
    retry_after: bool = True
    #: How long the end of a command is told to who connects after it.
    ended_kept_s: float = 30.0
    #: How streams of a killed sandbox end: ``error`` in order, or ``reset``.
    killed_streams: str = "error"

    def set(self, **values: Any) -> None:
        """Raises AttributeError for a knob that is not there."""
        for name, value in values.items():
            if not hasattr(self, name):
                raise AttributeError(name)
            setattr(self, name, tuple(value) if name == "templates" else value)

    def reset(self) -> None:
        """As in the beginning."""
        self.set(**asdict(Knobs()))


def streams_input(envd_version: str) -> bool:
    """Whether that envd has StreamInput and CloseStdin."""
    return tuple(int(part) for part in envd_version.split(".")) >= (0, 5, 2)
