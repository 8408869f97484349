"""The command line's own logic: paths of cp, the table of ls, live output, options."""

from __future__ import annotations

import io
import json

import click
import pytest
from rich.console import Console

from cifixer_exec.cli import listing
from cifixer_exec.cli.copying import Side, parse_copy, parse_side
from cifixer_exec.cli.listing import Row
from cifixer_exec.cli.live import LiveOutput
from cifixer_exec.cli.options import parse_env
from cifixer_exec.cli.program import outcome
from cifixer_exec.errors import InvalidRequestError
from cifixer_exec.model import OutputChunk, Stream


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("sb-1:src/a.py", Side("sb-1", "src/a.py")),
        ("sb-1:", Side("sb-1", ".")),
        ("sb-1:/tmp/a:b", Side("sb-1", "/tmp/a:b")),
        ("./a:b", Side(None, "./a:b")),
        ("dir/a:b", Side(None, "dir/a:b")),
        ("/abs", Side(None, "/abs")),
        ("plain", Side(None, "plain")),
        (":x", Side(None, ":x")),
        ("-x:y", Side(None, "-x:y")),
    ],
)
def test_parse_side(text: str, side: Side) -> None:
    assert parse_side(text) == side


@pytest.mark.parametrize(("source", "destination"), [("a", "b"), ("sb-1:a", "sb-2:b"), ("./a:b", "/c:d")])
def test_exactly_one_side_is_in_a_sandbox(source: str, destination: str) -> None:
    with pytest.raises(InvalidRequestError, match="exactly one side"):
        parse_copy(source, destination)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0s"), (0.9, "0s"), (59.9, "59s"), (60, "1m00s"), (3599, "59m59s"), (7500, "2h05m"), (100_000, "1d03h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert listing.duration(seconds) == text


def rows() -> list[Row]:
    """Two sandboxes."""
    ready = Row(id="sb-" + "a" * 90, backend="local", state="ready", owner="w@h", created_s=1000, expires_s=4600)
    return [ready, Row(id="sb-b", backend="local", state="creating", owner="", created_s=900, expires_s=990)]


def test_table_has_a_line_per_sandbox_and_whole_ids() -> None:
    console = Console(file=io.StringIO(), width=200, highlight=False)

    console.print(listing.make_table(rows(), now_s=1060))

    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["sb-" + "a" * 90, "local", "ready", "w@h", "1m00s", "in", "59m00s"]
    assert lines[2].split() == ["sb-b", "local", "creating", "-", "2m40s", "over"]


def test_json_of_no_sandboxes_is_an_empty_list(capsys: pytest.CaptureFixture[str]) -> None:
    listing.show_rows([], as_json=True)
    assert json.loads(capsys.readouterr().out) == []


def test_live_output_passes_bytes_and_tells_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    write = LiveOutput(out, err)

    write(OutputChunk(stream=Stream.STDOUT, offset=0, data=b"\xff\0"))
    write(OutputChunk(stream=Stream.STDERR, offset=0, data=b"e"))
    write(OutputChunk(stream=Stream.STDOUT, offset=12, data=b"tail"))

    assert (out.getvalue(), err.getvalue()) == (b"\xff\0tail", b"e")
    assert "10 bytes of stdout" in capsys.readouterr().err


def test_env_pairs() -> None:
    assert parse_env(("A=1", "B=x=y", "C=")) == {"A": "1", "B": "x=y", "C": ""}
    for wrong in ("novalue", "=x"):
        with pytest.raises(click.BadParameter):
            parse_env((wrong,))


@pytest.mark.parametrize("arguments", [["nosuch"], ["run"], ["ls", "--nosuch"], ["up", "--port-flower", "0"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "-h"]])
def test_help_ends_with_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(arguments) == 0
    assert capsys.readouterr().out
