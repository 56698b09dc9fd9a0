"""Batched proxy-tuned decoding: scheduler, cache, runner and engine, one module each."""

from proxytune_kernels.decoder.engine import DecodeError, Decoder
from proxytune_kernels.decoder.request import (
    FINISH_REASONS,
    RequestMetrics,
    RequestOutput,
    StreamEvent,
)

__all__ = [
    "FINISH_REASONS",
    "DecodeError",
    "Decoder",
    "RequestMetrics",
    "RequestOutput",
    "StreamEvent",
]
