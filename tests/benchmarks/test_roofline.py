"""benchmarks.roofline: the document has what the command prints, and wrong options are named."""

import shlex

import pytest

from benchmarks import roofline
from benchmarks.harness import report
from benchmarks.roofline import GPUS, Case, Kernel, floor

FENCES = (report.REPOSITORY / "docs" / "roofline.md").read_text().split("```")[1::2]
PRINTED = [tuple(f.removeprefix("text\n$ ").split("\n", 1)) for f in FENCES if "text\n$ " in f]


@pytest.mark.parametrize(("line", "said"), PRINTED, ids=lambda text: text.splitlines()[0])
def test_the_document_has_what_the_command_prints(run_command, monkeypatch, line, said):
    monkeypatch.setattr(report.console, "_width", 80)
    result = run_command(
        roofline.main, *shlex.split(line.removeprefix("python -m benchmarks.roofline"))
    )
    got = [text.rstrip() for text in result.output.splitlines() if text.strip()]
    assert [text.rstrip() for text in said.splitlines() if text.strip()] == got


def test_the_document_has_commands():
    assert len(PRINTED) >= 3


def test_floor_is_arithmetic():
    """A row of 100,000 entries on one SM, then 4 launches that move nothing."""
    gpu, case = GPUS["h100"], Case(rows=1, vocab_size=100_000)
    kernels = [Kernel("one block", 10, again=2, blocks=1, trips=2), Kernel("nothing", 0, 4)]
    found = floor(kernels, case, gpu)
    assert (found.bytes_per_entry, found.launches) == (12, 5)
    assert found.bytes_us == pytest.approx(1.2e6 / (64 * 1.98e3))
    assert found.latency_us == pytest.approx((1 + 2 * 0.5) + 4 * 1.5)
    assert found.floor_us == found.bytes_us == found.cached_floor_us


def test_bandwidth_in_place_of_the_data_sheets(run_command):
    assert "1.5 TB/s (--bandwidth)" in run_command(roofline.main, "--bandwidth", 1.5).output
    assert "3.35 TB/s (data sheet)" in run_command(roofline.main).output
    for option, value in (("--gpu", "mi300"), ("--vocab", "1000"), ("--bandwidth", "0")):
        result = run_command(roofline.main, option, value)
        assert result.exit_code == 2
        assert option in result.output
