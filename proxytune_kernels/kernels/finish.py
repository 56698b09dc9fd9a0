"""Flat rows: the draw, spread over the vocabulary; the last program of a row settles the cutoff.

Grid [rows * splits]; programs of rows that are decided leave at once. Tokens above narrow's bracket
race where they are read; those inside it are listed, ranked exactly, and race at the end. Rows that
neither bracket nor list can hold are done by one program alone. Reads each logit once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels._alone import do_alone
from proxytune_kernels.kernels._blocks import LANES, block_ids, block_x, race_block
from proxytune_kernels.kernels._common import INF, exponent
from proxytune_kernels.kernels._list import append, keep_listed, race_listed, rank_listed, shorten
from proxytune_kernels.kernels._noise import winner
from proxytune_kernels.kernels._row import (
    ABOVE_COUNT,
    ABOVE_MASS,
    ALONE,
    BEST,
    CUT,
    FINISHED,
    FLAT,
    HIGH,
    KEPT,
    KEYS_WIDTH,
    LIST,
    LISTED,
    LOW,
    LOWEST,
    MASSES_WIDTH,
    MAX,
    MODE,
    RAW,
    SHORT,
    TARGET,
    difference_at,
    filters_of,
    noise_key,
    temperature_of,
    write_drawn,
)

PER = tl.constexpr(8)  # tokens a lane: 16 bytes of bf16


@triton.jit
def _settle(logits, strides, row_params, state, out, row, b, t, stream, vocab_size):
    """The cutoff among the listed tokens, their part of the race, and the row's results."""
    greedy, inv_t = temperature_of(row_params, b)
    top_k, _, shift, order = filters_of(row_params, b, vocab_size)
    alpha = tl.load(row_params.alpha + b)
    seed, position = noise_key(row_params, b, t)
    hi, lo, floor = exponent(tl.load(row_params.temperature + b))
    row_max = tl.load(state.numbers + row * 16 + MAX)
    at = state.masses + row * MASSES_WIDTH
    target = tl.load(at + TARGET)
    n = tl.load(state.counters + row * 4 + LISTED, cache_modifier=".cg")
    keys = state.keys + row * KEYS_WIDTH
    short, copied, above_count, above_mass = shorten_to(
        keys, n, row_max, hi, lo, floor, tl.load(at + ABOVE_COUNT), tl.load(at + ABOVE_MASS), top_k,
        target,
    )  # fmt: skip
    rank, before = state.rank + row * SHORT, state.before + row * SHORT
    rank_listed(
        short, rank, before, copied, row_max, hi, lo, floor, above_count, above_mass, top_k, shift,
        order,
    )  # fmt: skip
    count, _, kept_mass, cut = keep_listed(
        short, rank, before, copied, row_max, hi, lo, floor, above_count, above_mass, top_k, shift,
        target, target,
    )  # fmt: skip
    best = tl.load(at + BEST, cache_modifier=".cg")
    listed = race_listed(keys, n, cut, row_max, inv_t, seed, position, stream)
    token = winner(tl.maximum(best, listed))
    d = difference_at(logits, strides, alpha, b, t, token.to(tl.int32), row_max)
    write_drawn(out, row, token, d, inv_t, greedy, count, kept_mass, tl.load(at + RAW))
    tl.store(at + CUT, cut)
    tl.store(at + KEPT, kept_mass)


@triton.jit
def shorten_to(keys, n, row_max, hi, lo, floor, above_count, above_mass, top_k, target):
    """`shorten` into the list's tail."""
    short = keys + LIST
    copied, above_count, above_mass = shorten(
        keys, short, n, SHORT // 4, row_max, hi, lo, floor, above_count, above_mass, top_k, target
    )
    return short, copied, above_count, above_mass


@triton.jit(do_not_specialize=["vocab_size", "splits", "stream"])
def _finish_kernel(logits, strides, row_params, state, out, vocab_size, positions, splits, stream):
    """Grid [rows * splits]."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    mode = tl.load(state.counters + row * 4 + MODE)
    b, t = row // positions, row % positions
    if (mode == ALONE) & (split == 0):
        do_alone(logits, strides, row_params, state, out, row, b, t, stream, vocab_size)
    if mode == FLAT:
        alpha = tl.load(row_params.alpha + b)
        seed, position = noise_key(row_params, b, t)
        row_max = tl.load(state.numbers + row * 16 + MAX)
        high = tl.load(state.numbers + row * 16 + HIGH)
        low = tl.load(state.numbers + row * 16 + LOW)
        _, inv_t = temperature_of(row_params, b)
        best = tl.full([], LOWEST, tl.int64)
        listed = state.counters + row * 4 + LISTED
        for block in range(split, tl.cdiv(vocab_size, LANES * PER), splits):
            x = block_x(logits, strides, alpha, b, t, block, row_max, vocab_size, PER)
            d = x - row_max
            best = race_block(best, d, d >= high, block, inv_t, seed, position, stream, PER)
            taken = (d >= low) & (d < high) & (x > -INF)
            number = tl.sum(tl.ravel(taken.to(tl.int32)), 0)
            if number > 0:
                start = tl.atomic_add(listed, number)
                append(state.keys + row * KEYS_WIDTH, start, x, block_ids(block, PER), taken, LIST)
        tl.atomic_max(state.masses + row * MASSES_WIDTH + BEST, best)
        tl.debug_barrier()  # all of this program's tokens before its arrival
        if tl.atomic_add(state.counters + row * 4 + FINISHED, 1) == splits - 1:
            _settle(logits, strides, row_params, state, out, row, b, t, stream, vocab_size)
