"""Results as JSON lines, as a table and as a picture; shared by all benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"

console = Console()


def make_progress() -> Progress:
    """A progress bar that leaves nothing behind; on standard error, so that tables can be piped."""
    return Progress(
        TextColumn("{task.description:<50}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def write_json_lines(
    path: Path,
    benchmark: str,
    records: Iterable[Mapping[str, Any]],
    device: Mapping[str, Any] | None = None,
    *,
    append: bool = False,
) -> None:
    """Write one self-contained line per record: what ran, the numbers, and the environment.

    ``device`` describes what ran it, in place of the processor. ``append`` keeps earlier lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {**environment(), **(device or {})}
    lines = [json.dumps({"benchmark": benchmark, **r, "environment": where}) for r in records]
    with path.open("a" if append else "w") as file:
        file.writelines(f"{line}\n" for line in lines)


def make_table(title: str, columns: Sequence[str], caption: str) -> Table:
    """A table, narrow enough for a terminal: text in the first column, numbers in the others."""
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def machine_line() -> str:
    """One line that says where the numbers come from."""
    e = environment()
    revision = "no git revision" if e["revision"] is None else e["revision"][:10]
    if e["dirty"]:
        revision += " with local changes"
    return (
        f"{e['device_name']}, {e['cores']} cores, {e['threads']} thread(s), load {e['load']}, "
        f"torch {e['torch']}, transformers {e['transformers']}, {revision}"
    )


def fixed(value: float | None, digits: int = 2, suffix: str = "") -> str:
    """A number for a table cell; a dash for what was not measured."""
    return "-" if value is None else f"{value:,.{digits}f}{suffix}"


def significant(value: float | None, suffix: str = "") -> str:
    """A number with three significant digits for a table cell; a dash for none."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return fixed(value, digits, suffix)
