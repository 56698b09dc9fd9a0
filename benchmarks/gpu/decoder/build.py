"""The timed trios: one base, and its pair twice, as two models and as one with an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from benchmarks.gpu.decoder import random_models
from benchmarks.gpu.decoder.modes import SEPARATE, SHARED
from benchmarks.gpu.decoder.random_models import (
    adapted_model,
    byte_tokenizer,
    random_model,
    step_bytes,
    weight_bytes,
)
from benchmarks.gpu.decoder.shapes import BF16, INT8, TrioShape
from proxytune_kernels import Trio

_SEEDS = {"base": 0, "expert": 1, "anti": 2, "adapter": 3}


def planned_bytes(shape: TrioShape) -> int:
    """Bytes of the weights of a trio with a pair of two models, before anything is built."""
    base = random_models.planned_bytes(shape.base, shape.base_weights)
    return base + 2 * random_models.planned_bytes(shape.pair, BF16)


class _Alone(Module):
    """A layer where a causal LM is expected, one without a head."""

    def __init__(self, layer: Module) -> None:
        super().__init__()
        self.layer = layer

    def get_output_embeddings(self) -> None:
        """There is none."""


def int8_linear(layer: Module) -> Module:
    """A linear layer with its weights in int8, a scale a row, as torchao has them.

    Raises:
        QuantizationError: torchao is not installed.
    """
    from proxytune_kernels.trio.quantization import quantize

    return quantize(_Alone(layer), "int8").layer


def build_trios(shape: TrioShape, device: str) -> dict[str, Trio]:
    """Both trios of a shape, with random weights; they share base and anti-expert.

    Raises:
        torch.OutOfMemoryError: the device's memory does not suffice.
        QuantizationError: the base is in int8, and torchao is not installed.
    """
    quantize = int8_linear if shape.base_weights == INT8 else None
    base = random_model(shape.base, device, _SEEDS["base"], quantize=quantize)
    expert, anti = (random_model(shape.pair, device, _SEEDS[role]) for role in ("expert", "anti"))
    tokenizer = byte_tokenizer(shape.base.vocab_size)
    adapted = adapted_model(anti, _SEEDS["adapter"])
    return {
        SEPARATE: Trio.from_models(base, expert, anti, tokenizer),
        SHARED: Trio.from_models(base, adapted, anti, tokenizer),
    }


def weights_record(shape: TrioShape, trios: Mapping[str, Trio]) -> dict[str, Any]:
    """A line of results: bytes of weights by role, and those that a step reads."""
    separate, shared = (trios[pair].models for pair in (SEPARATE, SHARED))
    pair = [shared["expert"], shared["anti"]]
    return {
        "op": "weights",
        "trio": shape.name,
        "title": shape.title,
        "bytes": {role: weight_bytes([m]) for role, m in separate.items()}
        | {"shared pair": weight_bytes(pair)},
        "step_bytes": {role: step_bytes([m]) for role, m in separate.items()}
        | {"shared pair": step_bytes(pair)},
        "cache_bytes_per_token": {
            "base": shape.base.cache_bytes_per_token(),
            "expert": shape.pair.cache_bytes_per_token(),
            "anti": shape.pair.cache_bytes_per_token(),
        },
    }
