"""Attention over a slot cache, registered with transformers under the name ``proxytune_slots``.

No mask function is registered under that name, so transformers builds no mask: what a row may
attend to is in the :class:`~proxytune_kernels.decoder.cache.CacheStep` that travels to every
attention layer as the keyword ``cache_step``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from proxytune_kernels.decoder.cache import CacheStep

ATTENTION_NAME = "proxytune_slots"
"""The name under which :func:`slot_attention` is registered."""

# Attention terms that other models add and this function does not know. To ignore one would give
# wrong tokens without an error.
_UNKNOWN_TERMS = ("s_aux", "position_bias")


def register_attention() -> None:
    """Register :func:`slot_attention` with transformers; doing it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, slot_attention)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache_step: CacheStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of B rows, each of its own length, over the keys of a slot cache.

    Args:
        module: the attention layer (unused; transformers passes it).
        query: [B, heads, q, D].
        key, value: [B, kv_heads, L, D], as :meth:`CacheStep.update` returned them.
        attention_mask: None: ``cache_step`` says what is masked.
        cache_step: the forward's positions and lengths.
        scaling: factor of the scores; None is 1 / sqrt(D).
        sliding_window: a query sees this many keys at most, itself included; None sees all.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2); None leaves them.

    Returns:
        [B, q, heads, D], and None in place of the attention weights.

    Raises:
        NotImplementedError: a term of the scores that is not implemented here.
    """
    for name in _UNKNOWN_TERMS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{ATTENTION_NAME} attention got {name} from {type(module).__name__}, "
                f"which it does not implement"
            )
    first, mask = cache_step.visible(sliding_window)
    if first:
        key, value = key[:, :, first:], value[:, :, first:]
    rows, heads, queries, width = query.shape
    causal = mask is None and queries > 1
    if softcap is not None:
        mask = cache_step.mask(None) if causal else mask
        attended = _softcapped(query, key, value, mask, scaling, softcap)
    elif queries == 1:
        # Query heads that share a key become queries of one head: no copy of keys per query head.
        groups = (rows, key.shape[1], heads // key.shape[1], width)
        attended = scaled_dot_product_attention(
            query.reshape(groups), key, value, attn_mask=mask, scale=scaling
        )
        return attended.reshape(rows, 1, heads, value.shape[-1]), None
    else:
        attended = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=heads != key.shape[1],
        )
    return attended.transpose(1, 2).contiguous(), None


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention with capped scores, which SDPA cannot do; softmax in fp32, fp64 for fp64 inputs."""
    rows, heads, queries, width = query.shape
    kv_heads = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, queries, width)
    scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2)) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    return torch.matmul(weights, value.unsqueeze(2)).reshape(rows, heads, queries, -1)
