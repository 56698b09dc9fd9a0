"""A run's records as a table, as Markdown for the README, and as sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.environment import environment
from benchmarks.gpu.cases import (
    COMPILED,
    CUDA,
    EAGER,
    FLASHINFER,
    MAIN_VOCAB_SIZE,
    OURS,
    PROVIDERS,
    SAMPLE,
    TRANSFORMERS,
)
from benchmarks.gpu.targets import Verdict
from benchmarks.gpu.timing import COLD, WARM
from benchmarks.report import console, fixed, make_table, significant

Record = Mapping[str, Any]

PEERS = tuple(name for name in PROVIDERS if name != OURS)
_OWN_COLUMNS = ("us", "warm", "GB/s", "copy")
_SHORT = {CUDA: "CUDA", EAGER: "eager", COMPILED: "compile", TRANSFORMERS: "HF", FLASHINFER: "FI"}
_LAUNCHED = "*"  # behind what was launched call by call


@dataclass(frozen=True)
class Row:
    """One case: ours, and the peers' times over ours."""

    case: tuple[Any, ...]
    """op, kind, filters, vocab_size, batch_size, positions."""
    records: Mapping[tuple[str, str], Record]
    """By provider and mode."""

    def cells(self) -> list[str]:
        """us cold, us warm, GB/s, share of copy bandwidth, then the peers."""
        cold, warm = (self.records.get((OURS, mode)) for mode in (COLD, WARM))
        return [
            _cell(cold, lambda r: significant(r["microseconds"]["median"])),
            _cell(warm, lambda r: significant(r["microseconds"]["median"])),
            _cell(cold, lambda r: fixed(r["gigabytes_per_second"], 0)),
            _cell(cold, lambda r: fixed(100 * r["share_of_copy"], 1, "%")),
            *(_cell(self.records.get((peer, COLD)), _ratio) for peer in PEERS),
        ]


def _cell(record: Record | None, text: Callable[[Record], str]) -> str:
    return "-" if record is None else text(record)


def _ratio(record: Record) -> str:
    ratio = record["time_over_ours"]
    mark = "" if record["graph"] else _LAUNCHED
    return significant(ratio and ratio["median"], mark)


def rows(records: Sequence[Record]) -> list[Row]:
    """Cases in the order they were first timed."""
    keys = ("op", "kind", "filters", "vocab_size", "batch_size", "positions")
    found: dict[tuple[Any, ...], dict[tuple[str, str], Record]] = {}
    for r in records:
        if "provider" in r:
            case = found.setdefault(tuple(r[key] for key in keys), {})
            case.setdefault((r["provider"], r["mode"]), r)  # ours may be timed again beside others
    return [Row(case, own) for case, own in found.items()]


def where(device: Mapping[str, Any]) -> str:
    """One line that says where the numbers come from."""
    e = {**environment(), **device}
    revision = "no git revision" if e["revision"] is None else e["revision"][:10]
    if e["dirty"]:
        revision += " with local changes"
    return (
        f"{e['device_name']}, driver {e.get('driver')}, torch {e['torch']}, triton {e['triton']}, "
        f"{revision}"
    )


def print_times(records: Sequence[Record], device: Mapping[str, Any], copy_rate: float) -> None:
    """Table of all cases."""
    caption = (
        "us: median of a call of ours in graph replay, no input in L2 (warm: all of it). GB/s: the "
        "three roles' logits counted once (sample_hidden: the heads' weights). copy: that over the "
        f"{copy_rate / 1e9:,.0f} GB/s, read and written, of a device-to-device copy in this run. "
        "The others: a provider's time over ours (CUDA: our CUDA C++ kernels, HF: "
        "transformers' warpers, FI: FlashInfer). "
        f"{_LAUNCHED}: not capturable, launched call by call. {where(device)}"
    )
    columns = ("case", *_OWN_COLUMNS, *(_SHORT[peer] for peer in PEERS))
    table = make_table("The operators on a GPU, bf16", columns, caption)
    group = None
    for row in rows(records):
        op, kind, filters, vocab_size, batch_size, positions = row.case
        if (op, kind, vocab_size) != group:
            group = (op, kind, vocab_size)
            table.add_section()
            table.add_row(f"[bold]{op}")
            table.add_row(f"[bold]{kind}, V={vocab_size:,}")
        shape = f"B={batch_size}" + (f" x {positions}" if positions > 1 else "")
        table.add_row(f"{shape} {filters}", *row.cells())
    console.print(table)


def markdown(
    records: Sequence[Record],
    device: Mapping[str, Any],
    copy_rate: float,
    verdicts: Sequence[Verdict],
) -> str:
    """The main vocabulary's ``sample`` on peaked logits, and the verdicts, for the README."""
    own = ("us", "us, warm", "GB/s", "of copy bandwidth")
    heads = ("batch, filters", *own, *(f"x {peer}" for peer in PEERS))
    lines = [
        f"`python -m benchmarks.gpu` on {where(device)}; a device-to-device copy moves "
        f"{copy_rate / 1e9:,.0f} GB/s. `sample`, bf16, V = {MAIN_VOCAB_SIZE:,}, logits like a real "
        "model's:",
        "",
        "| " + " | ".join(heads) + " |",
        "| " + " | ".join("---" for _ in heads) + " |",
    ]
    main = [row for row in rows(records) if row.case[:2] == (SAMPLE, "peaked")]
    for row in sorted(main, key=lambda row: (row.case[4], row.case[2])):
        _, _, filters, vocab_size, batch_size, _ = row.case
        if vocab_size == MAIN_VOCAB_SIZE:
            lines.append("| " + " | ".join((f"{batch_size}, {filters}", *row.cells())) + " |")
    lines += ["", *(f"- {verdict}" for verdict in verdicts), ""]
    return "\n".join(lines)
