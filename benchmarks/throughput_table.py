"""The tables at the end of the decoding benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.decode_timing import Case
from benchmarks.report import console, fixed, machine_line, make_table, significant

_MIB = 2**20

Record = dict[str, Any]


TARGETS = {
    ("qwen", "arithmetic", 1): (
        ("ours-speculative", "naive", 2.5),
        ("ours-speculative", "base-only", 1.3),
        ("ours-shared-pair", "ours", 1.2),
    ),
    ("shipped", "text", 1): (("ours-speculative", "ours", 0.95),),
    ("shipped", "arithmetic", 1): (("ours-speculative", "ours", 0.95),),
}
"""Trio, kind of prompts and batch size -> tokens/s of a provider over another's, at least."""


def print_verdicts(records: Sequence[Record], trio: str, prompts: str) -> None:
    """Which targets are met, of those that a case has and whose providers ran."""
    for record in records:
        for provider, other, least in TARGETS.get((trio, prompts, record["batch_size"]), ()):
            over = record["speed_over"].get(other)
            if record["provider"] != provider or over is None:
                continue
            verdict = "met" if over["median"] >= least else "missed"
            behind = record["token_speed_over"][other]["median"]
            case = Case(record["batch_size"], record["prompt_length"], record["output_length"])
            console.print(
                f"{case}: {provider} has {over['median']:.2f} times {other}'s tokens/s "
                f"({over['p10']:.2f} to {over['p90']:.2f}), target {least:g}: {verdict}; "
                f"behind the prompt {behind:.2f} times.",
                soft_wrap=True,
            )


def print_tables(records: Sequence[Record], title: str) -> None:
    """Speed, then what speculation and memory came to."""
    columns = (
        "provider", "tok\n/s", "x\nnaive", "x\nbase", "first\nms", "token\nms",
        "p50\nms", "p95\nms", "/\nfwds",
    )  # fmt: skip
    caption = (
        "x: tokens/s over those of naive and of base-only, paired by repeat. token ms: mean time "
        "per output token after the first. p50, p95: times between what a row's caller gets, which "
        "may be several tokens. / fwds: token ms over the sum of the bare forwards of "
        f"all roles, measured alone in the same run. Medians over repeats. {machine_line()}"
    )
    table = make_table(title, columns, caption)

    def heading(record: Record, case: Case) -> None:
        forwards = significant(record["bare_forwards_ms"]["sum"])
        table.add_row(f"[bold]{case}")
        table.add_row("bare forwards", "", "", "", "", forwards, "", "", "1.00")

    def row(record: Record) -> None:
        over = {name: s["median"] for name, s in record["speed_over"].items()}
        table.add_row(
            record["provider"],
            significant(record["tokens_per_second"]["median"]),
            fixed(over.get("naive")),
            fixed(over.get("base-only")),
            significant(record["first_token_ms"]["median"]),
            significant(record["token_ms"]["median"]),
            significant(record["arrival_ms"]["p50"]),
            significant(record["arrival_ms"]["p95"]),
            fixed(record["token_over_forwards"]["median"]),
        )

    _by_case(table, records, heading, row)
    console.print(table)
    _print_counts(records)


def _print_counts(records: Sequence[Record]) -> None:
    columns = ("provider", "accepted", "tokens a base\nforward", "peak\nMiB", "extra\nMiB")
    caption = (
        "accepted: share of the drafts that were kept. tokens a base forward: of one row, behind "
        "the first. peak: of the process; extra: above what it held with the weights loaded."
    )
    table = make_table("Drafts and memory", columns, caption)

    def row(record: Record) -> None:
        peak = record.get("peak_memory")
        table.add_row(
            record["provider"],
            "-" if record["acceptance"] is None else f"{record['acceptance']:.1%}",
            fixed(record["tokens_per_base_forward"]),
            fixed(peak and peak["total_bytes"] / _MIB, 0),
            fixed(peak and peak["extra_bytes"] / _MIB, 1),
        )

    _by_case(table, records, lambda record, case: table.add_row(f"[bold]{case}"), row)
    console.print(table)


def _by_case(
    table: Any,
    records: Sequence[Record],
    heading: Callable[[Record, Case], None],
    row: Callable[[Record], None],
) -> None:
    """Add all rows, with a heading in front of each case's."""
    previous = None
    for record in records:
        case = Case(record["batch_size"], record["prompt_length"], record["output_length"])
        if case != previous:
            table.add_section()
            heading(record, case)
            previous = case
        row(record)
