"""Shapes of the trios that are timed: Llama 2's, as published.

How long a step takes depends on shapes and dtypes, not on what the weights are; so nothing has to
be downloaded, and no disk is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCAB_SIZE = 32_000
BATCH_SIZES = (1, 4, 16)

BF16, INT8 = "bf16", "int8"
"""How weights are stored; int8 is weight-only, activations stay in bf16."""


@dataclass(frozen=True)
class ModelShape:
    """A Llama's dimensions.

    Source: Touvron et al. 2023, arXiv 2307.09288, and the published configurations.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int = VOCAB_SIZE
    context: int = 4096

    def config(self) -> Any:
        """The transformers configuration; embedding and head are two matrices."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )

    def cache_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in bf16, all layers."""
        return 2 * 2 * self.layers * self.kv_heads * (self.hidden_size // self.heads)


LLAMA_7B = ModelShape(4096, 11_008, 32, 32, 32)
LLAMA_13B = ModelShape(5120, 13_824, 40, 40, 40)
LLAMA_70B = ModelShape(8192, 28_672, 80, 64, 8)


@dataclass(frozen=True)
class TrioShape:
    """A base and a pair, and how the base's weights are stored; the pair's are bf16."""

    name: str
    """As on the command line and in the results."""
    title: str
    base: ModelShape
    pair: ModelShape
    base_weights: str = BF16
    """:data:`BF16` or :data:`INT8`."""


TRIOS = {
    shape.name: shape
    for shape in (
        TrioShape("13b", "Llama 13B + 7B + 7B, bf16", LLAMA_13B, LLAMA_7B),
        TrioShape("70b", "Llama 70B int8 + 7B + 7B bf16", LLAMA_70B, LLAMA_7B, INT8),
    )
}
"""By the name of ``--trios``, the most important first."""
