"""The options that choose a trio and how it runs, shared by the commands."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from proxytune_kernels.cli.errors import FAILED, USAGE, expected, stop
from proxytune_kernels.decoder import Decoder
from proxytune_kernels.trio import Trio, load_trio

_NAMED = "Directory or hub name of the {}."

Source = Annotated[
    str | None,
    typer.Option(
        "--trio",
        metavar="shipped|DIR",
        help="The small trio that comes with the package, or a directory with a trio.json.",
    ),
]
Base = Annotated[str | None, typer.Option(metavar="MODEL", help=_NAMED.format("base"))]
Expert = Annotated[str | None, typer.Option(metavar="MODEL", help=_NAMED.format("expert"))]
Anti = Annotated[str | None, typer.Option(metavar="MODEL", help=_NAMED.format("anti-expert"))]
TokenizerName = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="MODEL", help="One for all three; else each has its own."),
]
Dtype = Annotated[
    str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16 or float64.")
]
Device = Annotated[str, typer.Option(help="Where the models run, such as cpu or cuda:0.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that a checkpoint brings.")
]


def open_trio(source: str | None, **named: Any) -> Trio:
    """Open a trio named by the options; leaves with the reason where it does not open."""
    roles = [role for role in ("base", "expert", "anti") if named.get(role) is not None]
    if source is None and "base" not in roles:
        raise stop("no models: give --trio shipped, --trio DIR, or --base (and the pair)", USAGE)
    _quiet()
    _check_device(named.get("device", "cpu"))
    with expected(ValueError, OSError, RuntimeError):
        return load_trio(source, **named)


def open_decoder(trio: Trio, max_batch_size: int, **settings: Any) -> Decoder:
    """Set up a decoder; leaves with the reason where the settings can't run."""
    with expected(ValueError, code=USAGE), expected(RuntimeError):
        decoder = Decoder(trio, max_batch_size, **settings)
        if settings.get("compile"):
            decoder.warm_up()
        return decoder


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # torch built without CUDA answers with an AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise stop(
            f"device must be one that torch can use here, got {device!r}: {reason}", FAILED
        ) from error


def _quiet() -> None:
    """Keep transformers' progress bars, one for each small file, off the terminal."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        install = "pip install 'proxytune_kernels[hf]'"
        raise stop(f"models need transformers ({error}): {install}", FAILED) from error
    logging.disable_progress_bar()
