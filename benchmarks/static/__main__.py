"""Compile the kernels for GPUs that are not here, and look at what came out.

``python -m benchmarks.static --help``; docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from benchmarks.harness.options import parse_choices
from benchmarks.harness.report import RESULTS, say
from benchmarks.static.figures import (
    LIMITS,
    Figures,
    Unit,
    broken,
    compare,
    read_figures,
    write_figures,
)

CLUSTER = "cluster"
"""All CUDA C++ kernels, in a choice of kernels."""


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
    file: Annotated[Path, typer.Option(help="The stored figures.")] = RESULTS / "static.csv",
) -> None:
    """Registers, memory accesses and instructions of the GPU kernels. Needs no GPU."""
    if find_spec("triton") is None:
        _stop("Triton is not installed: pip install 'proxytune_kernels[triton]'")
    import triton

    if triton.knobs.runtime.interpret:
        _stop("TRITON_INTERPRET is set, so that nothing is compiled: unset it")
    from benchmarks.static import cuda_kernels, triton_kernels

    known = (*triton_kernels.KERNELS, CLUSTER)
    chosen = known if kernels is None else parse_choices("--kernels", kernels, known, None)
    ccs = parse_choices("--cc", cc, LIMITS, None)
    reason = cuda_kernels.missing() if CLUSTER in chosen else None
    complete = set(ccs) == set(LIMITS) and set(chosen) == set(known)
    if write and not complete:
        raise typer.BadParameter("--write stores all figures: leave out --cc and --kernels")
    if write and reason is not None:
        _stop(f"--write stores the CUDA C++ kernels' figures too, and {reason}")
    if reason is not None:
        say(f"CUDA C++ kernels: not compiled: {reason}")
    now: dict[Unit, Figures] = {}
    complaints: list[str] = []
    for kind, units in (
        (triton_kernels, triton_kernels.units(ccs, chosen)),
        (cuda_kernels, cuda_kernels.units(ccs) if CLUSTER in chosen and reason is None else []),
    ):
        try:
            figures = kind.measure(units) if units else {}
        except RuntimeError as error:
            _stop(str(error), 1)
        for unit, one in figures.items():
            complaints += [f"{unit}: {what}" for what in broken(one, kind.promise(unit))]
        now |= figures
    rows = [(*Unit._fields, *Figures._fields), *((*unit, *one) for unit, one in now.items())]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(f"{cell!s:<{n}}" for cell, n in zip(row, widths, strict=True)))
    if write:
        write_figures(file, now)
        say(f"Wrote {file}")
    if check:
        try:
            found, summaries = compare(now, read_figures(file), complete)
        except OSError as error:
            _stop(f"--check needs the stored figures: {error}")
        complaints += found
        for summary in summaries:
            say(summary)
    for complaint in complaints:
        typer.echo(complaint, err=True)
    if complaints:
        _stop(f"{len(complaints)} figures are not what they should be", 1)
    say(f"{len(now)} kernels keep their budgets.")


if __name__ == "__main__":
    typer.run(main)
