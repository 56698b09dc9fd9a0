"""What the tests of both kinds of pair share: sizes, tokens and logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4}


def token_ids(rows: int, queries: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(VOCAB_SIZE, (rows, queries), generator=generator)


@torch.no_grad()
def logits(model: Any, ids: Tensor, **keywords: Any) -> Tensor:
    return model(ids, use_cache=False, **keywords).logits
