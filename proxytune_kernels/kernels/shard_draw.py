"""Counts, masses and the draw of a rank's part of a row, relative to the whole row's maximum.

Reads 4 bytes a token; numbers of a row's programs are added up, so their number does not show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels._blocks import LANES, race_block
from proxytune_kernels.kernels._common import (
    ALL,
    INF,
    OPTIONS,
    TOP_P_OFF,
    digits,
    exponent,
    exponential,
    key_id,
    order_key,
)
from proxytune_kernels.kernels._row import (
    LOWEST,
    filters_of,
    finite_max,
    is_valid,
    noise_key,
    temperature_of,
)
from proxytune_kernels.kernels._shard import (
    BEST,
    COUNT,
    KEPT_MASS,
    MASS,
    NO_CUT,
    RAW_MASS,
    WANTED,
    WORDS,
    Part,
    count_word,
    first_block,
    head_of,
    last_block,
    score_key,
    shard_x,
    x_here,
)
from proxytune_kernels.kernels.sample import splits_of
from proxytune_kernels.params import RowParams

PER = tl.constexpr(4)  # fp32: 16 bytes a lane
_WARPS = 4
ARRIVED = tl.constexpr(5)
STATE = tl.constexpr(6)


@triton.jit
def masses_of(d, hi, lo, floor):
    """Masses of a block by lane, int64 [128]."""
    high, low = digits(exponential(d, hi, lo, floor))
    return (tl.sum(high, 1).to(tl.int64) << 22) + tl.sum(low, 1).to(tl.int64)


@triton.jit
def _write_words(part, state, out, wanted, row, row_max, greedy, WIDTH: tl.constexpr):
    """The row's words from what its programs added up."""
    packed = tl.load(state + BEST, cache_modifier=".cg")
    best = tl.where(greedy, tl.where(packed == LOWEST, 0, packed), score_key(packed))
    token = tl.where(best == 0, -1, key_id(best))
    x = x_here(part, row, token.to(tl.int64), row_max)
    at = out + row * WIDTH
    tl.store(at + BEST, best)
    tl.store(at + COUNT, count_word(tl.load(state + COUNT, cache_modifier=".cg"), x))
    tl.store(at + KEPT_MASS, tl.load(state + KEPT_MASS, cache_modifier=".cg"))
    tl.store(at + MASS, tl.load(state + MASS, cache_modifier=".cg"))
    tl.store(at + RAW_MASS, tl.load(state + RAW_MASS, cache_modifier=".cg"))
    if wanted is not None:
        token = tl.load(wanted + row)
        x = x_here(part, row, token, row_max)
        tl.store(at + WANTED, tl.where(x > -INF, order_key(x, token), 0))


@triton.jit(do_not_specialize=["splits", "stream"])
def _shard_draw_kernel(
    part, row_params, cut, wanted, state, out, splits, stream, WIDTH: tl.constexpr
):  # fmt: skip
    """Grid [B * splits]; state int64 [B, 6], zeroed but for the best; out [B, WIDTH], zeroed."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    row_max, tokens, _ = head_of(part.summaries, row, part.rows, part.world)
    if is_valid(row_params, row, tl.full([], 0, tl.int64)) & (tokens > 0):
        greedy, inv_t = temperature_of(row_params, row)
        seed, position = noise_key(row_params, row, tl.full([], 0, tl.int64))
        hi, lo, floor = exponent(tl.load(row_params.temperature + row))
        raw_hi, raw_lo, raw_floor = exponent(tl.full([], 1.0, tl.float32))
        top_k, top_p, shift, _ = filters_of(row_params, row, tokens.to(tl.int32))
        least = tl.full([], NO_CUT, tl.int64)
        race = (top_k == ALL) & (top_p >= TOP_P_OFF)
        if cut is not None:
            least = tl.maximum(tl.load(cut + row), NO_CUT)
            race = tl.full([], True, tl.int1)
        top = finite_max(row_max)
        best = tl.full([], LOWEST, tl.int64)
        count = tl.full([], 0, tl.int64)
        kept_mass, mass = tl.zeros([LANES], tl.int64), tl.zeros([LANES], tl.int64)
        raw = tl.zeros([LANES], tl.int64)
        for block in range(first_block(part, PER) + split, last_block(part, PER), splits):
            ids, x = shard_x(part, row, block, row_max, PER)
            d = x - top
            mass += masses_of(d, hi, lo, floor)
            raw += masses_of(d, raw_hi, raw_lo, raw_floor)
            key = tl.where(x > -INF, order_key(x, ids), 0)
            if greedy:
                highest = tl.max(tl.ravel(key), 0)
                best = tl.maximum(best, tl.where(highest > 0, highest, LOWEST))
            else:
                kept = (key >= least) & (d >= shift)
                count += tl.sum(tl.ravel(kept.to(tl.int64)), 0)
                kept_mass += masses_of(tl.where(kept, d, -INF), hi, lo, floor)
                if race:
                    best = race_block(best, d, kept, block, inv_t, seed, position, stream, PER)
        at = state + row * STATE
        tl.atomic_max(at + BEST, best)
        tl.atomic_add(at + COUNT, count)
        tl.atomic_add(at + KEPT_MASS, tl.sum(kept_mass, 0))
        tl.atomic_add(at + MASS, tl.sum(mass, 0))
        tl.atomic_add(at + RAW_MASS, tl.sum(raw, 0))
        tl.debug_barrier()  # this program's numbers before its arrival
        if tl.atomic_add(at + ARRIVED, 1) == splits - 1:
            _write_words(part, at, out, wanted, row, row_max, greedy, WIDTH)


def launch_shard_draw(
    part: Part, row_params: RowParams, cut: Tensor | None, wanted: Tensor | None, stream: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Writes words, int64 [B, 5 or 6], zeroed before: rows with nothing to draw keep that."""
    rows = len(out)
    if rows == 0:
        return
    state = torch.zeros((rows, STATE.value), dtype=torch.int64, device=out.device)
    state[:, BEST.value] = LOWEST.value
    splits = splits_of(rows, max(part.size, 1), out.device)
    _shard_draw_kernel[(rows * splits,)](
        part, row_params, cut, wanted, state, out, splits, stream,
        WIDTH=WORDS.value + (wanted is not None), num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
