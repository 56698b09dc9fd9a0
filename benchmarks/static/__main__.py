"""Compile the kernels for GPUs that are not here, and look at what came out.

``python -m benchmarks.static --help``; docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from benchmarks.choices import parse_choices
from benchmarks.report import RESULTS, console
from benchmarks.static.occupancy import LIMITS

if TYPE_CHECKING:
    from benchmarks.static.run import Stored

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
    from benchmarks.static import cluster, report, run
    from benchmarks.static.budgets import BUDGETS

    known = (*BUDGETS, CLUSTER)
    chosen = known if kernels is None else parse_choices("--kernels", kernels, known, None)
    ccs = parse_choices("--cc", cc, LIMITS, None)
    complete = set(ccs) == set(LIMITS) and set(chosen) - {CLUSTER} in (set(), set(BUDGETS))
    if write and not complete:
        raise typer.BadParameter(
            "--write stores all figures: leave out --cc, and --kernels unless it is cluster"
        )
    try:
        measured = _measure(set(chosen), ccs)
    except RuntimeError as error:
        _stop(str(error), 1)
    complaints: list[str] = []
    if TRITON_FILE in measured:
        report.print_figures(measured[TRITON_FILE].figures)
        complaints += run.broken_promises(measured[TRITON_FILE].figures)
    if CLUSTER_FILE in measured:
        report.print_cluster_figures(measured[CLUSTER_FILE].figures)
        complaints += cluster.broken_promises(measured[CLUSTER_FILE].figures)
    if write:
        _write(measured, results)
    if check:
        complaints += _compare(measured, results, complete)
    for complaint in complaints:
        typer.echo(complaint, err=True)
    if complaints:
        _stop(f"{len(complaints)} figures are not what they should be", 1)
    console.print(
        f"{sum(len(one.figures) for one in measured.values())} kernels keep their budgets."
    )


def _measure(chosen: Collection[str], ccs: Collection[int]) -> dict[str, Stored]:
    """Figures of the kernels chosen, by the file that they are stored in."""
    import triton

    from benchmarks.static import cluster, run

    measured = {}
    units = run.units(ccs, chosen)
    if units:
        measured[TRITON_FILE] = run.Stored(f"Triton {triton.__version__}", run.measure(units))
    if CLUSTER in chosen:
        reason = cluster.missing()
        if reason is None:
            figures = cluster.measure(cluster.units(ccs))
            measured[CLUSTER_FILE] = run.Stored(cluster.version(), figures)
        else:
            console.print(f"CUDA C++ kernels: not compiled: {reason}", soft_wrap=True)
    return measured


def _write(measured: dict[str, Stored], results: Path) -> None:
    """Store what was measured, and the page, with what is stored already of the rest."""
    from benchmarks.static import report, run

    for name, figures in measured.items():
        figures.write(results / name)
    stored = [run.Stored.read(results / name) for name in (TRITON_FILE, CLUSTER_FILE)]
    (results / "static.md").write_text(report.page(*stored))
    written = ", ".join(measured)
    console.print(f"Wrote {results / 'static.md'} and {written}", soft_wrap=True)


def _compare(measured: dict[str, Stored], results: Path, complete: bool) -> Collection[str]:
    """What is worse than the stored figures."""
    from benchmarks.static import run

    complaints: list[str] = []
    for name, now in measured.items():
        try:
            stored = run.Stored.read(results / name)
        except OSError as error:
            _stop(f"--check needs the stored figures: {error}")
        comparison = run.compare(now, stored, complete)
        complaints += comparison.complaints
        console.print(comparison.summary, soft_wrap=True)
    return complaints


if __name__ == "__main__":
    typer.run(main)
