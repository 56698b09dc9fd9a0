"""``proxytune export-vllm``: a trio as a directory that vLLM serves."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Annotated

import typer

from proxytune_kernels.cli.options import USAGE, ModelOptions, expected, quiet, stop, with_options
from proxytune_kernels.integrations.vllm_plugin.export import export, serve_command


@with_options
def export_vllm(
    out: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Directory to write, new or empty.")
    ] = None,
    *,
    models: ModelOptions,
    alpha: Annotated[float, typer.Option(help="Of requests that do not say one.")] = 1.0,
    dtype: Annotated[
        str, typer.Option(help="That vLLM runs all three in: auto, float32, bfloat16 or float16.")
    ] = "auto",
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the weights, so that OUT can be moved.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export, and nothing else.")
    ] = False,
    print_overrides: Annotated[
        bool,
        typer.Option(
            "--print-overrides", help="Write nothing; print the command that serves the base."
        ),
    ] = False,
) -> None:
    """Write a directory that `vllm serve OUT` opens with no other flag.

    Example: proxytune export-vllm --trio shipped served
    """
    if models.trio is None and models.base is None:
        raise stop("no models: give --trio shipped, --trio DIR, or --base, --expert, --anti", USAGE)
    if (out is None) != print_overrides:
        raise stop("give OUT, or --print-overrides without it", USAGE)
    named = asdict(models)
    source = named.pop("trio")
    quiet()
    with expected(ValueError, OSError, RuntimeError):
        if out is None:
            if dtype != "auto" or copy or force:
                raise stop("--print-overrides takes no option of what is written", USAGE)
            typer.echo(shlex.join(serve_command(source, **named, alpha=alpha)))
            return
        written = export(out, source, **named, alpha=alpha, dtype=dtype, copy=copy, force=force)
    for role, origin in written.weights.items():
        typer.echo(f"{role}: {origin}")
    typer.echo(f"vocabulary: {written.vocab_size} ids that mean the same to every role")
    for note in written.notes:
        typer.echo(note)
    typer.echo(shlex.join(["vllm", "serve", str(written.directory)]))
