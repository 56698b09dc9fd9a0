"""What the kernels on a rank's part of the vocabulary share (docs/sharded.md).

A row's part is fp32 [n], of tokens vocab_start to vocab_start + n - 1, as `combine` leaves it.
Blocks of [128, PER] tokens are cut at multiples in the whole vocabulary, wherever the part starts:
noise is keyed by its ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from proxytune_kernels.kernels._blocks import LANES, block_ids
from proxytune_kernels.kernels._common import (
    ID_BITS,
    INF,
    STATUS_EMPTY,
    STATUS_NAN,
    STATUS_POSITIVE_INF,
    cleaned,
    key_value,
    order_key,
)
from proxytune_kernels.kernels._noise import score_of, winner
from proxytune_kernels.kernels._row import LOWEST

COUNT_BITS = tl.constexpr(20)  # of a summary: tokens; above them one bit for NaN, and the maximum
COUNT_MASK = tl.constexpr((1 << 20) - 1)
MAX_SHIFT = tl.constexpr(21)
MASKED = tl.constexpr(0x007FFFFF)  # order bits of -inf
INFINITE = tl.constexpr(0xFF800000)  # of +inf
NO_CUT = tl.constexpr(0x00800000 << 19)  # the lowest key that a token may have that is not masked
RESIDUAL_BIT = tl.constexpr(1 << 51)  # a residual goes before what is only the target's

# Words of a rank's draw
BEST = tl.constexpr(0)  # key of the best score among the kept tokens, 0 for none
COUNT = tl.constexpr(1)  # number of the kept tokens << 32 | bits of the best one's x
KEPT_MASS = tl.constexpr(2)
MASS = tl.constexpr(3)
RAW_MASS = tl.constexpr(4)
WANTED = tl.constexpr(5)  # key of the token asked for, 0 where it is elsewhere or masked
WORDS = tl.constexpr(5)
RESIDUAL_WORDS = tl.constexpr(2)


class Part(NamedTuple):
    """A rank's part of some rows, and what all ranks say of them."""

    x: Any  # fp32 [B, n]
    summaries: Any  # int64 [W, B]
    size: Any
    start: Any
    rows: Any
    world: Any


@triton.jit
def head_of(summaries, row, rows, world):
    """(row_max, tokens left, status) of a row from all ranks' summaries; the max +inf or not."""
    top = tl.full([], MASKED, tl.int64)
    nan = tl.full([], 0, tl.int64)
    for rank in range(0, world):
        word = tl.load(summaries + rank * rows + row)
        top = tl.maximum(top, word >> MAX_SHIFT)
        nan = nan | ((word >> COUNT_BITS) & 1)
    count = tl.full([], 0, tl.int64)
    for rank in range(0, world):
        word = tl.load(summaries + rank * rows + row)
        # Where a +inf was there, only tokens that are it count.
        counts = (top != INFINITE) | ((word >> MAX_SHIFT) == top)
        count += tl.where(counts, word & COUNT_MASK, 0)
    row_max = key_value(top << ID_BITS)
    status = tl.where(nan != 0, STATUS_NAN, 0)
    status = status | tl.where(top == INFINITE, STATUS_POSITIVE_INF, 0)
    return row_max, count, status | tl.where(count == 0, STATUS_EMPTY, 0)


@triton.jit
def shard_x(part, row, block, row_max, PER: tl.constexpr):
    """(ids, cleaned x) of a block counted from token 0, [128, PER]; -inf outside the part."""
    ids = block_ids(block, PER)
    at = part.x + row * part.size
    local = ids - part.start
    first = block * (LANES * PER) - part.start
    if (first >= 0) & (first + LANES * PER <= part.size):
        x = tl.load(at + local)
    else:
        x = tl.load(at + local, mask=(local >= 0) & (local < part.size), other=-INF)
    return ids, cleaned(x, row_max)


@triton.jit
def x_here(part, row, token, row_max):
    """Cleaned x of one token, int64; -inf where it is not here."""
    local = token - part.start
    here = (token >= 0) & (local >= 0) & (local < part.size)
    x = tl.load(part.x + row * part.size + tl.where(here, local, 0), mask=here, other=-INF)
    return cleaned(x, row_max)


@triton.jit
def first_block(part, PER: tl.constexpr):
    """The block that the part starts in."""
    return part.start // (LANES * PER)


@triton.jit
def last_block(part, PER: tl.constexpr):
    """The block past the part's last."""
    return tl.cdiv(part.start + part.size, LANES * PER)


@triton.jit
def score_key(packed):
    """Order key of a packed score and its token; 0 where there is none."""
    token = winner(packed)
    score = tl.where(packed == LOWEST, 0.0, score_of(packed))
    return tl.where(packed == LOWEST, 0, order_key(score, token))


@triton.jit
def count_word(count, x):
    """The word of a number of tokens and the bits of x."""
    bits = x.to(tl.uint32, bitcast=True).to(tl.int64)
    return (count.to(tl.int64) << 32) | bits


@triton.jit
def word_x(word):
    """x of such a word."""
    return word.to(tl.uint32).to(tl.float32, bitcast=True)
