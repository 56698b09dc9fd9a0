"""One command for a GPU: build, contract suite, peers side by side, results; or the decoder.

``python -m benchmarks.gpu --help``; docs/benchmarks.md says how each figure is obtained.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from benchmarks.gpu.cases import BATCH_SIZES, PROVIDERS, plan
from benchmarks.gpu.decoder.random_models import BATCH_SIZES as DECODER_BATCH_SIZES
from benchmarks.gpu.decoder.random_models import TRIOS
from benchmarks.gpu.device import NoDevice, find_device, slug
from benchmarks.gpu.run import DEFAULT_STAGES, STAGES, Options, run
from benchmarks.gpu.session import Budget
from benchmarks.harness.logits import VOCAB_SIZES
from benchmarks.harness.options import parse_choices
from benchmarks.harness.report import RESULTS

T = TypeVar("T")

_OPERATORS_ONLY = ("stage", "providers", "vocab_sizes", "workers")
_DECODER_NEEDS = ("transformers", "peft")


def _joined(values: Iterable[object]) -> str:
    return ",".join(str(value) for value in values)


def _refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that the other half of the command has."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} {why}")


def _end(why: object) -> typer.Exit:
    typer.echo(f"benchmarks.gpu: {why}", err=True)
    return typer.Exit(2)


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

    def among(option: str, text: str, known: Iterable[T]) -> list[T]:
        """What was chosen, in the order that it is known in."""
        chosen = parse_choices(option, text, known, None)
        return [value for value in known if value in chosen]

    limit = Budget(budget)
    if decoder:
        _refuse(context, _OPERATORS_ONLY, "does not go with --decoder")
    else:
        _refuse(context, ("trios",), "goes with --decoder only")
    known = DECODER_BATCH_SIZES if decoder else BATCH_SIZES
    rows = among("--batch-sizes", batch_sizes or _joined(known), known)
    shapes = [TRIOS[name] for name in among("--trios", trios, TRIOS)]
    stages = among("--stage", stage, STAGES)
    units = plan(
        among("--providers", providers, PROVIDERS),
        among("--vocab-sizes", vocab_sizes, VOCAB_SIZES),
        rows,
    )
    try:
        device = find_device()
    except NoDevice as error:
        raise _end(error) from None
    where = RESULTS / f"gpu-{'decoder-' if decoder else ''}{slug(device.name)}.jsonl"
    if not decoder:
        raise typer.Exit(run(device, Options(stages, units, workers, output or where, plot), limit))
    for package in _DECODER_NEEDS:
        if find_spec(package) is None:
            raise _end(f"--decoder needs {package}: pip install 'proxytune_kernels[hf,lora]'")
    from benchmarks.gpu.decoder.run import run as run_decoder

    raise typer.Exit(run_decoder(device, shapes, rows, output or where, limit, plot=plot))


if __name__ == "__main__":
    typer.run(main)
