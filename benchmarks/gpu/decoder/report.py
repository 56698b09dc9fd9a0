"""A run's records as a table, as Markdown, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.gpu.session import Record, cells, markdown_table
from benchmarks.harness.report import Column, decimals, fixed, print_table, significant

PAPER = {"13b": 2.4, "70b": 1.5}
"""Proxy-tuned over tuned model, per token, by trio: Liu et al. 2024, arXiv 2401.08565. A tuned
model of the base's size costs what the base alone costs."""


def _acceptance(found: float | str) -> str:
    return found if isinstance(found, str) else f"{found:.0%}"


COLUMNS: tuple[Column, ...] = (
    ("mode", "mode", str),
    ("\nms", "step_ms/median", significant),
    ("\nGB", "step_bytes", decimals(1, 1e-9)),
    ("x\nbytes", "step_over_floor/median", fixed),
    ("x base\nonly", "step_over_base_only/median", fixed),
    ("naive\nover it", "naive_over_step/median", fixed),
    ("pays\nfrom", "break_even/ours", _acceptance),
    ("beats base\nfrom", "break_even/base-only", _acceptance),
)


def groups(records: Sequence[Record]) -> list[tuple[str, list[list[str]]]]:
    """Rows of modes measured together, under what they were measured on.

    The paper's ratio stands below them at batch 1.
    """
    found = []
    for (trio, title, batch_size), group in groupby(
        records, lambda r: (r["trio"], r["title"], r["batch_size"])
    ):
        rows = [cells(record, COLUMNS) for record in group]
        if batch_size == 1 and trio in PAPER:
            rows.append(["the paper", "", "", "", fixed(PAPER[trio]), "", "", ""])
        found.append((f"{title}, batch {batch_size}", rows))
    return found


def caption(copy_rate: float) -> str:
    """What the columns mean."""
    return (
        "ms: median time of a step in the caller's hands, of a round where it speculates. GB: "
        "weights that a step reads. x bytes: time over what they take at the "
        f"{copy_rate / 1e9:,.0f} GB/s, read and written, of a device-to-device copy in this run. "
        "x base only: over the base alone. naive over it: how much longer the naive loop takes. "
        "pays from, beats base from: the share of drafts accepted from which rounds are faster "
        "than plain steps of ours, and than the base alone. the paper: proxy-tuned over tuned "
        "model, whose cost is the base's (Liu et al. 2024)."
    )


def print_modes(records: Sequence[Record], copy_rate: float, where: str) -> None:
    """Table of all modes."""
    rows = [(heading, row) for heading, group in groups(records) for row in group]
    title = "The decoder on a GPU, random weights"
    headings = [heading for heading, *_ in COLUMNS]
    print_table(title, headings, f"{caption(copy_rate)} {where}", rows)


def weights_line(record: Record) -> str:
    """One sentence: bytes of weights by role."""
    sizes = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in record["bytes"].items())
    return f"{record['title']}: weights of {sizes}."


def markdown(
    weights: Sequence[Record],
    records: Sequence[Record],
    copy_rate: float,
    where: str,
) -> str:
    """The same table for a document."""
    lines = [f"`python -m benchmarks.gpu --decoder` on {where}. {caption(copy_rate)}", ""]
    lines += [*(f"- {weights_line(record)}" for record in weights), ""]
    columns = [" ".join(heading.split()) for heading, *_ in COLUMNS]
    for heading, rows in groups(records):
        lines += [f"**{heading}**", "", *markdown_table(columns, rows), ""]
    return "\n".join(lines)


def draw(records: Sequence[Record], path: Path, title: str) -> None:
    """Milliseconds of a plain step of each mode at batch 1, and what its bytes take; by trio."""
    from benchmarks.harness.plots import panels

    alone = [r for r in records if r["batch_size"] == 1 and not r["drafts"]]
    trios = list(dict.fromkeys(r["title"] for r in alone))
    with panels(path, len(trios), 1, (9, 0.8 + 3.4 * len(trios)), title) as (_, grid):
        for [axes], trio in zip(grid, trios, strict=True):
            own = [r for r in alone if r["title"] == trio]
            names = [r["mode"] for r in own]
            axes.barh(names, [r["step_ms"]["median"] for r in own], color="#D55E00")
            axes.barh(names, [r["floor_ms"] for r in own], fill=False, edgecolor="#000000")
            axes.invert_yaxis()
            axes.set(title=f"{trio}, batch 1", xlabel="ms a step (framed: bytes / copy bandwidth)")
