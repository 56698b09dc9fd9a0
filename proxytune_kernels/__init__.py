"""Fused kernels and a batched decoder for proxy-tuning (Liu et al. 2024, arXiv 2401.08565)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proxytune_kernels.heads import Head
from proxytune_kernels.ops import (
    backends,
    combine,
    sample,
    sample_hidden,
    score,
    sharded,
    verify,
)
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.reference import SampleOutput, TopLogprobs, VerifyOutput

if TYPE_CHECKING:
    from proxytune_kernels.decoder import Decoder, Speculation
    from proxytune_kernels.trio import Trio, load_trio
    from proxytune_kernels.trio.quantization import quantize

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "Head",
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
]

# What needs transformers is imported when it is first asked for.
_LAZY = {
    "Decoder": "decoder",
    "Speculation": "decoder",
    "Trio": "trio",
    "load_trio": "trio",
    "quantize": "trio.quantization",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
