"""Pictures of results; needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
_KERNEL_COLOURS = {
    "ours": "#D55E00",
    "softmax only": "#000000",
    "transformers": "#999999",
    "torch": "#56B4E9",
    "torch.compile": "#0072B2",
    "numpy": "#009E73",
}


def _providers(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(record["provider"] for record in records))


def plot_kernels(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Microseconds of every provider, one line of dots per case, on a logarithmic axis.

    Args:
        records: of ``sample``, as the operator benchmark writes them.
        path: of the PNG.
    """
    keys = ("kind", "dtype", "filters", "vocab_size", "batch_size")
    cases = list(dict.fromkeys(tuple(r[k] for k in keys) for r in records))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8.5, 1.6 + 0.34 * len(cases)), layout="constrained")
        axes = figure.subplots()
        for name in _providers(records):
            own = [r for r in records if r["provider"] == name]
            lines = [cases.index(tuple(r[k] for k in keys)) for r in own]
            marker = "|" if name == "softmax only" else "o"
            size = 160 if marker == "|" else 40
            times = [r["microseconds"]["median"] for r in own]
            axes.scatter(
                times, lines, s=size, marker=marker, color=_KERNEL_COLOURS[name], label=name
            )
        labels = [f"{k}, {d}, {f}, V={v:,}, B={b}" for k, d, f, v, b in cases]
        axes.set_yticks(range(len(cases)), labels)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_title("Combine, filter and draw one token per row, alpha 1, temperature 0.7")
        axes.set_xlabel("microseconds per call (median, logarithmic)")
        axes.grid(axis="both", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=6, frameon=False)
        figure.savefig(path, dpi=150)


_HEAD_COLOURS = {"bfloat16": "#D55E00", "float32": "#0072B2"}


def plot_heads(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Three heads and ``sample`` over ``sample_hidden``, by batch, a panel per shape.

    Args:
        records: as the heads benchmark writes them.
        path: of the PNG.
    """
    apart = [r for r in records if r["provider"] == "three heads, sample"]
    shapes = list(dict.fromkeys(r["shape"] for r in apart))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(1.0 + 3.2 * len(shapes), 3.4), layout="constrained")
        grid = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
        for axes, shape in zip(grid, shapes, strict=True):
            for dtype, colour in _HEAD_COLOURS.items():
                own = [r for r in apart if (r["shape"], r["dtype"]) == (shape, dtype)]
                sizes = [r["batch_size"] for r in own]
                ratios = [r["time_over_ours"] for r in own]
                low, high = ([ratio[end] for ratio in ratios] for end in ("p10", "p90"))
                medians = [ratio["median"] for ratio in ratios]
                axes.plot(sizes, medians, marker="o", markersize=4, color=colour, label=dtype)
                axes.fill_between(sizes, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.axhline(1.0, color="black", linewidth=0.9, linestyle="--", zorder=0)
            axes.set_xscale("log", base=2)
            ticks = sorted({r["batch_size"] for r in apart})
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.set_title(shape, fontsize=9)
            axes.set_xlabel("rows")
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
        grid[0].set_ylabel("three heads and sample,\ntime over sample_hidden")
        grid[0].legend(frameon=False)
        figure.savefig(path, dpi=150)


_ROOFLINE_COLOURS = {
    "inputs once": "#000000",
    "ours": "#D55E00",
    "flashinfer": "#009E73",
    "eager + flashinfer": "#F0E442",
    "torch.compile": "#0072B2",
    "eager": "#56B4E9",
    "transformers": "#999999",
}


def plot_roofline(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Modelled floors over the batch size, a panel per case, each a band down to what L2 may save.

    Args:
        records: as the roofline command writes them.
        path: of the PNG.
    """

    def panel(record: dict[str, Any]) -> tuple[str, ...]:
        keys = ("op", "kind", "filters", "dtype", "vocab_size")
        return (record["gpu"]["name"], *(str(record[key]) for key in keys))

    panels = list(dict.fromkeys(map(panel, records)))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(4.2 * columns + 0.6, 3.4 * lines + 0.8), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, key in zip(grid.flat, panels, strict=False):
            _floors(axes, [r for r in records if panel(r) == key])
            gpu, op, kind, filters, dtype, vocab_size = key
            what = f"{op} {kind} {filters}" if op == "sample" else op
            axes.set_title(f"{gpu}: {what}, {dtype}, V={int(vocab_size):,}", fontsize=9)
        for row in grid:
            row[0].set_ylabel("floor, us (a model, not measured)")
        handles = {h.get_label(): h for axes in grid.flat for h in axes.get_lines()}
        figure.legend(
            handles=list(handles.values()), loc="outside lower center", ncols=4, frameon=False
        )
        figure.savefig(path, dpi=150)


def _floors(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    """One panel: a line of floors per algorithm, and the band below it."""
    for name in dict.fromkeys(r["algorithm"] for r in records):
        own = sorted((r for r in records if r["algorithm"] == name), key=lambda r: r["rows"])
        rows = [r["rows"] for r in own]
        floors = [r["microseconds"]["floor"] for r in own]
        cached = [r["microseconds"]["cached_floor"] for r in own]
        colour = _ROOFLINE_COLOURS[name]
        axes.plot(rows, floors, marker="o", markersize=4, color=colour, label=name)
        axes.fill_between(rows, cached, floors, color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({r["rows"] for r in records})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("rows")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
