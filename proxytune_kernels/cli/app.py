"""The command line as a whole: its commands, warnings, and a reader that goes away."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

import proxytune_kernels
from proxytune_kernels.cli.analyze import analyze
from proxytune_kernels.cli.chat import chat
from proxytune_kernels.cli.demo import demo
from proxytune_kernels.cli.evaluate import evaluate
from proxytune_kernels.cli.export import export_vllm
from proxytune_kernels.cli.generate import generate
from proxytune_kernels.cli.info import info
from proxytune_kernels.cli.options import FAILED, printable, stop
from proxytune_kernels.cli.serve import serve
from proxytune_kernels.cli.sweep import sweep
from proxytune_kernels.cli.tune import tune

# Without rich markup, errors stay plain lines that scripts can read.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(serve)
app.command()(chat)
app.command()(info)
app.command()(demo)
app.command("eval")(evaluate)
app.command()(analyze)
app.command()(tune)
app.command()(sweep)
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
    """Run the command line, and leave with its exit code; never with a traceback.

    Exit codes: 0 done, 1 failed while running (a trio that does not open, a prompt that does not
    fit, output that can't be written), 2 wrong usage, 130 interrupted. PROXYTUNE_TRACEBACK=1 lets
    an unexpected error through, with its traceback.
    """
    warnings.showwarning = _show_warning
    if sys.stdout is None or sys.stderr is None:
        # Its descriptor is closed: there is nobody to say it to.
        raise SystemExit(FAILED)
    for stream in (sys.stdout, sys.stderr):
        # What the terminal's encoding lacks is shown by its code.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    code = _run()
    if (problem := _flush()) is not None and code == 0:
        code = stop(f"standard output can't be written: {problem}", FAILED).exit_code
    raise SystemExit(code)


def _run() -> int:
    """Run the command that the arguments name; returns its exit code."""
    try:
        app(prog_name="proxytune")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return FAILED  # the reader has gone away, which is no mistake to be told of
    except OSError as error:
        return stop(error, FAILED).exit_code
    except Exception as error:
        if os.environ.get("PROXYTUNE_TRACEBACK") == "1":
            raise
        return stop(
            f"unexpected {type(error).__name__}: {error} (please report it; PROXYTUNE_TRACEBACK=1 "
            "shows where)",
            FAILED,
        ).exit_code
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"Warning: {printable(' '.join(str(message).split()))}", err=True)


def _flush() -> OSError | None:
    """Flush standard output; what is wrong with it, if it can't be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None if isinstance(error, BrokenPipeError) else error
    return None
