"""What the operators and their peers have to move on a GPU, and the least time it takes: a model.

``python -m benchmarks.roofline --help``; docs/roofline.md has the derivation. Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.choices import parse_choices
from benchmarks.logits import KINDS
from benchmarks.op_cases import FILTERS
from benchmarks.report import console, fixed, make_table, significant, write_json_lines
from benchmarks.traffic import DTYPE_BYTES, GPUS, Algorithm, Case, Estimate, Gpu, Latency, estimate
from benchmarks.traffic_count import CHAINS, count_chain, count_draws, count_tiles
from benchmarks.traffic_fused import ALGORITHMS, DRAW_PASSES, TILES_AGAIN
from benchmarks.traffic_torch import LEAST_VOCAB_SIZE

MOST_VOCAB_SIZE = 2**19
NOTICE = "A model: nothing here is measured."


class Row(NamedTuple):
    """One line of a table."""

    op: str
    case: Case
    gpu: Gpu
    algorithm: Algorithm
    estimate: Estimate

    def record(self, latency: Latency) -> dict[str, Any]:
        """For JSON lines; says that it was not measured."""
        e = self.estimate
        return {
            "op": self.op,
            "algorithm": self.algorithm.name,
            "measured": False,
            **asdict(self.case),
            "gpu": asdict(self.gpu),
            "latency_us": asdict(latency),
            "basis": self.algorithm.basis,
            "bytes_per_entry": e.bytes_per_entry,
            "bytes_per_entry_range": self.algorithm.spread,
            "launches": e.launches,
            "megabytes": e.megabytes,
            "microseconds": {
                "bytes": e.bytes_us,
                "cached_bytes": e.cached_us,
                "latency": e.latency_us,
                "floor": e.floor_us,
                "cached_floor": e.cached_floor_us,
            },
            "bound": e.bound,
        }


def model(
    ops: Iterable[str], cases: Sequence[Case], gpus: Iterable[Gpu], latency: Latency
) -> list[Row]:
    """Every algorithm of every operator, in every case, on every GPU.

    Filters play no part in ``combine`` and ``score``, nor does the kind of logits: one case stands
    for those that differ in nothing else.
    """
    rows = []
    for op, gpu in product(ops, gpus):
        own = cases
        if op != "sample":
            own = list(dict.fromkeys(replace(c, filters="none", kind="peaked") for c in cases))
        for case, make in product(own, ALGORITHMS[op]):
            algorithm = make(case)
            rows.append(Row(op, case, gpu, algorithm, estimate(algorithm, case, gpu, latency)))
    return rows


def _case_lines(op: str, case: Case) -> tuple[str, str]:
    what = f"{case.kind} {case.filters}" if op == "sample" else op
    return what, f"{case.dtype} V={case.vocab_size:,} B={case.rows}"


def print_rows(rows: Sequence[Row], latency: Latency) -> None:
    """A table for each operator and GPU."""
    for op, gpu in dict.fromkeys((row.op, row.gpu) for row in rows):
        _print_table(op, gpu, [row for row in rows if (row.op, row.gpu) == (op, gpu)], latency)


def _print_table(op: str, gpu: Gpu, rows: Sequence[Row], latency: Latency) -> None:
    columns = ("", "B/entry", "range", "launches", "bytes", "latency", "floor", "in L2")
    source = "data sheet" if gpu == GPUS[gpu.name] else "--bandwidth"
    caption = (
        f"{NOTICE} {gpu.bandwidth:g} TB/s ({source}), {gpu.sms} SMs, L2 {gpu.l2_mib:g} MiB. "
        "Microseconds. bytes: all of them from device memory. latency: "
        f"{latency.launch:g} us a launch, {latency.trip:g} us a dependent trip to memory "
        "(assumed). floor: the larger of the two. in L2: the floor if L2 kept all it could. range: "
        "of B/entry, by what is drawn."
    )
    table = make_table(f"{op} on {gpu.name}", columns, caption)
    previous = None
    for row in rows:
        if row.case != previous:
            table.add_section()
            for line in _case_lines(op, row.case):
                table.add_row(f"[bold]{line}")
            previous = row.case
        e, spread = row.estimate, row.algorithm.spread
        table.add_row(
            row.algorithm.name,
            fixed(e.bytes_per_entry, 1),
            "" if spread is None else f"{spread[0]:.0f}-{spread[1]:.0f}",
            str(e.launches),
            *(significant(us) for us in (e.bytes_us, e.latency_us, e.floor_us, e.cached_floor_us)),
        )
    console.print(table)


def print_terms(rows: Sequence[Row]) -> None:
    """Each algorithm kernel by kernel, with its reasons; once where cases don't change it."""
    columns = ("kernel", "launches", "read", "write", "again", "why")
    seen = set()
    for row in rows:
        if row.algorithm in seen:
            continue
        seen.add(row.algorithm)
        title = f"{row.algorithm.name}: {', '.join(_case_lines(row.op, row.case))}"
        caption = f"Bytes per vocabulary entry and launch. {row.algorithm.basis}. {NOTICE}"
        table = make_table(title, columns, caption)
        table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
        for kernel in row.algorithm.kernels:
            table.add_row(
                kernel.name,
                str(kernel.launches),
                *(fixed(size) for size in (kernel.read, kernel.write, kernel.reread)),
                kernel.why,
            )
        console.print(table)


