"""The CI-fix story, whole: a stack of its own, a failing project, a patch, a passing project, and nothing left behind.

``make run`` or ``.venv/bin/python examples/repair.py [--flower] [--output DIR]``. Ends by itself, with 0 if all of it went well.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from cifixer_exec import ExecResult, ExecutorError, OutputChunk, SandboxEnvironment, create_sandbox
from cifixer_exec.stack import EmbeddedStack

HERE = Path(__file__).resolve().parent
TESTS = "python3 -m pytest -q -p no:cacheprovider --junitxml=report.xml"
FLOWER_PORT = 5555
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Tell the story; 0 if the project was repaired and nothing is left."""
    options = parse_options()
    with output_directory(options.output) as output:
        stack = EmbeddedStack(flower_port=FLOWER_PORT if options.flower else 0)
        try:
            rows, repaired = tell(stack, output)
        finally:
            leftovers = stack.stop()
        rows.append(("left behind", str(leftovers)))
        summary(rows)
    return 0 if repaired and leftovers.nothing else 1


def tell(stack: EmbeddedStack, output: Path) -> tuple[list[tuple[str, str]], bool]:
    """All but the end: returns what to sum up, and whether the project was repaired."""
    say("start Redis, a worker and beat")
    stack.start()
    if stack.flower_port:
        say(f"Flower: http://127.0.0.1:{stack.flower_port}/ user cifixer, password {stack.flower_password}")
    say("make a sandbox, upload the broken project")
    with create_sandbox(stack.config) as sandbox:
        sandbox.upload(HERE / "broken-project", exclude=["__pycache__", ".pytest_cache"])
        before = run(sandbox, TESTS)
        repair(sandbox)
        after = run(sandbox, TESTS)
        say("download the diff and the JUnit report")
        sandbox.download("/tmp/repair.diff", output / "repair.diff")
        sandbox.download("report.xml", output / "report.xml")
        say(f"tear down sandbox {sandbox.sandbox_id}")
    files = ", ".join(f"{p.name} ({p.stat().st_size} bytes)" for p in sorted(output.iterdir()))
    rows = [
        ("tests before", outcome(before)),
        ("tests after", outcome(after)),
        ("JUnit report", counts(output / "report.xml")),
        ("downloaded", files),
    ]
    return rows, before.exit_code == 1 and after.ok


def repair(sandbox: SandboxEnvironment) -> None:
    """What the agent found out: a patch. The diff that is delivered is taken from the sandbox, from what the tests really ran on."""
    sandbox.write_file("/tmp/fix.patch", (HERE / "fix.patch").read_text())
    run(sandbox, "mkdir /tmp/a /tmp/b && cp -r src /tmp/a", check=True)
    run(sandbox, "git apply -v /tmp/fix.patch || patch -p1 -i /tmp/fix.patch", check=True)
    run(sandbox, "cp -r src /tmp/b && cd /tmp && diff -ru -x __pycache__ a b > repair.diff; test $? -eq 1 && cat repair.diff", check=True)


def run(sandbox: SandboxEnvironment, command: str, *, check: bool = False) -> ExecResult:
    """Run a command with its output shown as it comes."""
    say(f"$ {command}")
    result = sandbox.run_command(command, timeout_s=120, on_output=show)
    if check and not result.ok:
        raise ExecutorError(f"{command!r} should have worked: {outcome(result)}")
    return result


def show(chunk: OutputChunk) -> None:
    """As the bytes come, so that nothing is changed by a decoder."""
    sys.stdout.buffer.write(chunk.data)
    sys.stdout.buffer.flush()


def say(text: str) -> None:
    """A step of the story."""
    console.print(f"▸ {text}", style="bold cyan", markup=False)


def outcome(result: ExecResult) -> str:
    """In words."""
    code = f"exit code {result.exit_code}" if result.exit_code is not None else f"{result.status} ({result.cause})"
    return f"{code} after {result.duration_s:.2f} s"


def counts(report: Path) -> str:
    """What a JUnit report counts."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    return ", ".join(f"{suite.get(name)} {name}" for name in ("tests", "failures", "errors"))


def summary(rows: list[tuple[str, str]]) -> None:
    """The table at the end."""
    table = Table(title="repaired in a sandbox", show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def output_directory(chosen: Path | None) -> Iterator[Path]:
    """The chosen directory, or one that is removed when the summary has told what was in it."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="cifixer-repair-") as made:
        yield Path(made)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Repair a broken project in a sandbox.")
    parser.add_argument("--flower", action="store_true", help=f"show what happens on http://127.0.0.1:{FLOWER_PORT}/")
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep the diff and the JUnit report there")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ExecutorError as error:
        sys.exit(f"repair: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
