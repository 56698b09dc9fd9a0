"""The figures as tables, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.report import console, fixed, make_table, significant
from benchmarks.static.figures import Figures
from benchmarks.static.occupancy import LIMITS, WARP
from benchmarks.static.run import Stored, Unit
from benchmarks.traffic import GPUS, Gpu

_SCHEDULERS = 4  # of a multiprocessor; each issues one warp's instruction a clock
_PROFILED = ("sample", "scan")
_LEAST_PART = 0.05  # of a route's instructions: functions with fewer are summed up


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


def _widths(counts: Mapping[str, int]) -> str:
    """``6x16 2x4``: six accesses of 16 bytes a thread, two of 4."""
    return " ".join(f"{n}x{size}" for size, n in counts.items()) or "-"


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


def resource_table(figures: Mapping[Unit, Figures]) -> Table:
    """What each kernel takes."""
    columns = ("kernel", "cc", "regs", "stack", "local", "shared", "warps", "bar", "code")
    rows = []
    for unit, f in figures.items():
        numbers = (f.registers, f.stack, f.local, f.shared, f.resident_warps, f.barriers)
        cells = (f"{number:,}" for number in (*numbers, f.instructions))
        rows.append((_label(unit), _of_cc(unit.cc), *cells))
    return Table("Resources", columns, rows)


def memory_table(figures: Mapping[Unit, Figures]) -> Table:
    """How each kernel reaches global memory."""
    columns = ("kernel", "cc", "logits", "other loads", "stores", "atom")
    rows = []
    for unit, f in figures.items():
        cells = map(_widths, (f.logits_loads, f.other_loads, f.stores))
        rows.append((_label(unit), _of_cc(unit.cc), *cells, str(f.atomics)))
    return Table("Global memory", columns, rows)


def route_table(figures: Mapping[Unit, Figures]) -> Table:
    """Instructions a token on each route, and how many take as long as the token's bytes."""
    ccs = sorted({unit.cc for unit in figures})
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for unit, f in figures.items():
        for name, route in f.routes.items():
            key = (_label(unit), name, f"{route.logits_bytes:g}", f"{route.logits_loads:g}")
            rows.setdefault(key, {})[unit.cc] = significant(route.instructions)
    sizes = {route.logits_bytes for f in figures.values() for route in f.routes.values()}
    for size in sorted(sizes):
        for cc in ccs:
            key = ("as long as the bytes", "", f"{size:g}", "")
            rows.setdefault(key, {})[cc] = significant(affordable(cc, size))
    columns = ("kernel", "route", "bytes", "loads", *map(_of_cc, ccs))
    lines = [(*key, *(cells.get(cc, "-") for cc in ccs)) for key, cells in rows.items()]
    return Table("Instructions a token", columns, lines)


def part_table(figures: Mapping[Unit, Figures]) -> Table:
    """What the instructions of scan's longest route were made for, by function of the source."""
    by_cc = {
        unit.cc: max(f.routes.values(), key=lambda route: route.instructions)
        for unit, f in figures.items()
        if (unit.case, unit.kernel) == _PROFILED
    }
    names = {
        name: None
        for route in by_cc.values()
        for name, count in route.parts.items()
        if count >= _LEAST_PART * route.instructions
    }
    rows = [
        (name, *(fixed(route.parts.get(name, 0), 1) for route in by_cc.values())) for name in names
    ]
    rest = [sum(n for name, n in r.parts.items() if name not in names) for r in by_cc.values()]
    if rows:
        rows.append(("others", *(fixed(count, 1) for count in rest)))
    columns = ("function", *(_of_cc(cc) for cc in by_cc))
    return Table("Instructions of scan, by function", columns, rows)


def cluster_table(figures: Mapping[Unit, Figures]) -> Table:
    """What each CUDA C++ kernel takes, and how it reaches global memory."""
    columns = (
        *("kernel", "cc", "blocks", "regs", "stack", "local", "shared", "warps", "bar", "code"),
        *("logits", "other loads", "stores", "atom"),
    )
    rows = []
    for unit, f in figures.items():
        numbers = (f.blocks, f.registers, f.stack, f.local, f.shared, f.resident_warps, f.barriers)
        cells = [f"{number:,}" for number in (*numbers, f.instructions)]
        cells += [*map(_widths, (f.logits_loads, f.other_loads, f.stores)), str(f.atomics)]
        name = f"{unit.kernel} {unit.case}"
        rows.append((name, _of_cc(unit.cc), *cells))
    return Table("CUDA C++", columns, rows)


def _cluster_tables(figures: Mapping[Unit, Figures]) -> list[Table]:
    """Their resources, and their loops: the code of a kernel is the same for every shape."""
    first = next((unit.case for unit in figures), None)
    once = {
        Unit("CUDA C++", unit.kernel, unit.cc): one
        for unit, one in figures.items()
        if unit.case == first
    }
    loops = route_table(once)
    return [cluster_table(figures), loops._replace(title=f"CUDA C++: {loops.title.lower()}")]


def _absent_line(figures: Mapping[Unit, Figures]) -> str:
    """What no cluster of a device holds, of the cases that other devices have."""
    ccs = sorted({unit.cc for unit in figures})
    absent = [
        f"{kernel} {case} at {_of_cc(cc)}"
        for case, kernel in dict.fromkeys((unit.case, unit.kernel) for unit in figures)
        for cc in ccs
        if Unit(case, kernel, cc) not in figures
    ]
    return f"No cluster holds a row: {', '.join(absent)}." if absent else ""


def _limits_line(ccs: Iterable[int]) -> str:
    parts = [
        f"cc {_of_cc(cc)}: {LIMITS[cc].warps} warps; {example_gpu(cc).name}, "
        f"{example_gpu(cc).sms} SMs at {example_gpu(cc).clock:g} GHz, "
        f"{example_gpu(cc).bandwidth:g} TB/s"
        for cc in ccs
    ]
    return ". ".join(parts) + "."


_TABLES = (resource_table, memory_table, route_table, part_table)


def _tables(figures: Mapping[Unit, Figures]) -> list[Table]:
    tables = [make(figures) for make in _TABLES]
    return [table for table in tables if table.rows]


def _twin_line(twins: Mapping[str, str]) -> str:
    return " ".join(f"{label} has the figures of {twin}." for label, twin in twins.items())


def print_figures(figures: Mapping[Unit, Figures]) -> None:
    """Tables on the terminal."""
    kept, twins = split_twins(figures)
    _print_tables(_tables(kept))
    if twins:
        console.print(_twin_line(twins), highlight=False)


def print_cluster_figures(figures: Mapping[Unit, Figures]) -> None:
    """The CUDA C++ kernels' table on the terminal."""
    _print_tables(_cluster_tables(figures))


def _print_tables(tables: Iterable[Table]) -> None:
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
    lines = [
        "# What the compiler made of the kernels",
        "",
        "Written by `python -m benchmarks.static --write`; docs/benchmarks.md says what the",
        f"columns mean. {stored.compiler}, {cluster.compiler}. Nothing here was measured on a GPU.",
        "",
        _limits_line(sorted({unit.cc for unit in kept})),
    ]
    if twins:
        lines += ["", _twin_line(twins)]
    for table in [*_tables(kept), *_cluster_tables(cluster.figures)]:
        lines += ["", f"## {table.title}", ""]
        lines += [_row(table.columns), _row(["---"] + ["---:"] * (len(table.columns) - 1))]
        lines += map(_row, table.rows)
    if absent := _absent_line(cluster.figures):
        lines += ["", absent]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
