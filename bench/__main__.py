"""`make bench`: starts embedded stacks, measures, prints tables of ratios and writes them below bench/results/."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench.docker_rows import docker_rows
from bench.kubernetes_rows import kubernetes_rows
from bench.local_rows import local_rows
from bench.rows import Row, machine, show

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Measure the backends that were asked for; each has a file of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("local", "docker", "kubernetes"), help="leave the other backends out")
    parser.add_argument("--sandboxes", type=int, default=200, help="how many live at once on one local worker")
    parser.add_argument("--containers", type=int, default=100, help="the same for Docker")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a directory")
    options = parser.parse_args()
    measured: list[tuple[str, str, Callable[[], list[Row]]]] = [
        ("local", "latest.json", lambda: local_rows(options.rounds, options.sandboxes)),
        ("docker", "docker.json", lambda: docker_rows(options.rounds, options.containers)),
        ("kubernetes", "kubernetes.json", lambda: kubernetes_rows(options.rounds)),
    ]
    for backend, name, measure in measured:
        if options.only in (None, backend):
            _write(backend, measure(), options.results / name)


def _write(backend: str, rows: list[Row], path: Path) -> None:
    show(backend, rows)
    if all(line["value"] is None for line in rows):
        Console().print(f"nothing was measured, so {os.path.relpath(path)} stays as it is")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    Console().print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
