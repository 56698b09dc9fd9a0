"""Raw logprobs of given tokens: sample's scan, and a program a row that sums its summaries up.

    logprob = x[token] - max - log(sum of exp(x - max))

Reads each logit once; nothing of the size of [B, T, V] is written.
"""

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
    block_x,
    exponent,
    row_mass,
    shifted_at,
)
from proxytune_kernels.kernels.launches import launch
from proxytune_kernels.kernels.sample import launch_scan
from proxytune_kernels.kernels.workspace import Tiles, at_once, raw_logprob_of, tiles_of

PER = tl.constexpr(8)  # tokens a lane: 16 bytes of bf16
_WARPS = 4


class Alpha(NamedTuple):
    """All that is read of the row parameters where nothing is drawn."""

    alpha: Any


@triton.jit(do_not_specialize=["vocab_size", "positions"])
def _score_kernel(
    logits, row_params, tiles, token_ids, out, vocab_size, positions, num_tiles, NT: tl.constexpr
):  # fmt: skip
    """Grid [rows]; NT is num_tiles rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // positions, row % positions
    tile = tl.arange(0, NT)
    inside, at = tile < num_tiles, row * num_tiles + tile
    top = tl.load(tiles.maximum + at, mask=inside, other=-INF)
    row_max = tl.max(top, 0)
    token = tl.load(token_ids + row)
    known = (token >= 0) & (token < vocab_size) & (row_max > -INF)
    result = tl.full([], float("nan"), tl.float32)
    if known:
        alpha = tl.load(row_params.alpha + b)
        mass = tl.full([], 0, tl.int64)
        if row_max == INF:  # the tokens left are alike: they are counted
            for block in range(0, tl.cdiv(vocab_size, LANES * PER)):
                x = block_x(logits, alpha, b, t, block, row_max, vocab_size, PER)
                mass += tl.sum(tl.ravel((x == 0.0).to(tl.int32)), 0).to(tl.int64) << 44
        else:
            sums = tl.load(tiles.raw + at, mask=inside, other=0.0)
            mass = row_mass(sums, top - row_max, exponent(tl.full([], 1.0, tl.float32)))
        shifted = shifted_at(logits, alpha, b, t, token.to(tl.int32), row_max)
        result = raw_logprob_of(shifted, mass)
    tl.store(out + row, result)


def launch_score(
    logits: Logits, token_ids: Tensor, alpha: Tensor, out: Tensor, vocab_size: int
) -> None:
    """Writes log-softmax of x at the tokens: token_ids int64 [B, T], alpha fp32 [B], out [B, T].

    All are contiguous.
    """
    rows, positions = out.numel(), out.shape[1]
    if rows == 0:
        return
    summaries = tiles_of(rows, vocab_size, out.device)
    tiles = Tiles(summaries.maximum, None, summaries.raw, None, None)
    width = summaries.maximum.shape[1]
    params = Alpha(alpha)
    launch_scan(logits, params, tiles, vocab_size, positions, 0, draw=False)
    launch(
        _score_kernel, (logits.kind, vocab_size), out.device, (rows,),
        logits, params, tiles, token_ids, out, vocab_size, positions, width, at_once(width),
        num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
