"""Logits to time the operators on: peaked like a language model's, and flat."""

from __future__ import annotations

import torch
from torch import Tensor

Logits = tuple[Tensor, Tensor, Tensor]
"""Base, expert and anti, [B, V] each."""

KINDS = ("peaked", "flat")

# Peaked rows, fitted to the Qwen trio of scripts/qwen_trio.py (base 1.5B, pair 0.5B, V = 151,936)
# on the English of benchmarks/prompts.py, 152 positions. Sorted logits there fall by the same
# 4 nats from rank 1 to 10 to 100 to 1,000 to 10,000 (Zipf) and bend down at the end: the quantile
# function -HEAD ln u + TAIL ln(1 - u), u uniform. docs/benchmarks.md has both sides' figures.
_HEAD, _TAIL = 1.6, 1.3
_SMALL_SHARE, _SMALL_STD = 0.57, 2.0  # anti = share * base + noise: correlation 0.59
_TUNING_STD = 0.43  # expert = anti + noise: correlation 0.98


def make_logits(
    kind: str,
    batch_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> Logits:
    """Logits of the three roles.

    Args:
        kind: ``"peaked"``: a real trio's, see above; a handful of tokens is kept at top_p 0.9.
            ``"flat"``: uniform noise in [0, 1), the worst case for pruning: most tokens are kept.
        batch_size, vocab_size: B and V.
        dtype: of all three.
        seed: rows of another seed are other rows.
        device: where they are made; the same seed gives other rows on another kind of device.

    Raises:
        ValueError: an unknown kind.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch_size, vocab_size)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if kind == "flat":
        noise = torch.rand(3, *shape, generator=generator, device=device)
        return noise[0].to(dtype), noise[1].to(dtype), noise[2].to(dtype)
    if kind != "peaked":
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    # The ends of the float grid would give infinities.
    u = torch.rand(shape, generator=generator, device=device).clamp_(2.0**-25, 1 - 2.0**-24)
    base = _TAIL * torch.log1p(-u) - _HEAD * u.log()
    anti = _SMALL_SHARE * base + _SMALL_STD * normal()
    expert = anti + _TUNING_STD * normal()
    return base.to(dtype), expert.to(dtype), anti.to(dtype)
