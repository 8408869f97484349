"""What a run counted and found."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.plan import ADOPTION_BOUND_S, Options


@dataclass
class Report:
    """Filled by everyone; printed at the end. ``lost``, ``doubled``, ``hung`` and ``findings`` are violations, each a line."""

    options: Options
    began: float = field(default_factory=time.monotonic)
    duration_s: float = 0.0
    ops: int = 0
    commands: int = 0
    sandboxes: int = 0
    adoptions: int = 0
    owner_changes: int = 0
    retries: int = 0
    redis_restarts: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    pauses: Counter[str] = field(default_factory=Counter)
    terms: int = 0
    cuts: Counter[str] = field(default_factory=Counter)
    bells: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    #: What the platform did for it, by its own account.
    platform: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    #: The same, where a worker was there that nothing disturbed from the death to the adoption.
    calm_latencies_s: list[float] = field(default_factory=list)
    #: Those that took more than twice the bound: no violation by themselves, but each should have a fault to blame.
    slow_adoptions: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        """Workers that died by SIGKILL."""
        return self.kills.total()

    @property
    def violations(self) -> list[str]:
        """Everything that must not be."""
        named = {"lost": self.lost, "doubled": self.doubled, "hung": self.hung, "finding": self.findings}
        return [f"{name}: {text}" for name, texts in named.items() for text in texts]

    def progress(self) -> str:
        """One line."""
        return (
            f"{time.monotonic() - self.began:6.0f} s  sandboxes {self.sandboxes}  commands {self.commands}  kills {self.killed}"
            f"  pauses {self.pauses.total()}  cuts {self.cuts.total()}  violations {len(self.violations)}"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "backend": self.options.backend,
            "seed": self.options.seed,
            "duration_s": round(self.duration_s, 1),
            "ops": self.ops,
            "commands": self.commands,
            "sandboxes": self.sandboxes,
            "kills": self.killed,
            "kills_by_kind": dict(self.kills),
            "kills_by_point": dict(sorted(self.points.items())),
            "terms": self.terms,
            "pauses": dict(self.pauses),
            "cuts": dict(self.cuts),
            "doorbells": dict(self.bells),
            "redis_restarts": self.redis_restarts,
            "shapes": dict(self.shapes),
            "adoptions": self.adoptions,
            "owner_changes": self.owner_changes,
            "adoption_s": _percentiles(self.latencies_s),
            "calm_adoption_s": {**_percentiles(self.calm_latencies_s), "bound": ADOPTION_BOUND_S},
            "slow_adoptions": self.slow_adoptions,
            "retries": self.retries,
            "notes": dict(self.notes),
            "platform": dict(self.platform),
            "lost": len(self.lost),
            "doubled": len(self.doubled),
            "hung": len(self.hung),
            "findings": len(self.findings),
            "violations": self.violations,
        }

    def table(self) -> str:
        """For people."""
        rows = []
        for name, value in self.to_json().items():
            if isinstance(value, list):
                continue
            text = "  ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            rows.append(f"  {name.replace('_', ' '):<16} {text}")
        rows += [f"  slow: {text}" for text in self.slow_adoptions]
        rows += [f"  ! {text}" for text in self.violations]
        return "\n".join(rows)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n")


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    p50, p99 = (round(ordered[min(len(ordered) - 1, int(len(ordered) * p))], 2) for p in (0.5, 0.99))
    return {"count": len(values), "p50": p50, "p99": p99, "max": round(ordered[-1], 2)}
