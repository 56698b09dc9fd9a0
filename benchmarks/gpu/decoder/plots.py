"""Pictures of the decoder on a GPU; needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from benchmarks.gpu.decoder.break_even import tokens_per_round
from benchmarks.gpu.decoder.modes import BASE_ONLY, OURS
from benchmarks.gpu.decoder.trace import KERNEL, Trace, Work, idle
from benchmarks.report import significant

Record = Mapping[str, Any]

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
_STEP, _FLOOR, _PLAIN = "#D55E00", "#000000", "#0072B2"
_DRAFTS = ("#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999")
_KINDS = {
    "attention": ("#009E73", r"fmha|flash|attention"),
    "sampling": ("#D55E00", r"proxytune|_(?:sample|scan|finish|narrow|select|verify|accept)_"),
    "products": ("#0072B2", r"gemm|gemv|splitk|cutlass|nvjet|cublas|int8|_mm_|wgmma"),
}
"""Colour, and what the names of such kernels contain, by kind; the first that fits counts."""
_OTHER, _COPIES, _IDLE = "#E69F00", "#CC79A7", "#000000"


def kind_of(work: Work) -> str:
    """Which of the picture's colours a piece of work has."""
    if work.kind != KERNEL:
        return "copies"
    name = work.name.lower()
    return next((kind for kind, (_, pattern) in _KINDS.items() if re.search(pattern, name)), "rest")


def plot_trace(trace: Trace, window: tuple[float, float], path: Path, title: str) -> None:
    """Work of each stream over time, and below them the time without any kernel.

    Args:
        trace: of a profile.
        window: start and end of what is shown, in the trace's microseconds.
        path: of the PNG.
        title: above it.
    """
    start, end = window
    shown = [w for w in trace.work if w.end > start and w.start < end]
    streams = sorted({w.stream for w in shown})
    colours = {kind: colour for kind, (colour, _) in _KINDS.items()}
    colours |= {"rest": _OTHER, "copies": _COPIES, "idle": _IDLE}
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 1.8 + 0.55 * len(streams)), layout="constrained")
        axes = figure.subplots()
        for kind in (*_KINDS, "rest", "copies"):
            for row, stream in enumerate(streams):
                own = [w for w in shown if w.stream == stream and kind_of(w) == kind]
                _bars(axes, row, [(w.start, w.end) for w in own], window, colours[kind])
        _bars(axes, len(streams), list(idle(trace.kernels).gaps), window, colours["idle"])
        labels = [*(f"stream {stream}" for stream in streams), "no kernel"]
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0.0, (end - start) / 1e3)
        axes.set_xlabel("ms")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.suptitle(title, fontsize=9)
        handles = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(path, dpi=150)


def _bars(
    axes: Axes,
    row: int,
    intervals: Sequence[tuple[float, float]],
    window: tuple[float, float],
    colour: str,
) -> None:
    """Bars in one row, cut to the window, in milliseconds from its start."""
    start, end = window
    cut = [(max(a, start), min(b, end)) for a, b in intervals if b > start and a < end]
    spans = [((a - start) / 1e3, (b - a) / 1e3) for a, b in cut]
    axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=colour, linewidth=0)


def plot_steps(records: Sequence[Record], path: Path, title: str) -> None:
    """Step times over their bytes, and speculation's speed by acceptance; a row for each trio.

    Args:
        records: of a run, those of modes; batch 1 is shown.
        path: of the PNG.
        title: above the panels.
    """
    alone = [r for r in records if r["batch_size"] == 1]
    trios = list(dict.fromkeys(r["trio"] for r in alone))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 0.8 + 3.4 * len(trios)), layout="constrained")
        grid = figure.subplots(len(trios), 2, squeeze=False)
        for (steps, speeds), trio in zip(grid, trios, strict=True):
            own = {r["mode"]: r for r in alone if r["trio"] == trio}
            _step_bars(steps, [r for r in own.values() if not r["drafts"]])
            steps.set_title(f"{own[next(iter(own))]['title']}, batch 1", fontsize=9)
            _speeds(speeds, own)
        figure.suptitle(title, fontsize=9)
        figure.savefig(path, dpi=150)


def _step_bars(axes: Axes, records: Sequence[Record]) -> None:
    """Milliseconds of a step of each mode, and what its bytes take at the copy's bandwidth."""
    for row, r in enumerate(records):
        took, floor = r["step_ms"]["median"], r["floor_ms"]
        axes.barh(row, took, color=_STEP, height=0.7)
        axes.plot((floor, floor), (row - 0.4, row + 0.4), color=_FLOOR, linewidth=1.6)
        text = f" {significant(took)} ({significant(took / floor)})"
        axes.text(max(took, floor), row, text, va="center", ha="left")
    axes.set_yticks(range(len(records)), [r["mode"] for r in records])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("ms a step (over its floor, the black line: bytes / copy bandwidth)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _speeds(axes: Axes, own: Mapping[str, Record]) -> None:
    """Tokens a second over the base alone's, by acceptance: measured times, computed tokens."""
    rounds = [r for r in own.values() if r["drafts"]]
    base = own.get(BASE_ONLY)
    if base is None or not rounds:
        axes.set_axis_off()
        return
    step = base["step_ms"]["median"]
    grid = [i / 100 for i in range(101)]
    for r, colour in zip(rounds, _DRAFTS, strict=False):
        drafts, took = r["drafts"], r["step_ms"]["median"]
        speeds = [tokens_per_round(a, drafts) * step / took for a in grid]
        axes.plot(grid, speeds, color=colour, label=f"{drafts} draft{'s' * (drafts > 1)} a round")
        pays = r["break_even"].get(BASE_ONLY)
        if pays is not None:
            axes.plot(pays, tokens_per_round(pays, drafts) * step / took, "o", color=colour)
    axes.axhline(1.0, color=_FLOOR, linewidth=0.9, linestyle="--", label="base alone")
    if OURS in own:
        ours = step / own[OURS]["step_ms"]["median"]
        axes.axhline(ours, color=_PLAIN, linewidth=0.9, linestyle=":", label="ours, plain")
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(0.0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of drafts accepted (assumed, not measured)")
    axes.set_ylabel("tokens/s over the base alone's")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
