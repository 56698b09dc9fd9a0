"""Compile the kernels for GPUs that are not here, and look at what came out.

``python -m benchmarks.static --help``; docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from benchmarks.harness.options import parse_choices
from benchmarks.harness.report import RESULTS, console
from benchmarks.static.budgets import BUDGETS
from benchmarks.static.figures import LIMITS, Stored, compare

CLUSTER = "cluster"
"""All CUDA C++ kernels, in a choice of kernels."""

TRITON_FILE, CLUSTER_FILE = "static.json", "static-cluster.json"


def _stop(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"benchmarks.static: {message}", err=True)
    raise typer.Exit(code)


def main(
    cc: Annotated[str, typer.Option(help="Compute capabilities.")] = ",".join(map(str, LIMITS)),
    kernels: Annotated[
        str | None, typer.Option(help="Some of them: scan,combine; cluster is CUDA C++'s.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if a figure is worse than the stored one.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Store the figures.")] = False,
    results: Annotated[Path, typer.Option(help="Where static.md and static.json are.")] = RESULTS,
) -> None:
    """Registers, memory accesses and instructions of the GPU kernels. Needs no GPU."""
    if find_spec("triton") is None:
        _stop("Triton is not installed: pip install 'proxytune_kernels[triton]'")
    import triton

    if triton.knobs.runtime.interpret:
        _stop("TRITON_INTERPRET is set, so that nothing is compiled: unset it")
    from benchmarks.static import cluster, compiling, report

    known = (*BUDGETS, CLUSTER)
    chosen = known if kernels is None else parse_choices("--kernels", kernels, known, None)
    ccs = parse_choices("--cc", cc, LIMITS, None)
    complete = set(ccs) == set(LIMITS) and set(chosen) - {CLUSTER} in (set(), set(BUDGETS))
    if write and not complete:
        raise typer.BadParameter(
            "--write stores all figures: leave out --cc, and --kernels unless it is cluster"
        )
    measured: dict[str, Stored] = {}
    complaints: list[str] = []
    try:
        if units := compiling.units(ccs, chosen):
            figures = compiling.measure(units)
            measured[TRITON_FILE] = Stored(f"Triton {triton.__version__}", figures)
            report.print_tables(report.triton_tables(report.split_twins(figures)[0]))
            complaints += compiling.broken_promises(figures)
        if CLUSTER in chosen and (reason := cluster.missing()) is not None:
            console.print(f"CUDA C++ kernels: not compiled: {reason}", soft_wrap=True)
        elif CLUSTER in chosen:
            figures = cluster.measure(cluster.units(ccs))
            measured[CLUSTER_FILE] = Stored(cluster.version(), figures)
            report.print_tables(report.cluster_tables(figures))
            complaints += cluster.broken_promises(figures)
    except RuntimeError as error:
        _stop(str(error), 1)
    if write:
        for name, now in measured.items():
            now.write(results / name)
        stored = [Stored.read(results / name) for name in (TRITON_FILE, CLUSTER_FILE)]
        (results / "static.md").write_text(report.page(*stored))
        written = ", ".join(measured)
        console.print(f"Wrote {results / 'static.md'} and {written}", soft_wrap=True)
    for name, now in measured.items() if check else ():
        try:
            before = Stored.read(results / name)
        except OSError as error:
            _stop(f"--check needs the stored figures: {error}")
        found, summary = compare(now, before, complete)
        complaints += found
        console.print(summary, soft_wrap=True)
    for complaint in complaints:
        typer.echo(complaint, err=True)
    if complaints:
        _stop(f"{len(complaints)} figures are not what they should be", 1)
    console.print(
        f"{sum(len(one.figures) for one in measured.values())} kernels keep their budgets."
    )


if __name__ == "__main__":
    typer.run(main)
