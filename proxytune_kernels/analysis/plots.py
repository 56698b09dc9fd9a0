"""Pictures of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proxytune_kernels.analysis.sweep import Curve


def plot_sweep(curves: Sequence[Curve], path: str | Path) -> None:
    """Draw one curve by alpha, or two against each other, into a file such as .png or .svg.

    Bars and bands are 95% intervals over prompts; the suggested alpha has a ring.

    Raises:
        ValueError: no kind of picture has the file's ending.
        OSError: it can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Any = figure.add_subplot()
    if len(curves) == 1:
        _by_alpha(axes, curves[0])
    else:
        _against(axes, *curves)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def _by_alpha(axes: Any, curve: Curve) -> None:
    scores = [point.score for point in curve.points]
    low, high = np.array([score.low for score in scores]), np.array([s.high for s in scores])
    line = axes.plot(curve.alphas, [score.value for score in scores], marker="o")[0]
    axes.fill_between(curve.alphas, low, high, alpha=0.2, color=line.get_color())
    suggested = curve.alphas.index(curve.suggested)
    _ring(axes, curve.suggested, scores[suggested].value, f"suggested: {curve.suggested:g}")
    axes.set_xlabel("alpha")
    axes.set_ylabel(_plain(curve.name))
    axes.legend()


def _against(axes: Any, one: Curve, other: Curve) -> None:
    scores = [[point.score for point in curve.points] for curve in (one, other)]
    values = [[score.value for score in each] for each in scores]
    reach = [[[s.value - s.low for s in each], [s.high - s.value for s in each]] for each in scores]
    axes.errorbar(*values, xerr=reach[0], yerr=reach[1], marker="o", elinewidth=0.8)
    for alpha, x, y in zip(one.alphas, *values, strict=True):
        axes.annotate(f"{alpha:g}", (x, y), textcoords="offset points", xytext=(6, 6))
    for curve, size in ((one, 13), (other, 19)):
        place = curve.alphas.index(curve.suggested)
        label = f"suggested by {_plain(curve.name)}: {curve.suggested:g}"
        _ring(axes, values[0][place], values[1][place], label, size)
    axes.set_xlabel(_plain(one.name))
    axes.set_ylabel(f"{_plain(other.name)} (points: alpha)")
    axes.legend()


def _ring(axes: Any, x: float, y: float, label: str, size: int = 13) -> None:
    look = {"marker": "o", "markersize": size, "fillstyle": "none", "linestyle": "none"}
    axes.plot([x], [y], label=label, **look)


def _plain(name: str) -> str:
    """A name whose dollars are not the ends of a formula."""
    return name.replace("$", r"\$")
