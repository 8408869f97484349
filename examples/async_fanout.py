"""Several sandboxes at once with the async API: the same tests under different hash seeds, one sandbox each.

``.venv/bin/python examples/async_fanout.py [N]``; starts a stack of its own and ends by itself.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from cifixer_exec import AppConfig, ExecResult, create_async_sandbox
from cifixer_exec.stack import EmbeddedStack

PROJECT = Path(__file__).resolve().parent / "broken-project"
TESTS = ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider"]


async def try_seed(config: AppConfig, seed: int) -> ExecResult:
    """Upload the project into a sandbox of its own, repair it there, and run its tests."""
    async with create_async_sandbox(config) as sandbox:
        await sandbox.upload(PROJECT)
        await sandbox.write_file("/tmp/fix.patch", (PROJECT.parent / "fix.patch").read_bytes())
        await sandbox.run_command("git apply /tmp/fix.patch || patch -p1 -i /tmp/fix.patch")
        return await sandbox.run_command(TESTS, env={"PYTHONHASHSEED": str(seed)}, timeout_s=120)


async def fan_out(config: AppConfig, count: int) -> int:
    """All at once; how many failed."""
    began = time.monotonic()
    results = await asyncio.gather(*(try_seed(config, seed) for seed in range(1, count + 1)))
    for seed, result in enumerate(results, start=1):
        last = result.text.strip().splitlines()[-1] if result.text.strip() else result.cause
        print(f"seed {seed}: exit code {result.exit_code}, {last}")
    print(f"{count} sandboxes, {sum(r.duration_s for r in results):.1f} s of tests in {time.monotonic() - began:.1f} s")
    return sum(not r.ok for r in results)


def main() -> int:
    """0 if the tests passed under every seed and nothing is left."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    stack = EmbeddedStack()
    with stack:
        failed = asyncio.run(fan_out(stack.config, count))
    print(f"left behind: {stack.stop()}")
    return 0 if failed == 0 and stack.stop().nothing else 1


if __name__ == "__main__":
    sys.exit(main())
