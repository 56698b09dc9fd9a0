"""Compile the Triton kernels for GPUs that are not here, and look at what came out.

``python -m benchmarks.static --help``; docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from benchmarks.choices import parse_choices
from benchmarks.report import RESULTS, console
from benchmarks.static.occupancy import LIMITS


def _stop(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"benchmarks.static: {message}", err=True)
    raise typer.Exit(code)


def main(
    cc: Annotated[str, typer.Option(help="Compute capabilities.")] = ",".join(map(str, LIMITS)),
    kernels: Annotated[str | None, typer.Option(help="Some of them: scan,combine.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if a figure is worse than the stored one.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Store the figures.")] = False,
    results: Annotated[Path, typer.Option(help="Where static.md and static.json are.")] = RESULTS,
) -> None:
    """Registers, memory accesses and instructions of the Triton kernels. Needs no GPU."""
    if find_spec("triton") is None:
        _stop("Triton is not installed: pip install 'proxytune_kernels[triton]'")
    import triton

    if triton.knobs.runtime.interpret:
        _stop("TRITON_INTERPRET is set, so that nothing is compiled: unset it")
    from benchmarks.static import run
    from benchmarks.static.budgets import BUDGETS
    from benchmarks.static.report import page, print_figures

    chosen = None if kernels is None else parse_choices("--kernels", kernels, BUDGETS, None)
    units = run.units(parse_choices("--cc", cc, LIMITS, None), chosen)
    if write and set(units) != set(run.units(LIMITS)):
        raise typer.BadParameter("--write stores all figures: leave out --cc and --kernels")
    try:
        figures = run.measure(units)
    except RuntimeError as error:
        _stop(str(error), 1)
    print_figures(figures)
    complaints = list(run.broken_promises(figures))
    now = run.Stored(triton.__version__, figures)
    if write:
        now.write(results / "static.json")
        (results / "static.md").write_text(page(now))
        console.print(f"Wrote {results / 'static.md'} and static.json", soft_wrap=True)
    if check:
        try:
            stored = run.Stored.read(results / "static.json")
        except OSError as error:
            _stop(f"--check needs the stored figures: {error}")
        comparison = run.compare(now, stored, complete=set(units) == set(run.units(LIMITS)))
        complaints += comparison.complaints
        console.print(comparison.summary, soft_wrap=True)
    for complaint in complaints:
        typer.echo(complaint, err=True)
    if complaints:
        _stop(f"{len(complaints)} figures are not what they should be", 1)
    console.print(f"{len(figures)} kernels keep their budgets.")


if __name__ == "__main__":
    typer.run(main)
