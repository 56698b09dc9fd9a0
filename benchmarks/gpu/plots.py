"""Pictures of a run on a GPU; needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from benchmarks.gpu.cases import (
    BATCH_SIZES,
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
from benchmarks.gpu.report import Record
from benchmarks.gpu.timing import COLD
from benchmarks.op_cases import FILTERS, VOCAB_SIZES

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
_COLOURS = {
    OURS: "#D55E00",
    CUDA: "#000000",
    EAGER: "#56B4E9",
    COMPILED: "#0072B2",
    TRANSFORMERS: "#999999",
    FLASHINFER: "#009E73",
}
_VOCAB_COLOURS = dict(zip(VOCAB_SIZES, ("#56B4E9", "#D55E00", "#009E73"), strict=True))
_KIND_LINES = {"peaked": "-", "flat": ":"}


def plot_times(records: Sequence[Record], path: Path, title: str) -> None:
    """Microseconds of a call over the batch size, a panel for each filter, every provider.

    Args:
        records: of a run; peaked logits of the main vocabulary are shown.
        path: of the PNG.
        title: above the panels.
    """
    figure, panels = _figure(title)
    for axes, filters in zip(panels, FILTERS, strict=True):
        for name in PROVIDERS:
            points = _points(records, name, filters, MAIN_VOCAB_SIZE, "peaked", "microseconds")
            axes.plot(*points, marker="o", color=_COLOURS[name], label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_title(f"{filters}, V = {MAIN_VOCAB_SIZE:,}", fontsize=9)
    panels[0].set_ylabel("us per call (median, logits not in L2)")
    _legend(figure, panels[0])
    figure.savefig(path, dpi=150)


def plot_bandwidth(records: Sequence[Record], path: Path, title: str) -> None:
    """Ours: share of copy bandwidth over the batch size, by vocabulary and kind of logits.

    Args:
        records: of a run.
        path: of the PNG.
        title: above the panels.
    """
    figure, panels = _figure(title)
    for axes, filters in zip(panels, FILTERS, strict=True):
        for vocab_size, colour in _VOCAB_COLOURS.items():
            for kind, line in _KIND_LINES.items():
                points = _points(records, OURS, filters, vocab_size, kind, "share_of_copy")
                label = f"V = {vocab_size:,}, {kind}"
                axes.plot(*points, line, marker="o", color=colour, label=label)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(filters, fontsize=9)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("of copy bandwidth, each logit counted once")
    _legend(figure, panels[0])
    figure.savefig(path, dpi=150)


def _points(
    records: Sequence[Record], provider: str, filters: str, vocab_size: int, kind: str, field: str
) -> tuple[list[int], list[float]]:
    wanted = (SAMPLE, provider, filters, vocab_size, kind, COLD)
    keys = ("op", "provider", "filters", "vocab_size", "kind", "mode")
    found: dict[int, float] = {}
    for r in records:
        if tuple(r.get(key) for key in keys) == wanted:
            value = r[field]["median"] if field == "microseconds" else r[field]
            found.setdefault(r["batch_size"], value)
    sizes = sorted(found)
    return sizes, [found[size] for size in sizes]


def _figure(title: str) -> tuple[Figure, list[Axes]]:
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        panels: list[Axes] = list(figure.subplots(1, len(FILTERS), sharey=True))
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
        axes.set_xlim(BATCH_SIZES[0] / 1.5, BATCH_SIZES[-1] * 1.5)
        axes.set_xlabel("batch size")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=9)
    return figure, panels


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
