import json
import shlex

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import report, roofline
from benchmarks.environment import REPOSITORY


@pytest.fixture
def command(monkeypatch):
    app = typer.Typer()
    app.command()(roofline.main)
    monkeypatch.setattr(report.console, "_width", 80)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_command(command, tmp_path):
    output = tmp_path / "out.jsonl"
    result = command(
        "--gpu", "h100,l40s", "--batch", "1,64", "--filters", "none,top_p,top_k+top_p",
        "--kinds", "peaked,flat", "--ops", "sample,combine,score", "--terms", "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "…" not in result.output  # nothing cut off at 80 columns
    assert result.output.count("nothing here is measured") >= 6
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 2 * 2 * (6 * 7 + 3 + 4)
    for record in records:
        assert record["measured"] is False
        assert record["environment"]["device"] == "model"
        assert record["benchmark"] == "roofline"
        us = record["microseconds"]
        assert us["floor"] == max(us["bytes"], us["latency"])
    [ours_64] = [
        r for r in records
        if (r["algorithm"], r["op"], r["rows"], r["filters"], r["kind"], r["gpu"]["name"])
        == ("ours", "sample", 64, "top_p", "peaked", "h100")
    ]  # fmt: skip
    assert 6 < ours_64["bytes_per_entry"] < 6.5
    assert ours_64["bound"] == "bytes"
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_command_counts(command):
    result = command("--vocab", 20_000, "--batch", 1, "--count")
    assert result.exit_code == 0, result.output
    assert "15 ops, 120.0 B  15 ops, 120.0 B" in result.output


def test_bandwidth_in_place_of_the_data_sheets(command):
    assert "1.5 TB/s (data sheet)" not in command("--bandwidth", 1.5).output
    assert "1.5 TB/s (--bandwidth)" in command("--bandwidth", 1.5).output
    assert "3.35 TB/s (data sheet)" in command().output


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--gpu", "mi300", "among h100"),
        ("--batch", "0", "from 1 to"),
        ("--batch", "1,many", "'many'"),
        ("--batch", "", "from 1 to"),
        ("--vocab", "1000", "from 20,000"),
        ("--vocab", "600000", "524,288"),
        ("--dtype", "int8", "among bf16"),
        ("--filters", "min_p", "among none"),
        ("--kinds", "round", "among peaked"),
        ("--ops", "verify", "among sample"),
        ("--bandwidth", "0", "at least 0.001"),
        ("--bandwidth", "nan", "at least 0.001"),
        ("--launch-us", "-1", "at least 0"),
        ("--trip-us", "inf", "at least 0"),
    ],
)
def test_wrong_options_are_named(command, option, value, wanted):
    result = command(option, value)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert f"{option} must" in said
    assert wanted in said


def printed() -> list[tuple[str, str]]:
    """Commands in docs/roofline.md with what it says that they print."""
    fences = (REPOSITORY / "docs" / "roofline.md").read_text().split("```")[1::2]
    shells = [fence.removeprefix("text\n$ ") for fence in fences if fence.startswith("text\n$ ")]
    return [tuple(shell.split("\n", 1)) for shell in shells]  # type: ignore[misc]


@pytest.mark.parametrize(("line", "said"), printed(), ids=lambda text: text.splitlines()[0])
def test_the_document_has_what_the_command_prints(command, line, said):
    prefix = "python -m benchmarks.roofline"
    assert line.startswith(prefix)
    result = command(*shlex.split(line.removeprefix(prefix)))
    got = [text.rstrip() for text in result.output.splitlines() if text.strip()]
    assert [text.rstrip() for text in said.splitlines() if text.strip()] == got


def test_the_document_has_commands():
    assert len(printed()) >= 3
