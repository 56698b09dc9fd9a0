"""Flat rows: exact counts and masses above a few values, spread over the vocabulary.

Grid [rows * splits]; programs of rows that are decided leave at once. The last program of a row
picks the two values that the cutoff lies between. Reads each logit once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels._blocks import LANES, block_x
from proxytune_kernels.kernels._common import (
    INF,
    digits,
    exponent,
    exponential,
    mass_target,
)
from proxytune_kernels.kernels._row import (
    ABOVE_COUNT,
    ABOVE_MASS,
    ALONE,
    COUNTS,
    FLAT,
    HIGH,
    LIST,
    LOW,
    MASSES,
    MASSES_WIDTH,
    MAX,
    MODE,
    NARROWED,
    NUM_PIVOTS,
    PIVOTS,
    TARGET,
    TOTAL,
    filters_of,
)

PER = tl.constexpr(8)  # tokens a lane: 16 bytes of bf16
HALF = tl.constexpr(4)


@triton.jit
def _no_counts():
    return tl.zeros([HALF, LANES], tl.int32)


@triton.jit
def _no_masses():
    return tl.zeros([HALF, LANES], tl.int64)


@triton.jit
def _above(d, high, low, pivots, count, held):
    """Adds a block's tokens from each pivot up to its lanes' counts and masses."""
    above = d[None, :, :] >= pivots[:, None, None]
    count += tl.sum(above.to(tl.int32), 2)
    highs = tl.sum(tl.where(above, high[None, :, :], 0), 2).to(tl.int64)
    lows = tl.sum(tl.where(above, low[None, :, :], 0), 2).to(tl.int64)
    return count, held + (highs << 22) + lows


@triton.jit
def _bracket(row_params, state, row, b, vocab_size):
    """Finds the pivots that the last kept token lies between, and what is above them."""
    top_k, top_p, _, _ = filters_of(row_params, b, vocab_size)
    at, step = state.masses + row * MASSES_WIDTH, tl.arange(0, NUM_PIVOTS)
    # Other programs' sums: past the first-level cache, which does not see them.
    total = tl.load(at + TOTAL, cache_modifier=".cg")
    count = tl.load(at + COUNTS + step, cache_modifier=".cg")
    held = tl.load(at + MASSES + step, cache_modifier=".cg")
    pivots = tl.load(state.numbers + row * 16 + PIVOTS + step)
    target = mass_target(top_p, total)
    met = (count >= top_k) | (held >= target)
    first = tl.min(tl.where(met, step, NUM_PIVOTS), 0)
    passed = step == first - 1
    above_count = tl.sum(tl.where(passed, count, 0), 0)
    inside = tl.sum(tl.where(step == first, count, 0), 0) - above_count
    high = tl.where(first > 0, tl.max(tl.where(passed, pivots, -INF), 0), INF)
    tl.store(state.numbers + row * 16 + HIGH, high)
    tl.store(state.numbers + row * 16 + LOW, tl.max(tl.where(step == first, pivots, -INF), 0))
    tl.store(at + ABOVE_COUNT, above_count)
    tl.store(at + ABOVE_MASS, tl.sum(tl.where(passed, held, 0), 0))
    tl.store(at + TARGET, target)
    if (first == NUM_PIVOTS) | (inside > LIST):  # the guess of select's was a bad one
        tl.store(state.counters + row * 4 + MODE, ALONE)


@triton.jit(do_not_specialize=["vocab_size", "splits"])
def _narrow_kernel(logits, strides, row_params, state, vocab_size, positions, splits):
    """Grid [rows * splits]."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    if tl.load(state.counters + row * 4 + MODE) == FLAT:
        b, t = row // positions, row % positions
        alpha = tl.load(row_params.alpha + b)
        hi, lo, floor = exponent(tl.load(row_params.temperature + b))
        row_max = tl.load(state.numbers + row * 16 + MAX)
        # Two halves of the pivots: all eight at once would take over 200 registers.
        step = tl.arange(0, HALF)
        pivots = state.numbers + row * 16 + PIVOTS
        upper, lower = tl.load(pivots + step), tl.load(pivots + HALF + step)
        upper_count, lower_count = _no_counts(), _no_counts()
        upper_held, lower_held = _no_masses(), _no_masses()
        total = tl.zeros([LANES], tl.int64)
        for block in range(split, tl.cdiv(vocab_size, LANES * PER), splits):
            d = block_x(logits, strides, alpha, b, t, block, row_max, vocab_size, PER) - row_max
            high, low = digits(exponential(d, hi, lo, floor))
            total += (tl.sum(high, 1).to(tl.int64) << 22) + tl.sum(low, 1).to(tl.int64)
            upper_count, upper_held = _above(d, high, low, upper, upper_count, upper_held)
            lower_count, lower_held = _above(d, high, low, lower, lower_count, lower_held)
        at = state.masses + row * MASSES_WIDTH
        tl.atomic_add(at + TOTAL, tl.sum(total, 0))
        tl.atomic_add(at + COUNTS + step, tl.sum(upper_count, 1).to(tl.int64))
        tl.atomic_add(at + COUNTS + HALF + step, tl.sum(lower_count, 1).to(tl.int64))
        tl.atomic_add(at + MASSES + step, tl.sum(upper_held, 1))
        tl.atomic_add(at + MASSES + HALF + step, tl.sum(lower_held, 1))
        tl.debug_barrier()  # all of this program's sums before its arrival
        if tl.atomic_add(state.counters + row * 4 + NARROWED, 1) == splits - 1:
            _bracket(row_params, state, row, b, vocab_size)
