"""The command line as a whole: its commands, warnings, and a reader that goes away."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

import proxytune_kernels
from proxytune_kernels.cli.demo import demo
from proxytune_kernels.cli.evaluate import evaluate
from proxytune_kernels.cli.export import export_vllm
from proxytune_kernels.cli.generate import generate
from proxytune_kernels.cli.info import info

# Without rich markup, errors stay plain lines that scripts can read.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(info)
app.command()(demo)
app.command("eval")(evaluate)
app.command("export-vllm")(export_vllm)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"proxytune {proxytune_kernels.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Steer a large language model with two small ones at decoding time (proxy-tuning)."""


def main() -> None:
    """Run the command line, and leave with its exit code."""
    warnings.showwarning = _show_warning
    try:
        app(prog_name="proxytune")
    finally:
        _flush()


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"Warning: {message}", file=sys.stderr)


def _flush() -> None:
    """Flush standard output while a reader that has gone away can still be dealt with."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
