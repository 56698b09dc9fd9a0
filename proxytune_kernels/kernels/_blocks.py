"""Blocks of a row's tokens for the launches that read it again: [128, PER], PER tokens a lane."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels._common import INF, LN2, cleaned, combined
from proxytune_kernels.kernels._noise import (
    best_of,
    gumbel,
    noise_bound,
    score_of,
    tile_words,
    uniform,
)

LANES = tl.constexpr(128)


@triton.jit
def block_ids(block, PER: tl.constexpr):
    """Token ids of a block, int32 [128, PER]."""
    lane = tl.arange(0, LANES)[:, None] * PER + tl.arange(0, PER)[None, :]
    return block * (LANES * PER) + lane


@triton.jit
def block_x(logits, strides, alpha, b, t, block, row_max, vocab_size, PER: tl.constexpr):
    """Cleaned x of a block, fp32 [128, PER]; -inf past the vocabulary."""
    ids = block_ids(block, PER)
    if (block + 1) * (LANES * PER) <= vocab_size:
        inside = tl.full([LANES, PER], True, tl.int1)
        x = combined(logits, strides, alpha, b, t, ids, inside)
    else:
        x = combined(logits, strides, alpha, b, t, ids, ids < vocab_size)
    return cleaned(x, row_max)


@triton.jit
def race_block(best, d, taken, block, inv_t, seed, position, stream, PER: tl.constexpr):
    """The better of ``best`` (a packed score) and the block's taken tokens.

    Scores are evaluated only where a cheap upper bound of them passes the best so far.
    """
    first = block * (LANES * PER) + tl.arange(0, PER) * 128
    words = tl.reshape(tile_words(first, seed, position, stream, PER), [LANES, PER])
    scaled = d * inv_t
    noise = LN2 * noise_bound(words)
    bound = scaled + noise + (2e-4 + 2e-5 * tl.abs(scaled) + 1e-5 * tl.abs(noise))
    highest = tl.max(tl.max(tl.where(taken, bound, -INF), 1), 0)
    if (highest > -INF) & ((highest < score_of(best)) == 0):  # true for NaN: nothing yet
        ids = block_ids(block, PER)
        score = scaled + gumbel(uniform(words, ids, seed, position, stream))
        best = tl.maximum(best, best_of(tl.where(taken, score, -INF), ids))
    return best
