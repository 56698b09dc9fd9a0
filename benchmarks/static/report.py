"""The figures as tables, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.harness.report import console, make_table, markdown_table, significant
from benchmarks.roofline import GPUS, Gpu
from benchmarks.static.figures import LIMITS, WARP, Figures, Stored, Unit

_SCHEDULERS = 4  # of a multiprocessor; each issues one warp's instruction a clock


class Table(NamedTuple):
    """Text in cells; the first column is the row's name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def example_gpu(cc: int) -> Gpu:
    """A GPU of a compute capability, from the roofline's list."""
    return next(gpu for gpu in GPUS.values() if gpu.compute_capability == _of_cc(cc))


def affordable(cc: int, bytes_per_token: float) -> float:
    """Instructions a token that take as long as its bytes do, at one a clock and scheduler."""
    gpu = example_gpu(cc)
    per_second = gpu.sms * _SCHEDULERS * WARP * gpu.clock * 1e9
    return bytes_per_token / (gpu.bandwidth * 1e12) * per_second


def _label(unit: Unit) -> str:
    return f"{unit.case}: {unit.kernel}"


def _of_cc(cc: int) -> str:
    return f"{cc / 10:.1f}"


def split_twins(figures: Mapping[Unit, Figures]) -> tuple[dict[Unit, Figures], dict[str, str]]:
    """Figures without kernels that compile to the same as an earlier one; those, with its name."""
    by_label: dict[str, dict[Unit, Figures]] = {}
    for unit, one in figures.items():
        by_label.setdefault(_label(unit), {})[unit] = one
    kept: dict[Unit, Figures] = {}
    first: dict[str, str] = {}
    twins: dict[str, str] = {}
    for label, own in by_label.items():
        content = repr([(unit.kernel, unit.cc, one) for unit, one in own.items()])
        if first.setdefault(content, label) == label:
            kept |= own
        else:
            twins[label] = first[content]
    return kept, twins


def _cells(f: Figures) -> list[str]:
    """What a kernel takes, and how it reaches memory.

    ``6x16 2x4`` are six accesses of 16 bytes a thread and two of 4.
    """
    numbers = (f.registers, f.stack, f.local, f.shared, f.resident_warps, f.barriers)
    kinds = (f.logits_loads, f.other_loads, f.stores)
    texts = (" ".join(f"{n}x{size}" for size, n in kind.items()) or "-" for kind in kinds)
    return [*(f"{number:,}" for number in (*numbers, f.instructions)), *texts, str(f.atomics)]


_RESOURCES = ("regs", "stack", "local", "shared", "warps", "bar", "code")
_MEMORY = ("logits", "other loads", "stores", "atom")


def route_table(figures: Mapping[Unit, Figures]) -> Table:
    """Instructions a token on each route, and how many take as long as the token's bytes."""
    ccs = sorted({unit.cc for unit in figures})
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for unit, f in figures.items():
        for name, route in f.routes.items():
            key = (_label(unit), name, f"{route.logits_bytes:g}", f"{route.logits_loads:g}")
            rows.setdefault(key, {})[unit.cc] = significant(route.instructions)
    for size in sorted(
        {route.logits_bytes for f in figures.values() for route in f.routes.values()}
    ):
        key = ("as long as the bytes", "", f"{size:g}", "")
        rows[key] = {cc: significant(affordable(cc, size)) for cc in ccs}
    columns = ("kernel", "route", "bytes", "loads", *map(_of_cc, ccs))
    lines = [(*key, *(cells.get(cc, "-") for cc in ccs)) for key, cells in rows.items()]
    return Table("Instructions a token", columns, lines)


def triton_tables(figures: Mapping[Unit, Figures]) -> list[Table]:
    """What each kernel takes, how it reaches memory, and its routes."""
    rows = [((_label(unit), _of_cc(unit.cc)), _cells(f)) for unit, f in figures.items()]
    taken = len(_RESOURCES)
    tables = (
        Table("Resources", ("kernel", "cc", *_RESOURCES), [(*n, *c[:taken]) for n, c in rows]),
        Table("Global memory", ("kernel", "cc", *_MEMORY), [(*n, *c[taken:]) for n, c in rows]),
        route_table(figures),
    )
    return [table for table in tables if table.rows]


def cluster_tables(figures: Mapping[Unit, Figures]) -> list[Table]:
    """What the CUDA C++ kernels take, and their loops: a kernel's code is that of every shape."""
    rows = [
        (f"{unit.kernel} {unit.case}", _of_cc(unit.cc), str(f.blocks), *_cells(f))
        for unit, f in figures.items()
    ]
    first = next((unit.case for unit in figures), None)
    once = {u._replace(case="CUDA C++"): one for u, one in figures.items() if u.case == first}
    columns = ("kernel", "cc", "blocks", *_RESOURCES, *_MEMORY)
    loops = route_table(once)._replace(title="CUDA C++: instructions a token")
    return [Table("CUDA C++", columns, rows), loops]


def print_tables(tables: Iterable[Table]) -> None:
    """Tables on the terminal; a name that stands in several rows is shown once."""
    for table in tables:
        shown = make_table(table.title, table.columns, "")
        previous = ""
        repeated = len({row[0] for row in table.rows}) < len(table.rows)
        for name, *cells in table.rows:
            if repeated and previous and name != previous:
                shown.add_section()
            shown.add_row("" if name == previous else name, *cells)
            previous = name
        console.print(shown)


def page(stored: Stored, cluster: Stored) -> str:
    """A Markdown page: no date and no machine, so that the same code gives the same page.

    Args:
        stored: Triton's kernels.
        cluster: the CUDA C++ ones.
    """
    kept, twins = split_twins(stored.figures)
    limits = []
    for cc in sorted({unit.cc for unit in kept}):
        gpu = example_gpu(cc)
        limits.append(
            f"cc {_of_cc(cc)}: {LIMITS[cc].warps} warps; {gpu.name}, {gpu.sms} SMs at "
            f"{gpu.clock:g} GHz, {gpu.bandwidth:g} TB/s."
        )
    lines = [
        "# What the compiler made of the kernels",
        "",
        "Written by `python -m benchmarks.static --write`; docs/benchmarks.md says what the",
        f"columns mean. {stored.compiler}, {cluster.compiler}. Nothing here was measured on a GPU.",
        "",
        " ".join(limits),
    ]
    if twins:
        same = (f"{label} has the figures of {twin}." for label, twin in twins.items())
        lines += ["", " ".join(same)]
    for table in [*triton_tables(kept), *cluster_tables(cluster.figures)]:
        lines += ["", f"## {table.title}", "", *markdown_table(table.columns, table.rows)]
    ccs = sorted({unit.cc for unit in cluster.figures})
    absent = [
        f"{kernel} {case} at {_of_cc(cc)}"
        for case, kernel in dict.fromkeys((unit.case, unit.kernel) for unit in cluster.figures)
        for cc in ccs
        if Unit(case, kernel, cc) not in cluster.figures
    ]
    if absent:
        lines += ["", f"No cluster holds a row: {', '.join(absent)}."]
    return "\n".join(lines) + "\n"
