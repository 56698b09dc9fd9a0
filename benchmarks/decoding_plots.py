"""Pictures of decoding results; needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.report import significant

# Okabe and Ito's palette and others: told apart by colour-blind readers and in grey.
_COLOURS = {
    "naive": "#999999",
    "base-only": "#56B4E9",
    "ours": "#D55E00",
    "ours-shared-pair": "#F0E442",
    "ours-batched-pair": "#BBA63A",
    "ours-speculative": "#882255",
    "ours-shared-speculative": "#999933",
    "ours-lookup": "#5E3C99",
    "ours-compiled": "#E69F00",
    "base-only-packed": "#9AD0EE",
    "ours-packed": "#EE9A66",
    "ours-packed-speculative": "#A3472F",
}
_ROLE_COLOURS = {"base": "#0072B2", "expert": "#009E73", "anti": "#CC79A7"}


def _bars(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    """One panel: ms per token of each provider, the stacked bare forwards on their left."""
    forwards = records[0]["bare_forwards_ms"]
    bottom = 0.0
    for role, colour in _ROLE_COLOURS.items():
        if role in forwards:
            axes.bar(0, forwards[role], bottom=bottom, color=colour, width=0.75)
            bottom += forwards[role]
    axes.text(0, bottom, significant(bottom), ha="center", va="bottom")
    axes.axhline(bottom, color="black", linewidth=0.9, linestyle="--", zorder=0)
    for i, record in enumerate(records, start=1):
        time = record["token_ms"]["median"]
        axes.bar(i, time, color=_COLOURS[record["provider"]], width=0.75)
        axes.text(i, time, significant(time), ha="center", va="bottom")
    labels = ["bare\nforwards", *(r["provider"].replace("-", "-\n") for r in records)]
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(y=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plot_throughput(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of milliseconds per output token, a panel per case, beside the sum of bare forwards.

    Args:
        records: as the throughput benchmark writes them.
        path: of the PNG.
        title: above the panels.
    """
    keys = ("prompt_length", "output_length", "batch_size")
    cases = list(dict.fromkeys(tuple(r[k] for k in keys) for r in records))
    batch_sizes = sorted({case[2] for case in cases})
    lengths = list(dict.fromkeys(case[:2] for case in cases))
    width = 1.1 * (len({r["provider"] for r in records}) + 1) * len(lengths)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(
            figsize=(max(7.0, width), 1.2 + 2.6 * len(batch_sizes)), layout="constrained"
        )
        grid = figure.subplots(len(batch_sizes), len(lengths), squeeze=False, sharey="row")
        for row, batch_size in enumerate(batch_sizes):
            for column, (prompt, output) in enumerate(lengths):
                key = (prompt, output, batch_size)
                axes = grid[row][column]
                _bars(axes, [r for r in records if tuple(r[k] for k in keys) == key])
                prompts = "own prompts" if prompt is None else f"{prompt} prompt"
                axes.set_title(
                    f"batch {batch_size}, {prompts} + {output} output tokens", fontsize=9
                )
            grid[row][0].set_ylabel("ms per output token")
        handles = [mpl.patches.Patch(color=c, label=role) for role, c in _ROLE_COLOURS.items()]
        figure.legend(
            handles=handles,
            title="bare forwards of",
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=150)


_DRAFT_STYLES = {
    ("expert", "coupled"): ("#D55E00", "o", "-"),
    ("expert", "rejection"): ("#E69F00", "s", "--"),
    ("prompt_lookup", "coupled"): ("#0072B2", "o", "-"),
    ("prompt_lookup", "rejection"): ("#56B4E9", "s", "--"),
}


def plot_acceptance(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Tokens of a round over its drafts, and below the share of drafts kept, a column per kind.

    Args:
        records: as the acceptance benchmark writes them.
        path: of the PNG.
        title: above the panels.
    """
    kinds = list(dict.fromkeys(r["kind"] for r in records))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(1.5 + 2.9 * len(kinds), 6.4), layout="constrained")
        grid = figure.subplots(2, len(kinds), squeeze=False, sharey="row")
        for column, kind in enumerate(kinds):
            above, below = grid[0][column], grid[1][column]
            for i, (key, style) in enumerate(_DRAFT_STYLES.items()):
                own = [r for r in records if (r["kind"], r["drafter"], r["mode"]) == (kind, *key)]
                _rounds(above, own, ", ".join(_short(key)), style)
                _kept(below, own[-1], i, style[0])
            above.set_title(kind, fontsize=9)
            above.set_xticks(sorted({r["drafts"] for r in records}))
            above.set_xlabel("drafts of a round, k")
            names = ["\n".join(_short(key)) for key in _DRAFT_STYLES]
            below.set_xticks(range(len(names)), names, fontsize=7)
            below.set_ylim(0, 1.05)
            for axes in (above, below):
                axes.grid(color="#dddddd", linewidth=0.6)
                axes.set_axisbelow(True)
        grid[0][0].set_ylabel("tokens a round")
        grid[1][0].set_ylabel("share of tried drafts kept")
        handles = [
            *grid[0][0].get_lines(),
            *(Line2D([], [], **_MARKS[name], label=label) for name, label in _MARK_LABELS.items()),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=150)


def _short(key: tuple[str, str]) -> tuple[str, str]:
    """Drafter and mode, for labels."""
    return key[0].removeprefix("prompt_"), key[1]


_MARKS: dict[str, dict[str, Any]] = {
    "overlap": {"color": "black", "marker": "_", "markersize": 22, "linestyle": ""},
    "bound": {"color": "black", "marker": "x", "markersize": 6, "linestyle": ""},
}
_MARK_LABELS = {"overlap": "sum of min(p, q)", "bound": "(1 - d) / (1 + d)"}


def _rounds(
    axes: Axes, records: Sequence[dict[str, Any]], label: str, style: tuple[str, str, str]
) -> None:
    """A line of tokens per round."""
    colour, marker, dashes = style
    axes.plot(
        [r["drafts"] for r in records],
        [r["tokens_per_round"] for r in records],
        color=colour,
        marker=marker,
        linestyle=dashes,
        markersize=4,
        label=label,
    )


def _kept(axes: Axes, record: dict[str, Any], place: int, colour: str) -> None:
    """A bar of what was kept, with what is expected marked on it."""
    if record["expected"] is None:
        return
    axes.bar(place, record["accepted"] / record["tried"], color=colour, width=0.7)
    for name, mark in _MARKS.items():
        axes.plot(place, record["expected"][name], **mark)


def plot_refill(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Slots that did useful work over the steps, a panel for each way to fill them.

    Args:
        records: as the refill benchmark writes them.
        path: of the PNG.
        title: above the panels.
    """
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8.5, 1.0 + 1.9 * len(records)), layout="constrained")
        grid = figure.subplots(len(records), 1, squeeze=False, sharex=True, sharey=True)
        for axes, record in zip(grid[:, 0], records, strict=True):
            busy = record["busy"]
            axes.stairs(busy, range(len(busy) + 1), fill=True, color="#D55E00")
            slots = record["slots"]
            axes.axhline(slots, color="black", linewidth=0.9, linestyle="--")
            axes.set_ylim(0, slots * 1.08)
            axes.set_title(f"{record['provider']}: {record['useful']:.1%} useful", fontsize=9)
            axes.set_ylabel("slots at work")
        grid[-1, 0].set_xlabel("step")
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=150)
