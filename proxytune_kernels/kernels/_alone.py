"""A whole row by one program, whatever it holds: search by trial cuts, then the draw.

For rows that no short list and no bracket can hold: thousands of equal logits, +inf, or filters
that need two searches on a flat row. It reads the row again for every three bits of the cut's order
key, seventeen times at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels._blocks import LANES, block_ids, block_x, race_block
from proxytune_kernels.kernels._common import (
    ALL,
    INF,
    NO_TARGET,
    ORDER_JOINT,
    ORDER_VLLM,
    TOP_P_OFF,
    digits,
    exponent,
    exponential,
    mass_target,
    order_key,
)
from proxytune_kernels.kernels._list import TRIALS, narrowed, trial_keys
from proxytune_kernels.kernels._noise import winner
from proxytune_kernels.kernels._row import (
    CUT,
    KEPT,
    LOWEST,
    MASSES_WIDTH,
    MAX,
    RAW,
    difference_at,
    filters_of,
    finite_max,
    noise_key,
    temperature_of,
    write_drawn,
)

PER = tl.constexpr(2)  # tokens a lane: trial keys take eight registers for each

# Phases of the search, in order
EVERY = tl.constexpr(0)
WHOLE = tl.constexpr(1)
COUNT = tl.constexpr(2)
SHARE = tl.constexpr(3)
KEPT_SET = tl.constexpr(4)
FOUND = tl.constexpr(5)


@triton.jit
def above(logits, strides, row_params, b, t, row_max, least, trials, vocab_size):
    """Counts and masses of the tokens from each trial key up, x - max at least ``least``: int64."""
    alpha = tl.load(row_params.alpha + b)
    hi, lo, floor = exponent(tl.load(row_params.temperature + b))
    top = finite_max(row_max)
    count = tl.zeros([TRIALS, LANES], tl.int32)
    held = tl.zeros([TRIALS, LANES], tl.int64)
    for block in range(0, tl.cdiv(vocab_size, LANES * PER)):
        x = block_x(logits, strides, alpha, b, t, block, row_max, vocab_size, PER)
        d = x - top
        key = tl.where((x > -INF) & (d >= least), order_key(x, block_ids(block, PER)), 0)
        high, low = digits(exponential(d, hi, lo, floor))
        above = key[None, :, :] >= trials[:, None, None]
        count += tl.sum(above.to(tl.int32), 2)
        highs = tl.sum(tl.where(above, high[None, :, :], 0), 2).to(tl.int64)
        lows = tl.sum(tl.where(above, low[None, :, :], 0), 2).to(tl.int64)
        held += (highs << 22) + lows
    return tl.sum(count.to(tl.int64), 1), tl.sum(held, 1)


@triton.jit
def _search(logits, strides, row_params, b, t, row_max, vocab_size):
    """The kept set of any row: (key of its last token at the lowest, count, mass, mass at T = 1).

    One loop of passes over the row, each with trial keys between ``lower`` and ``upper``; a phase
    ends where one key is left. WHOLE: what order "vllm" leaves of min_p, and others of nothing.
    COUNT: top_k's cut. SHARE: top_p's. KEPT_SET: the result, min_p's threshold included.
    """
    greedy, _ = temperature_of(row_params, b)
    top_k, top_p, shift, order = filters_of(row_params, b, vocab_size)
    top_k = tl.where(greedy, 1, top_k)
    top_p = tl.where(greedy, TOP_P_OFF, top_p)
    shift = tl.where(greedy, -INF, shift)
    none = tl.full([], NO_TARGET, tl.int64)
    top = order_key(finite_max(row_max), tl.full([], 0, tl.int32)) + 1
    lowest = tl.full([], 1, tl.int64)
    phase = tl.full([], EVERY, tl.int32)
    lower, upper, cut = lowest, lowest, lowest
    least = tl.full([], -INF, tl.float32)
    need_count, need_mass = tl.full([], ALL, tl.int32), none
    at_lower, mass_at_lower = lowest, lowest
    live, whole = lowest, lowest
    step = tl.arange(0, TRIALS)
    while phase != FOUND:
        trials = trial_keys(lower, upper)
        count, held = above(logits, strides, row_params, b, t, row_max, least, trials, vocab_size)
        met = (count >= need_count) | (held >= need_mass)
        met = met | (trials == lower)  # where none has enough, all tokens are kept
        lower, upper, first = narrowed(trials, met, lower, upper)
        at_lower = tl.sum(tl.where(step == first, count, 0), 0)
        mass_at_lower = tl.sum(tl.where(step == first, held, 0), 0)
        if upper - lower <= 1:
            if phase == EVERY:
                live = at_lower
                phase = tl.full([], WHOLE, tl.int32)
                least = tl.where(order == ORDER_VLLM, shift, -INF)
                lower, upper = lowest, lowest
            elif phase == KEPT_SET:
                phase = tl.full([], FOUND, tl.int32)
            else:
                cut = tl.maximum(cut, lower)
                whole = mass_at_lower
                if (phase == WHOLE) & (top_k < at_lower) & (order != ORDER_JOINT):
                    phase = tl.full([], COUNT, tl.int32)
                    need_count, need_mass = top_k, none
                    lower, upper = lowest, top
                elif (phase != SHARE) & (
                    (top_p < TOP_P_OFF) | ((phase == WHOLE) & (top_k < at_lower))
                ):
                    phase = tl.full([], SHARE, tl.int32)
                    need_count = tl.where(order == ORDER_JOINT, top_k, ALL)
                    need_mass = mass_target(top_p, whole)
                    lower, upper = lowest, top
                else:
                    phase = tl.full([], KEPT_SET, tl.int32)
                    least = shift
                    lower, upper = cut, cut
    return cut, shift, at_lower, mass_at_lower, live


@triton.jit
def do_alone(logits, strides, row_params, state, out, row, b, t, stream, vocab_size):
    """Selects and draws; the row has a token and valid parameters, its status is written."""
    greedy, inv_t = temperature_of(row_params, b)
    alpha = tl.load(row_params.alpha + b)
    seed, position = noise_key(row_params, b, t)
    row_max = tl.load(state.numbers + row * 16 + MAX)
    at = state.masses + row * MASSES_WIDTH
    cut, least, count, kept_mass, live = _search(
        logits, strides, row_params, b, t, row_max, vocab_size
    )
    # Where +inf was there, the tokens left are alike.
    raw_mass = tl.where(row_max == INF, live << 44, tl.load(at + RAW))
    best = tl.full([], LOWEST, tl.int64)
    last = tl.full([], NO_TARGET, tl.int64)
    for block in range(0, tl.cdiv(vocab_size, LANES * PER)):
        x = block_x(logits, strides, alpha, b, t, block, row_max, vocab_size, PER)
        d = x - finite_max(row_max)
        key = order_key(x, block_ids(block, PER))
        kept = (x > -INF) & (d >= least) & (key >= cut)
        last = tl.minimum(last, tl.min(tl.ravel(tl.where(kept, key, NO_TARGET)), 0))
        best = race_block(best, d, kept, block, inv_t, seed, position, stream, PER)
    token = winner(best)
    d = difference_at(logits, strides, alpha, b, t, token.to(tl.int32), row_max)
    write_drawn(out, row, token, d, inv_t, greedy, count, kept_mass, raw_mass)
    tl.store(at + RAW, raw_mass)
    tl.store(at + CUT, last)
    tl.store(at + KEPT, kept_mass)