def print_counts(cases: Sequence[Case]) -> None:
    """What the model rests on, counted on this CPU, beside what the model says."""
    columns = ("on this CPU, without a GPU", "counted", "model")
    caption = (
        "Bytes per entry of each operation's arguments and results, each once; the model's bytes "
        "on a GPU add what their kernels move within. Draws and tiles: mean (least to most) of 16 "
        "rows."
    )
    table = make_table("", columns, caption)
    for filters, kind, dtype in dict.fromkeys((c.filters, c.kind, c.dtype) for c in cases):
        case = Case(2, cases[0].vocab_size, dtype, filters, kind)
        for make in ALGORITHMS["sample"]:
            algorithm = make(case)
            if algorithm.name not in CHAINS:
                continue
            counted = count_chain(algorithm.name, case)
            cells = (
                f"{len(ops)} ops, {sum(op.read + op.write for op in ops):.1f} B"
                for ops in (counted, algorithm.ops)
            )
            table.add_row(f"{algorithm.name}, {kind} {filters} {dtype}", *cells)
        if filters != "none":
            rows = replace(case, rows=16)
            draws, tiles = count_draws(rows, draws=4), count_tiles(rows)
            flat = kind == "flat" and filters == "top_p"
            needed = "all" if flat else str(TILES_AGAIN[filters])
            text = f"{kind} {filters} {dtype}"
            table.add_row(f"reads a draw, {text}", _spread(draws, 2), fixed(DRAW_PASSES[1]))
            table.add_row(f"tiles again, {text}", _spread(tiles, 0), needed)
    console.print(table)


def _spread(values: Sequence[float], digits: int) -> str:
    mean, least, most = (fixed(f(values), digits) for f in (fmean, min, max))
    return f"{mean} ({least} to {most})"


def _integers(option: str, text: str, least: int, most: int) -> list[int]:
    """A comma-separated option's integers.

    Raises:
        typer.BadParameter: names the option, what it got and what it wanted.
    """
    values = []
    for part in text.split(","):
        if not part.isascii() or not part.isdigit() or not least <= int(part) <= most:
            raise typer.BadParameter(
                f"{option} must hold integers from {least:,} to {most:,}, got {part!r}"
            )
        values.append(int(part))
    return values


