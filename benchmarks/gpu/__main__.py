"""One command for a GPU: build, contract suite, peers side by side, results; or the decoder.

``python -m benchmarks.gpu --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import BATCH_SIZES, PROVIDERS, plan
from benchmarks.gpu.decoder.shapes import BATCH_SIZES as DECODER_BATCH_SIZES
from benchmarks.gpu.decoder.shapes import TRIOS, TrioShape
from benchmarks.gpu.device import Device, NoDevice, find_device, slug
from benchmarks.gpu.run import DEFAULT_STAGES, STAGES, Options, run
from benchmarks.op_cases import VOCAB_SIZES
from benchmarks.report import RESULTS

_OPERATORS_ONLY = ("--stage", "--providers", "--vocab-sizes", "--workers")
_DECODER_NEEDS = ("transformers", "peft")


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


def _refuse(context: typer.Context, options: Iterable[str], why: str) -> None:
    """Refuse options that the other half of the command has.

    Raises:
        typer.BadParameter: one of them was given.
    """
    for option in options:
        source = context.get_parameter_source(option.strip("-").replace("-", "_"))
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"{option} {why}")


def main(
    context: typer.Context,
    stage: Annotated[str, typer.Option(help=f"Of {_joined(STAGES)}.")] = _joined(DEFAULT_STAGES),
    budget: Annotated[
        float, typer.Option(min=1, help="Seconds in all; the least important timings are dropped.")
    ] = 540,
    providers: Annotated[str, typer.Option(help="What is timed.")] = _joined(PROVIDERS),
    vocab_sizes: Annotated[str, typer.Option(help="Of those in the default.")] = _joined(
        VOCAB_SIZES
    ),
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            help="Of those in the default.",
            show_default=f"{_joined(BATCH_SIZES)}; --decoder: {_joined(DECODER_BATCH_SIZES)}",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the contract suite.")] = 4,
    output: Annotated[
        Path | None, typer.Option(help="JSON lines.", show_default="gpu-<device>.jsonl in results")
    ] = None,
    plot: Annotated[bool, typer.Option(help="Also pictures beside the output.")] = True,
    decoder: Annotated[
        bool, typer.Option("--decoder", help="The decoder, with random weights at true shapes.")
    ] = False,
    trios: Annotated[str, typer.Option(help="With --decoder: of the default.")] = _joined(TRIOS),
) -> None:
    """Build, run the contract suite, then time the operators beside their peers, on a GPU."""
    limit = Budget(budget)
    if decoder:
        _refuse(context, _OPERATORS_ONLY, "does not go with --decoder")
        shapes = [TRIOS[name] for name in _among("--trios", trios, TRIOS)]
        rows = _sizes(batch_sizes, DECODER_BATCH_SIZES)
        raise typer.Exit(_run_decoder(shapes, rows, output, plot, limit))
    _refuse(context, ("--trios",), "goes with --decoder only")
    stages = _among("--stage", stage, STAGES)
    units = plan(
        _among("--providers", providers, PROVIDERS),
        [int(size) for size in _among("--vocab-sizes", vocab_sizes, VOCAB_SIZES)],
        _sizes(batch_sizes, BATCH_SIZES),
    )
    device = _device()
    where = output or RESULTS / f"gpu-{slug(device.name)}.jsonl"
    raise typer.Exit(run(device, Options(tuple(stages), units, workers, where, plot), limit))


def _sizes(text: str | None, known: Iterable[int]) -> list[int]:
    """Batch sizes asked for, or all."""
    return [int(size) for size in _among("--batch-sizes", text or _joined(known), known)]


def _device() -> Device:
    """What to measure on; says why there is nothing, and ends the command with code 2."""
    try:
        return find_device()
    except NoDevice as error:
        raise _end(str(error)) from None


def _end(why: str) -> typer.Exit:
    typer.echo(f"benchmarks.gpu: {why}", err=True)
    return typer.Exit(2)


def _run_decoder(
    shapes: Sequence[TrioShape],
    batch_sizes: Sequence[int],
    output: Path | None,
    plot: bool,
    limit: Budget,
) -> int:
    """The decoder's half of the command; returns the exit code."""
    device = _device()
    for package in _DECODER_NEEDS:
        if importlib.util.find_spec(package) is None:
            raise _end(f"--decoder needs {package}: pip install 'proxytune_kernels[hf,lora]'")
    from benchmarks.gpu.decoder import run as decoder

    where = output or RESULTS / f"gpu-decoder-{slug(device.name)}.jsonl"
    options = decoder.Options(tuple(shapes), tuple(batch_sizes), where, plot)
    return decoder.run(device, options, limit)


if __name__ == "__main__":
    typer.run(main)
