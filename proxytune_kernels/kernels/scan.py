"""The one pass over the logits: each is read once, combined, and summed up tile by tile.

Per token 3 logits in (6 bytes in bf16); per 128 tokens 18 bytes of summaries out (score: 8).
What the summaries promise, and to what error, is derived in docs/gpu.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels._common import (
    ALL,
    FLT_MIN,
    INF,
    LN2,
    LOG2E,
    ORDER_JOINT,
    TILE,
    combined,
    digits,
)
from proxytune_kernels.kernels._noise import noise_bound, tile_words
from proxytune_kernels.kernels._row import is_unfiltered, noise_key

TILES_PER_PROGRAM = 8
# 16 tokens a lane: what is done once a lane, addresses above all, is shared by more of them.
SCAN_WARPS = 2
# 16 to 20 warps a multiprocessor, each lane with 96 bytes under way. With fewer, some spill.
SCAN_REGISTERS = 112


@triton.jit
def tile_sums(p):
    """Sums over tiles of p in [0, 1], fp32 [TILES]: right to 2^-23, the same in any order."""
    high, low = digits(p)
    return tl.sum(high, 1).to(tl.float32) * 2.0**-22 + tl.sum(low, 1).to(tl.float32) * 2.0**-44


@triton.jit(do_not_specialize=["vocab_size", "blocks", "stream"])
def _scan_kernel(
    logits, strides, row_params, tiles, vocab_size, positions, blocks, stream,
    DRAW: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid [rows, blocks]; DRAW is off for score, which needs maxima and masses alone."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row // positions, row % positions
    alpha = tl.load(row_params.alpha + b)
    tile = block * TILES + tl.arange(0, TILES)
    ids = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    if (block + 1) * TILES * TILE <= vocab_size:  # no mask: loads stay wide whatever the vocabulary
        inside = tl.full([TILES, TILE], True, tl.int1)
        given = combined(logits, strides, alpha, b, t, ids, inside)
    else:
        given = combined(logits, strides, alpha, b, t, ids, ids < vocab_size)
    x = tl.maximum(given, -INF)  # of NaN and a number it is the number
    top = tl.max(x, 1)
    at = row * blocks * TILES + tile
    tl.store(tiles.maximum + at, top)
    # Whole tiles of -inf (or +inf) have no difference to their maximum.
    d = x - tl.where(tl.abs(top) == INF, 0.0, top)[:, None]
    scaled = d * LOG2E
    p = tl.exp2(scaled)
    tl.store(tiles.raw + at, tile_sums(p))
    if DRAW:
        count = tl.full([TILES], TILE, tl.int32)
        if tl.min(tl.min(x, 1), 0) == -INF:  # seldom: no token is masked
            live = tl.sum((x > -INF).to(tl.int32), 1)
            count = live + (tl.max((given != given).to(tl.int32), 1) << 8)
        tl.store(tiles.count + at, count.to(tl.int16))
        temperature = tl.load(row_params.temperature + b)
        top_k, top_p = tl.load(row_params.top_k + b), tl.load(row_params.top_p + b)
        min_p, order = tl.load(row_params.min_p + b), tl.load(row_params.filter_order + b)
        top_k = tl.where((top_k > 0) & (top_k < vocab_size), top_k, ALL)
        if (temperature >= FLT_MIN) & ((top_k == ALL) | (order == ORDER_JOINT)):
            if temperature != 1.0:
                log2e = tl.full([], LOG2E, tl.float32)
                scaled = d * tl.div_rn(log2e, tl.minimum(temperature, 2.0**120))
                tl.store(tiles.scaled + at, tile_sums(tl.exp2(scaled)))
            if is_unfiltered(0, top_k, top_p, min_p):
                seed, position = noise_key(row_params, b, t)
                words = tile_words(tile * TILE, seed, position, stream, TILES)
                tl.store(tiles.race + at, tl.max(scaled + noise_bound(words), 1) * LN2)
