"""Batched proxy-tuned decoding: the decoder, its loop, step, models and caches, a module each."""

from proxytune_kernels.decoder.check import MemberError
from proxytune_kernels.decoder.decoder import DecodeError, Decoder, EventStream
from proxytune_kernels.decoder.grammar import Grammar, GrammarError
from proxytune_kernels.decoder.request import (
    FINISH_REASONS,
    RequestMetrics,
    RequestOutput,
    Steering,
    StreamEvent,
)
from proxytune_kernels.decoder.speculation import Speculation, SpeculationStats

__all__ = [
    "FINISH_REASONS",
    "DecodeError",
    "Decoder",
    "EventStream",
    "Grammar",
    "GrammarError",
    "MemberError",
    "RequestMetrics",
    "RequestOutput",
    "Speculation",
    "SpeculationStats",
    "Steering",
    "StreamEvent",
]
