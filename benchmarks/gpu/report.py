"""A run's records as a table, as Markdown for the README, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import BATCH_SIZES, MAIN_VOCAB_SIZE, PROVIDERS
from benchmarks.gpu.session import Record, cells, markdown_table
from benchmarks.harness.logits import FILTERS
from benchmarks.harness.report import Column, decimals, percent, print_table, significant

PEERS = {
    "cuda": "CUDA", "eager": "eager", "torch.compile": "compile", "transformers": "HF",
    "flashinfer": "FI",
}  # fmt: skip
"""All but ours in Triton, and the heads of their columns."""


def shape(r: Record) -> str:
    """A record's shape, for a sentence."""
    return f"{r['kind']} {r['filters']} V={r['vocab_size']:,} B={r['batch_size']}"


def samples(records: Iterable[Record], provider: str, mode: str) -> dict[str, Record]:
    """A provider's times of ``sample`` by shape; the first of each, as ours may have several."""
    first: dict[str, Record] = {}
    for r in records:
        if r["op"] == "sample" and r.get("provider") == provider and r["mode"] == mode:
            first.setdefault(shape(r), r)
    return first


_CASE = ("op", "kind", "filters", "vocab_size", "batch_size", "positions")


def _ratio(r: Record) -> str:
    """A provider's time over ours; a star is behind what was launched call by call."""
    if r["time_over_ours"] is None:
        return "-"
    return significant(r["time_over_ours"]["median"], "" if r["graph"] else "*")


COLUMNS: tuple[Column, ...] = (
    ("us", "ours/cold/microseconds/median", significant),
    ("us, warm", "ours/warm/microseconds/median", significant),
    ("GB/s", "ours/cold/gigabytes_per_second", decimals(0)),
    ("of copy bandwidth", "ours/cold/share_of_copy", percent),
    *((f"x {peer}", f"{peer}/cold", _ratio) for peer in PEERS),
)


def rows(records: Sequence[Record]) -> dict[tuple[Any, ...], list[str]]:
    """Cells by case (:data:`_CASE`), in the order they were first timed."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Record]]] = {}
    for r in records:
        case = found.setdefault(tuple(r[key] for key in _CASE), {})
        # ours may be timed again beside others
        case.setdefault(r["provider"], {}).setdefault(r["mode"], r)
    return {case: cells(own, COLUMNS) for case, own in found.items()}


def print_times(records: Sequence[Record], copy_rate: float, where: str) -> None:
    """Table of all cases."""
    caption = (
        "us: median of a call of ours in graph replay, no input in L2 (warm: all of it). GB/s: the "
        "three roles' logits counted once (sample_hidden: the heads' weights). copy: that over the "
        f"{copy_rate / 1e9:,.0f} GB/s, read and written, of a device-to-device copy in this run. "
        "The others: a provider's time over ours (CUDA: our CUDA C++ kernels, HF: "
        "transformers' warpers, FI: FlashInfer). *: not capturable, launched call by call. " + where
    )
    lines = []
    for (op, kind, filters, vocab_size, batch_size, positions), row in rows(records).items():
        size = f"B={batch_size}" + (f" x {positions}" if positions > 1 else "")
        lines.append((f"{op}, {kind}, V={vocab_size:,}", [f"{size} {filters}", *row]))
    columns = ("case", "us", "warm", "GB/s", "copy", *PEERS.values())
    print_table("The operators on a GPU, bf16", columns, caption, lines)


def markdown(records: Sequence[Record], copy_rate: float, where: str) -> str:
    """The main vocabulary's ``sample`` on peaked logits, for the README."""
    by_size = {
        (batch_size, filters): row
        for (op, kind, filters, vocab_size, batch_size, _), row in rows(records).items()
        if (op, kind, vocab_size) == ("sample", "peaked", MAIN_VOCAB_SIZE)
    }
    lines = [[f"{size}, {filters}", *row] for (size, filters), row in sorted(by_size.items())]
    intro = (
        f"`python -m benchmarks.gpu` on {where}; a device-to-device copy moves "
        f"{copy_rate / 1e9:,.0f} GB/s. `sample`, bf16, V = {MAIN_VOCAB_SIZE:,}, logits like a real "
        "model's:"
    )
    table = markdown_table(["batch, filters", *(heading for heading, *_ in COLUMNS)], lines)
    return "\n".join([intro, "", *table, ""])


def draw(records: Sequence[Record], path: Path, title: str) -> None:
    """Microseconds a call over the batch size, a panel for each filter, every provider.

    Peaked logits of the main vocabulary.
    """
    from benchmarks.harness.plots import panels

    with panels(path, 1, len(FILTERS), (11, 4.2), title, sharey=True) as (_, [grid]):
        for axes, filters in zip(grid, FILTERS, strict=True):
            for name in PROVIDERS:
                main = f"peaked {filters} V={MAIN_VOCAB_SIZE:,} B="
                found = samples(records, name, "cold")
                sizes = [size for size in BATCH_SIZES if f"{main}{size}" in found]
                times = [found[f"{main}{size}"]["microseconds"]["median"] for size in sizes]
                axes.plot(sizes, times, marker="o", label=name)
            axes.set(xscale="log", yscale="log", xlabel="batch size", title=filters)
            axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
        grid[0].set_ylabel("us per call (median, logits not in L2)")
        grid[0].legend(frameon=False, fontsize=8)
