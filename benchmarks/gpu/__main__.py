"""Times on a GPU: the operators beside their peers, or the decoder beside the naive loop.

``python -m benchmarks.gpu --help``; docs/benchmarks.md says how each figure is obtained, and which
command tests the kernels on the device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu import operators
from benchmarks.gpu.cases import BATCH_SIZES, PROVIDERS, plan
from benchmarks.gpu.device import NoDevice, find_device, say, slug
from benchmarks.harness.options import parse_choices
from benchmarks.harness.random_models import TRIOS
from benchmarks.harness.report import REPOSITORY, RESULTS
from benchmarks.harness.samplers import VOCAB_SIZES

DECODER_BATCH_SIZES = (1, 4, 16)
_DECODER_NEEDS = ("transformers", "peft")


def _joined(values: Iterable[object]) -> str:
    return ",".join(str(value) for value in values)


def _end(why: object) -> typer.Exit:
    typer.echo(f"benchmarks.gpu: {why}", err=True)
    return typer.Exit(2)


def build(root: Path = REPOSITORY) -> None:
    """Build what the sources are newer than, and begin anew: this process has asked what is there.

    A fresh clone has no extensions, and without them the cluster kernels would be left out.
    """
    again = "BENCHMARKS_GPU_BUILT"
    built = [path.stat().st_mtime for path in (root / "proxytune_kernels").glob("_c*.so")]
    sources = [*(root / "csrc").rglob("*.*"), root / "setup.py", root / "build_cuda.py"]
    newest = max(path.stat().st_mtime for path in sources)
    if again in os.environ or (len(built) == 2 and min(built) > newest):
        return
    say("Building the extensions: minutes, the first time.")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=root, check=False).returncode != 0:
        raise _end("the build failed: its last lines are above")
    os.environ[again] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]])


def main(
    budget: Annotated[
        float, typer.Option(min=1, help="Seconds after which no further case is begun.")
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
    output: Annotated[
        Path | None, typer.Option(help="JSON lines.", show_default="gpu-<device>.jsonl in results")
    ] = None,
    decoder: Annotated[
        bool, typer.Option("--decoder", help="The decoder, with random weights at true shapes.")
    ] = False,
    trios: Annotated[str, typer.Option(help="With --decoder.")] = _joined(TRIOS),
) -> None:
    """Check, then time the operators beside their peers on a GPU, the most important first."""
    known = DECODER_BATCH_SIZES if decoder else BATCH_SIZES
    rows = parse_choices("--batch-sizes", batch_sizes or _joined(known), known, None)
    shapes = parse_choices("--trios", trios, TRIOS, None)
    units = plan(
        parse_choices("--providers", providers, PROVIDERS, None),
        parse_choices("--vocab-sizes", vocab_sizes, VOCAB_SIZES, None),
        rows,
    )
    try:
        device = find_device()
    except NoDevice as error:
        raise _end(error) from None
    build()
    where = RESULTS / f"gpu-{'decoder-' if decoder else ''}{slug(device.name)}.jsonl"
    if not decoder:
        raise typer.Exit(operators.run(device, units, output or where, budget))
    for package in _DECODER_NEEDS:
        if find_spec(package) is None:
            raise _end(f"--decoder needs {package}: pip install 'proxytune_kernels[hf,lora]'")
    from benchmarks.gpu.decoder import run

    raise typer.Exit(run(device, shapes, rows, output or where, budget))


if __name__ == "__main__":
    typer.run(main)
