"""The options that choose a trio and how it runs, shared by the commands."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import torch
import typer

from proxytune_kernels.cli.errors import FAILED, USAGE, expected, stop
from proxytune_kernels.decoder import Decoder
from proxytune_kernels.trio import Trio, load_trio
from proxytune_kernels.trio.roles import ROLES

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
Device = Annotated[
    str | None, typer.Option(help="Where the models run, such as cuda:0; the CPU if not given.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="[ROLE=]MAP,...",
        help="Spread the layers over devices: auto, balanced or sequential; one for all roles, or "
        "such as base=auto.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="[ROLE=]int8|int4,...",
        help="Weights of the linear layers; one for all roles, or such as base=int8,expert=int4.",
    ),
]
KeepAdapter = Annotated[
    bool,
    typer.Option(
        "--keep-adapter",
        help="An expert that is a LoRA adapter stays beside the anti-expert's weights, not merged.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that a checkpoint brings.")
]


def open_trio(
    source: str | None,
    *,
    device: str | None = None,
    device_map: str | None = None,
    quantize: str | None = None,
    keep_adapter: bool = False,
    **named: Any,
) -> Trio:
    """Open a trio named by the options; leaves with the reason where it does not open."""
    roles = [role for role in ("base", "expert", "anti") if named.get(role) is not None]
    if source is None and "base" not in roles:
        raise stop("no models: give --trio shipped, --trio DIR, or --base (and the pair)", USAGE)
    named["device_map"] = _by_role("--device-map", device_map)
    named["quantize"] = _by_role("--quantize", quantize)
    named["merge_adapter"] = False if keep_adapter else None  # None: what the trio's file says
    quiet()
    if device is not None:
        _check_device(device)
    with expected(ValueError, OSError, RuntimeError):
        return load_trio(source, device=device, **named)


def open_decoder(trio: Trio, max_batch_size: int, **settings: Any) -> Decoder:
    """Set up a decoder; leaves with the reason where the settings can't run."""
    with expected(ValueError, code=USAGE), expected(RuntimeError):
        decoder = Decoder(trio, max_batch_size, **settings)
        if settings.get("compile"):
            decoder.warm_up()
        return decoder


def _by_role(option: str, text: str | None) -> str | dict[str, str] | None:
    """One value for all roles, or role -> value from ``ROLE=VALUE,...``."""
    if text is None or ("=" not in text and "," not in text):
        return text
    values: dict[str, str] = {}
    for part in text.split(","):
        role, equals, value = part.strip().partition("=")
        if not equals or role not in ROLES or not value or role in values:
            raise stop(
                f"{option} must be one value, or ROLE=VALUE for roles among {', '.join(ROLES)}, "
                f"each once, got {text!r}",
                USAGE,
            )
        values[role] = value
    return values


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # torch built without CUDA answers with an AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise stop(
            f"device must be one that torch can use here, got {device!r}: {reason}", FAILED
        ) from error


def quiet() -> None:
    """Keep transformers' progress bars, one for each small file, off the terminal.

    And torchao's notes, as transformers imports it, of the kernels that this build of torch lacks.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        install = "pip install 'proxytune_kernels[hf]'"
        raise stop(f"models need transformers ({error}): {install}", FAILED) from error
    disable_progress_bar()
