"""Fused kernels and a batched decoder for proxy-tuning (Liu et al. 2024, arXiv 2401.08565)."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any


def leave(*_: object) -> None:
    """End the process as an interrupt does, at once."""
    os._exit(130)


def _is_command() -> bool:
    """Whether this process is the command's own: ``proxytune``, ``python -m proxytune_kernels``."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).name == "proxytune" or (program == "-m" and __name__ in sys.orig_argv)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # What follows imports torch, which takes seconds. An interrupt that is raised in there is a
    # traceback, or aborts in C++. The command line takes this back.
    with suppress(ValueError):  # in another thread than the first
        signal.signal(signal.SIGINT, leave)

# ruff: noqa: E402 (the above comes first)
from proxytune_kernels.heads import Head
from proxytune_kernels.ops import (
    backends,
    combine,
    sample,
    sample_hidden,
    score,
    sharded,
    verify,
    warm_up,
)
from proxytune_kernels.params import Edits, RowParams, SamplingParams
from proxytune_kernels.reference import Attribution, SampleOutput, TopLogprobs, VerifyOutput

if TYPE_CHECKING:
    from proxytune_kernels.decoder import Decoder, Grammar, Speculation
    from proxytune_kernels.trio import RemoteBase, Trio, load_trio
    from proxytune_kernels.trio.quantization import quantize

__version__ = "0.2.0"

__all__ = [
    "Attribution",
    "Decoder",
    "Edits",
    "Grammar",
    "Head",
    "RemoteBase",
    "RowParams",
    "SampleOutput",
    "SamplingParams",
    "Speculation",
    "TopLogprobs",
    "Trio",
    "VerifyOutput",
    "backends",
    "combine",
    "load_trio",
    "quantize",
    "sample",
    "sample_hidden",
    "score",
    "sharded",
    "verify",
    "warm_up",
]

# What needs transformers is imported when it is first asked for.
_LAZY = {
    "Decoder": "decoder",
    "Grammar": "decoder",
    "Speculation": "decoder",
    "RemoteBase": "trio",
    "Trio": "trio",
    "load_trio": "trio",
    "quantize": "trio.quantization",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
