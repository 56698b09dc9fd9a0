"""score."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import (
    INF,
    LANES,
    OPTIONS,
    Logits,
    Strides,
    block_x,
    difference_at,
    exponent,
    log_mass,
    row_mass,
)
from proxytune_kernels.kernels.sample import SCAN_REGISTERS, SCAN_WARPS, scan_kernel
from proxytune_kernels.kernels.workspace import TILES_PER_PROGRAM, Tiles, at_once, tiles_of

_WARPS = 4
PER = tl.constexpr(8)  # tokens a lane: 16 bytes of bf16


class Alpha(NamedTuple):
    """All that scan reads of the row parameters where nothing is drawn."""

    alpha: Any


@triton.jit(do_not_specialize=["vocab_size", "token_stride"])
def _score_kernel(
    logits, strides, row_params, tiles, token_ids, token_stride, out, vocab_size, positions,
    num_tiles, NT: tl.constexpr,
):  # fmt: skip
    """Grid [rows]; NT is num_tiles rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // positions, row % positions
    tile = tl.arange(0, NT)
    inside, at = tile < num_tiles, row * num_tiles + tile
    top = tl.load(tiles.maximum + at, mask=inside, other=-INF)
    row_max = tl.max(top, 0)
    token = tl.load(token_ids + b * token_stride + t)
    known = (token >= 0) & (token < vocab_size) & (row_max > -INF)
    result = tl.full([], float("nan"), tl.float32)
    if known:
        alpha = tl.load(row_params.alpha + b)
        mass = tl.full([], 0, tl.int64)
        if row_max == INF:  # the tokens left are alike: they are counted
            for block in range(0, tl.cdiv(vocab_size, LANES * PER)):
                x = block_x(logits, strides, alpha, b, t, block, row_max, vocab_size, PER)
                mass += tl.sum(tl.ravel((x == 0.0).to(tl.int32)), 0).to(tl.int64) << 44
        else:
            sums = tl.load(tiles.raw + at, mask=inside, other=0.0)
            hi, lo, floor = exponent(tl.full([], 1.0, tl.float32))
            mass = row_mass(sums, top - row_max, hi, lo, floor)
        d = difference_at(logits, strides, alpha, b, t, token.to(tl.int32), row_max)
        result = (d.to(tl.float64) - log_mass(mass)).to(tl.float32)
    tl.store(out + row, result)


def launch_score(
    logits: Logits, strides: Strides, token_ids: Tensor, alpha: Tensor, out: Tensor, vocab_size: int
) -> None:
    """Writes log-softmax of x at the tokens: token_ids int64 [B, T], alpha fp32 [B], out [B, T]."""
    rows, positions = out.numel(), out.shape[1]
    if rows == 0:
        return
    summaries = tiles_of(rows, vocab_size, out.device)
    tiles = Tiles(summaries.maximum, None, summaries.raw, None, None)
    width = summaries.maximum.shape[1]
    blocks = width // TILES_PER_PROGRAM
    scan_kernel[(rows, blocks)](
        logits, strides, Alpha(alpha), tiles, vocab_size, positions, blocks, 0,
        DRAW=False, TILES=TILES_PER_PROGRAM, num_warps=SCAN_WARPS, maxnreg=SCAN_REGISTERS,
        **OPTIONS,
    )  # fmt: skip
    _score_kernel[(rows,)](
        logits, strides, Alpha(alpha), tiles, token_ids, token_ids.stride(0), out, vocab_size,
        positions, width, NT=at_once(width), num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
