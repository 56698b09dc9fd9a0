"""Pictures of results; needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@contextmanager
def panels(
    path: Path, rows: int, columns: int, size: tuple[float, float], title: str = "", **shared: Any
) -> Iterator[tuple[Figure, list[list[Axes]]]]:
    """A figure with a grid of axes, ``size`` inches in all; saved to a PNG at the end."""
    # Colours C0 to C9 that colour-blind readers tell apart.
    with style.context(["tableau-colorblind10", {"font.size": 9}]):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, **shared).tolist()
        for axes in (axes for row in grid for axes in row):
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        yield figure, grid
        if title:
            figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=150)
