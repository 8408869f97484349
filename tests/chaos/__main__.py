"""``python -m tests.chaos --kills 1000 --seed 1``: a bounded run of faults, and the account of it. Exit code 1 on any violation."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
from pathlib import Path

from cifixer_exec.backends.registry import backend_names
from tests.chaos.engine import run_chaos
from tests.chaos.plan import Options


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--backend", choices=backend_names(), default="local", help="where the sandboxes are")
    parser.add_argument("--kills", type=int, default=1000, help="end the faults after so many killed workers")
    parser.add_argument("--seed", type=int, default=1, help="the same seed draws the same faults and the same load")
    parser.add_argument("--seconds", type=float, default=3600.0, help="end the faults after so long at the latest")
    parser.add_argument("--json", type=Path, help="write the account there too")
    parser.add_argument("--no-files", action="store_true", help="leave file verbs out of the load")
    return parser.parse_args()


def main() -> int:
    """Run and tell."""
    asked = _parse()
    options = Options(
        backend=asked.backend,
        seed=asked.seed,
        kills=asked.kills,
        seconds=asked.seconds,
        files=not asked.no_files,
    )
    faulthandler.dump_traceback_later(options.seconds + 900, exit=True)  # whatever else fails: it ends
    logs = Path(tempfile.mkdtemp(prefix="chaos-logs-"))
    report = run_chaos(options, say=lambda line: print(line, flush=True), keep=logs)
    print(report.table())
    if asked.json is not None:
        report.write(asked.json)
    if report.violations:
        print(f"VIOLATIONS: the logs are in {logs}; again: {' '.join(['python -m tests.chaos', *sys.argv[1:]])} (seed {options.seed})")
        return 1
    logs.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
