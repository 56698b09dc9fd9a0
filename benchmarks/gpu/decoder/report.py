"""A run's records as a table and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.gpu.decoder.modes import BASE_ONLY, OURS
from benchmarks.gpu.decoder.targets import PAPER
from benchmarks.gpu.report import where
from benchmarks.gpu.targets import Verdict
from benchmarks.report import console, fixed, make_table, significant

Record = Mapping[str, Any]

COLUMNS = (
    "mode", "\nms", "\nGB", "x\nbytes", "x base\nonly", "naive\nover it", "pays\nfrom",
    "beats base\nfrom",
)  # fmt: skip


def cells(record: Record) -> list[str]:
    """One mode's cells, in the order of :data:`COLUMNS`."""
    read = record["step_bytes"]
    return [
        record["mode"],
        significant(record["step_ms"]["median"]),
        fixed(read and read / 1e9, 1),
        *(
            _median(record[field])
            for field in ("step_over_floor", "step_over_base_only", "naive_over_step")
        ),
        *(_acceptance(record["break_even"], name) for name in (OURS, BASE_ONLY)),
    ]


def rows(group: Sequence[Record]) -> list[list[str]]:
    """The table's rows of modes measured together; the paper's ratio below them at batch 1."""
    paper = PAPER.get(group[0]["trio"]) if group[0]["batch_size"] == 1 else None
    last = [] if paper is None else [["the paper", "", "", "", fixed(paper), "", "", ""]]
    return [*(cells(record) for record in group), *last]


def _median(summary: Mapping[str, float] | None) -> str:
    return fixed(None if summary is None else summary["median"])


def _acceptance(found: Mapping[str, float | None] | None, name: str) -> str:
    if found is None or name not in found:
        return "-"
    share = found[name]
    return "never" if share is None else f"{share:.0%}"


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


def print_modes(records: Sequence[Record], device: Mapping[str, Any], copy_rate: float) -> None:
    """Table of all modes."""
    text = f"{caption(copy_rate)} {where(device)}"
    table = make_table("The decoder on a GPU, random weights", COLUMNS, text)
    for heading, group in groups(records):
        table.add_section()
        table.add_row(f"[bold]{heading}")
        for row in rows(group):
            table.add_row(*row)
    console.print(table)


def groups(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Modes measured together, under what they were measured on."""

    def heading(r: Record) -> str:
        return f"{r['title']}, batch {r['batch_size']}"

    return [(title, list(group)) for title, group in groupby(records, heading)]


def weights_line(record: Record) -> str:
    """One sentence: bytes of weights by role."""
    sizes = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in record["bytes"].items())
    return f"{record['title']}: weights of {sizes}."


def markdown(
    weights: Sequence[Record],
    records: Sequence[Record],
    device: Mapping[str, Any],
    copy_rate: float,
    verdicts: Sequence[Verdict],
) -> str:
    """The same table, and the verdicts, for a document."""
    lines = [f"`python -m benchmarks.gpu --decoder` on {where(device)}. {caption(copy_rate)}", ""]
    lines += [*(f"- {weights_line(record)}" for record in weights), ""]
    for heading, group in groups(records):
        heads = (" ".join(column.split()) for column in COLUMNS)
        lines += [f"**{heading}**", "", f"| {' | '.join(heads)} |"]
        lines.append(f"| {' | '.join('---' for _ in COLUMNS)} |")
        lines += [f"| {' | '.join(row)} |" for row in rows(group)]
        lines.append("")
    lines += [*(f"- {verdict}" for verdict in verdicts), ""]
    return "\n".join(lines)
