"""One command for a GPU: build, contract suite, peers side by side, results.

``python -m benchmarks.gpu --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import BATCH_SIZES, PROVIDERS, plan
from benchmarks.gpu.device import NoDevice, find_device, slug
from benchmarks.gpu.run import DEFAULT_STAGES, STAGES, Options, run
from benchmarks.op_cases import VOCAB_SIZES
from benchmarks.report import RESULTS


def _among(option: str, text: str, known: Iterable[object]) -> list[str]:
    """Values of a comma-separated option, in the order they are known in.

    Raises:
        typer.BadParameter: names the option, what it got and what it wanted.
    """
    names = [str(value) for value in known]
    given = text.split(",")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise typer.BadParameter(f"{option} must be among {', '.join(names)}, got {unknown[0]!r}")
    return [name for name in names if name in given]


def _joined(values: Iterable[object]) -> str:
    return ",".join(str(value) for value in values)


def main(
    stage: Annotated[str, typer.Option(help=f"Of {_joined(STAGES)}.")] = _joined(DEFAULT_STAGES),
    budget: Annotated[
        float, typer.Option(min=1, help="Seconds in all; the least important timings are dropped.")
    ] = 540,
    providers: Annotated[str, typer.Option(help="What is timed.")] = _joined(PROVIDERS),
    vocab_sizes: Annotated[str, typer.Option(help="Of those in the default.")] = _joined(
        VOCAB_SIZES
    ),
    batch_sizes: Annotated[str, typer.Option(help="Of those in the default.")] = _joined(
        BATCH_SIZES
    ),
    workers: Annotated[int, typer.Option(min=1, help="Processes of the contract suite.")] = 4,
    output: Annotated[
        Path | None, typer.Option(help="JSON lines.", show_default="gpu-<device>.jsonl in results")
    ] = None,
    plot: Annotated[bool, typer.Option(help="Also pictures beside the output.")] = True,
) -> None:
    """Build, run the contract suite, then time the operators beside their peers, on a GPU."""
    limit = Budget(budget)
    stages = _among("--stage", stage, STAGES)
    units = plan(
        _among("--providers", providers, PROVIDERS),
        [int(size) for size in _among("--vocab-sizes", vocab_sizes, VOCAB_SIZES)],
        [int(size) for size in _among("--batch-sizes", batch_sizes, BATCH_SIZES)],
    )
    try:
        device = find_device()
    except NoDevice as error:
        typer.echo(f"benchmarks.gpu: {error}", err=True)
        raise typer.Exit(2) from None
    where = output or RESULTS / f"gpu-{slug(device.name)}.jsonl"
    raise typer.Exit(run(device, Options(tuple(stages), units, workers, where, plot), limit))


if __name__ == "__main__":
    typer.run(main)
