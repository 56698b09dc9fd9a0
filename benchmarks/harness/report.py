"""Results as JSON lines with what they were measured on, as tables, and as pictures."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import proxytune_kernels

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"

_PACKAGES = ("torch", "triton", "transformers", "numpy")

console = Console()


@functools.cache
def output_of(*command: str) -> str | None:
    """What a program prints, run once; None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []  # not Linux
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a measurement was taken on: revision, machine, versions; every line of results has it.

    ``revision`` and ``dirty`` (whether tracked files differ from it) are None outside a git
    checkout. ``load`` is the one-minute load average.
    """
    git = "git", "-C", str(REPOSITORY)
    changed = output_of(*git, "status", "--porcelain", "--untracked-files=no")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": output_of(*git, "rev-parse", "HEAD"),
        "dirty": None if changed is None else changed != "",
        "device": "cpu",
        "device_name": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) if find_spec(name) else None for name in _PACKAGES},
        "proxytune_kernels": proxytune_kernels.__version__,
        "backends": [name for name, reason in proxytune_kernels.backends().items() if not reason],
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


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


def write_results(
    output: Path | None,
    benchmark: str,
    shared: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
    *names: str,
) -> None:
    """Write a line for each record, with what all of them share, and say where.

    Without an output to a file of :data:`RESULTS`, called by the benchmark and further names.
    """
    path = output or RESULTS / f"{'-'.join([benchmark, *names])}.jsonl"
    write_json_lines(path, benchmark, [{**shared, **record} for record in records])
    say(f"Wrote {path}")


def say(text: str, style: str | None = None) -> None:
    """Print a line, wrapped by the terminal alone."""
    console.print(text, style=style, soft_wrap=True)


@contextmanager
def progress_bar(total: int, description: str = "") -> Iterator[Callable[[str], None]]:
    """A progress bar over ``total`` steps; call what it gives after each, with what to show.

    It leaves nothing behind, and is on standard error, so that tables can be piped.
    """
    with Progress(
        TextColumn("{task.description:<50}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda text: progress.update(task, advance=1, description=text)


def print_table(
    title: str, columns: Sequence[str], caption: str, rows: Iterable[tuple[str, Sequence[str]]]
) -> None:
    """Print a table of (section, cells), text in the first column, numbers in the others.

    Each new section gets a line of its own above its rows.
    """
    left: Any = {"title_justify": "left", "caption_justify": "left"}
    look: Any = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table, previous = Table(title=title, caption=caption, **left, **look), ""
    for i, column in enumerate(columns):
        # Where a terminal is narrow a cell takes more lines: no digit is cut off.
        look_of: Any = {"justify": "right", "overflow": "fold"} if i else {"no_wrap": True}
        table.add_column(column, **look_of)
    for section, cells in rows:
        if section != previous:
            table.add_section()
            table.add_row(f"[bold]{section}")
            previous = section
        table.add_row(*cells)
    console.print(table)


Column = tuple[str, str, Callable[[Any], str]]
"""A heading, where the value stands in a record (``"speed_over/naive/median"``), and its format."""


def cells(record: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """A record's text in each column; a dash for what it does not have."""
    found = []
    for _, path, text in columns:
        value: Any = record
        for key in path.split("/"):
            value = None if value is None else value.get(key)
        found.append("-" if value is None else text(value))
    return found


def print_records(
    title: str,
    caption: str,
    records: Iterable[Mapping[str, Any]],
    columns: Sequence[Column],
    section: Callable[[Any], str] = lambda record: "",
) -> None:
    """Print a row for each record, in the columns given; the caption ends with the machine."""
    rows = [(section(record), cells(record, columns)) for record in records]
    print_table(title, [heading for heading, *_ in columns], f"{caption} {machine_line()}", rows)


def percent(value: float) -> str:
    """A share for a table cell."""
    return f"{100 * value:.1f}%"


def decimals(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """A format for :func:`print_records`: the value times ``scale``, to so many digits."""
    return lambda value: fixed(scale * value, digits)


def fixed(value: float, digits: int = 2, suffix: str = "") -> str:
    """A number for a table cell."""
    return f"{value:,.{digits}f}{suffix}"


def significant(value: float, suffix: str = "") -> str:
    """A number with three significant digits for a table cell."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return fixed(value, digits, suffix)