def _positive(option: str, value: float, least: float = 0.0) -> float:
    """A number that is finite and not too small.

    Raises:
        typer.BadParameter: names the option, what it got and what it wanted.
    """
    if not least <= value < float("inf"):
        raise typer.BadParameter(f"{option} must be a number of at least {least:g}, got {value:g}")
    return value


def _gpus(names: Iterable[str], bandwidth: float | None) -> list[Gpu]:
    gpus = [GPUS[name] for name in names]
    if bandwidth is None:
        return gpus
    return [replace(gpu, bandwidth=_positive("--bandwidth", bandwidth, 0.001)) for gpu in gpus]


def main(
    gpu: Annotated[str, typer.Option(help=f"Of {','.join(GPUS)}.")] = "h100",
    batch: Annotated[str, typer.Option(help="Rows: batch sizes.")] = "1,8,64,256",
    vocab: Annotated[
        str, typer.Option(help=f"Vocabulary sizes, from {LEAST_VOCAB_SIZE:,}.")
    ] = "128256",
    dtype: Annotated[str, typer.Option(help=f"Of the logits; of {','.join(DTYPE_BYTES)}.")] = (
        "bf16"
    ),
    filters: Annotated[str, typer.Option(help=f"Of {','.join(FILTERS)}.")] = "top_p",
    kinds: Annotated[str, typer.Option(help=f"Of {','.join(KINDS)}.")] = "peaked",
    ops: Annotated[str, typer.Option(help=f"Of {','.join(ALGORITHMS)}.")] = "sample",
    bandwidth: Annotated[
        float | None, typer.Option(help="TB/s of device memory, in place of the data sheet's.")
    ] = None,
    launch_us: Annotated[
        float, typer.Option(help="us from one kernel to the next in a CUDA graph; assumed.")
    ] = Latency.launch,
    trip_us: Annotated[
        float, typer.Option(help="us of a load that others wait for; assumed.")
    ] = Latency.trip,
    terms: Annotated[bool, typer.Option("--terms", help="Also each kernel, and why.")] = False,
    count: Annotated[
        bool, typer.Option("--count", help="Also what the model rests on, counted on this CPU.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON lines.")] = None,
    plot: Annotated[bool, typer.Option(help="With --output, also a PNG beside it.")] = True,
) -> None:
    """Bytes, launches and least time of ours and of the peers' algorithms. Nothing is measured.

    Options take several values, separated by commas. Example: python -m benchmarks.roofline --gpu
    h100,a100-80 --batch 1,64 --filters none,top_p --kinds peaked,flat --terms
    """

    def choices(option: str, text: str, known: Iterable[str]) -> list[str]:
        return parse_choices(option, text, known, None)

    gpus = _gpus(choices("--gpu", gpu, GPUS), bandwidth)
    cases = [
        Case(*values)
        for values in product(
            _integers("--batch", batch, 1, 2**20),
            _integers("--vocab", vocab, LEAST_VOCAB_SIZE, MOST_VOCAB_SIZE),
            choices("--dtype", dtype, DTYPE_BYTES),
            choices("--filters", filters, FILTERS),
            choices("--kinds", kinds, KINDS),
        )
    ]
    latency = Latency(_positive("--launch-us", launch_us), _positive("--trip-us", trip_us))
    rows = model(choices("--ops", ops, ALGORITHMS), cases, gpus, latency)
    print_rows(rows, latency)
    if terms:
        print_terms(rows)
    if count:
        print_counts(cases)
    if output is not None:
        _write(rows, latency, output, plot)


def _write(rows: Sequence[Row], latency: Latency, output: Path, plot: bool) -> None:
    device = {"device": "model", "device_name": "none: nothing was measured"}
    write_json_lines(output, "roofline", [row.record(latency) for row in rows], device)
    console.print(f"Wrote {output}", soft_wrap=True)
    if plot:
        from benchmarks.plots import plot_roofline

        picture = output.with_suffix(".png")
        plot_roofline([row.record(latency) for row in rows], picture)
        console.print(f"Wrote {picture}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
