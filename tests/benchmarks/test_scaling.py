"""The table of docs/scaling.md is what its formulas give for Llama 2's shapes."""

from __future__ import annotations

import re

import pytest

from benchmarks.harness.random_models import (
    LLAMA_7B,
    LLAMA_13B,
    LLAMA_70B,
    ModelShape,
    empty_model,
)
from tests.documents import ROOT

SHAPES = {"7B": LLAMA_7B, "13B": LLAMA_13B, "70B": LLAMA_70B}
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2.5 / 128}
UTILIZATION, DEVICE = 0.92, 80e9
ROW = re.compile(r"^\| (\d+B) \+ 7B \+ 7B \| (\w+) \| (\w+) \| (.*) \|$", re.M)
ROWS = ROW.findall((ROOT / "docs/scaling.md").read_text())


def weights(shape: ModelShape, kind: str) -> float:
    """Bytes, of the parameters that transformers makes: matrices of layers, and the rest."""
    parameters = dict(empty_model(shape).named_parameters())
    linear = sum(p.numel() for n, p in parameters.items() if ".layers." in n and p.dim() == 2)
    return linear * BYTES[kind] + 2 * (sum(p.numel() for p in parameters.values()) - linear)


def cache_bytes(shape: ModelShape) -> int:
    """Bytes of one token's keys and values in bf16, all layers."""
    return 2 * 2 * shape.layers * shape.kv_heads * (shape.hidden_size // shape.heads)


def test_there_are_rows() -> None:
    assert len(ROWS) == 10


@pytest.mark.parametrize(("size", "base", "pair", "figures"), ROWS)
def test_a_row(size: str, base: str, pair: str, figures: str) -> None:
    own, two = weights(SHAPES[size], base), 2 * weights(LLAMA_7B, pair)
    token = cache_bytes(SHAPES[size]) + 2 * cache_bytes(LLAMA_7B)
    left = [(n * DEVICE * UTILIZATION - own - two) / token / 1e3 for n in (1, 2, 4, 8)]
    wanted = [f"{held / 1e9:.1f}" for held in (own, two, own + two)]
    wanted += [f"{tokens:.1f}" if tokens > 0 else "-" for tokens in left]
    assert figures.split(" | ") == wanted
