"""Exact selection and the draw among listed tokens: order keys in memory, in any order.

A token's rank is the number of tokens before it, its `before` their mass; both are integers, so the
kept set is the same however the list came about. Lists are short: pairs are compared, nothing is
sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels._common import (
    INF,
    ORDER_VLLM,
    key_id,
    key_value,
    mass,
    order_key,
)
from proxytune_kernels.kernels._noise import best_of, gumbel, token_words, uniform
from proxytune_kernels.kernels._row import LOWEST

CHUNK = tl.constexpr(128)
TRIALS = tl.constexpr(8)  # cuts tried at once
PAIRED = tl.constexpr(16)


@triton.jit
def _listed(keys, start, n, SIZE: tl.constexpr):
    """Keys of the list from ``start``, 0 past its end (no token's key is 0)."""
    i = start + tl.arange(0, SIZE)
    return tl.load(keys + i, mask=i < n, other=0)


@triton.jit
def append(keys, n, x, ids, taken, limit):
    """Appends the order keys of taken tokens to a list of n; returns the new n, also past limit."""
    flat = tl.ravel(taken.to(tl.int32))
    slot = n + tl.cumsum(flat, 0) - 1
    tl.store(keys + slot, tl.ravel(order_key(x, ids)), mask=(flat != 0) & (slot < limit))
    return n + tl.sum(flat, 0)


@triton.jit
def trial_keys(lower, upper):
    """Keys that part [lower, upper) evenly, descending, the last of them lower: int64 [TRIALS]."""
    span = (upper - lower + TRIALS - 1) // TRIALS
    return tl.maximum(upper - span * (tl.arange(0, TRIALS) + 1), lower)


@triton.jit
def narrowed(trials, met, lower, upper):
    """[lower, upper) between the first trial that meets the need and the one before it."""
    step = tl.arange(0, TRIALS)
    first = tl.min(tl.where(met, step, TRIALS), 0)
    lower = tl.where(first < TRIALS, tl.max(tl.where(step == first, trials, 0), 0), lower)
    upper = tl.where(first > 0, tl.max(tl.where(step == first - 1, trials, 0), 0), upper)
    return lower, upper, first


@triton.jit
def shorten(
    keys, short, n, limit, row_max, hi, lo, floor, above_count, above_mass, need_count, need_mass
):  # fmt: skip
    """Copies the at most ``limit`` listed tokens among which the last one needed lies to ``short``.

    The need is a count or a mass; the list meets it, above_* alone do not. Returns (how many,
    count and mass of the tokens before them).
    """
    lower, upper = tl.full([], 1, tl.int64), tl.full([], 1 << 51, tl.int64)
    inside = n.to(tl.int64)
    while inside > limit:
        trials = trial_keys(lower, upper)
        count = tl.zeros([TRIALS], tl.int64)
        held = tl.zeros([TRIALS], tl.int64)
        for start in range(0, n, CHUNK):
            key = _listed(keys, start, n, CHUNK)
            q = tl.where(key > 0, mass(key_value(key), row_max, hi, lo, floor), 0)
            taken = (key[None, :] >= trials[:, None]) & (key[None, :] < upper)
            count += tl.sum(taken.to(tl.int64), 1)
            held += tl.sum(tl.where(taken, q[None, :], 0), 1)
        met = (above_count + count >= need_count) | (above_mass + held >= need_mass)
        lower, upper, first = narrowed(trials, met, lower, upper)
        step = tl.arange(0, TRIALS)
        passed_count = tl.sum(tl.where(step == first - 1, count, 0), 0)
        inside = tl.sum(tl.where(step == first, count, 0), 0) - passed_count
        above_count += passed_count
        above_mass += tl.sum(tl.where(step == first - 1, held, 0), 0)
    copied = tl.full([], 0, tl.int32)
    for start in range(0, n, CHUNK):
        key = _listed(keys, start, n, CHUNK)
        taken = (key >= lower) & (key < upper)
        copied = append(short, copied, key_value(key), key_id(key), taken, limit)
    tl.debug_barrier()
    return copied, above_count, above_mass


@triton.jit
def rank_listed(
    keys, rank_out, before_out, n, row_max, hi, lo, floor, above_count, above_mass,
    top_k, shift, order,
):  # fmt: skip
    """Ranks and masses before each of n listed tokens; above_* are of tokens before all of them.

    Returns the mass of what top_k, and in order "vllm" min_p, leave: top_p is a share of it.
    """
    whole = above_mass
    for start in range(0, n, CHUNK):
        key = _listed(keys, start, n, CHUNK)
        rank = tl.zeros([CHUNK], tl.int32) + above_count.to(tl.int32)
        before = tl.zeros([CHUNK], tl.int64) + above_mass
        for other in range(0, n, PAIRED):
            rival = _listed(keys, other, n, PAIRED)
            q = tl.where(rival > 0, mass(key_value(rival), row_max, hi, lo, floor), 0)
            first = rival[None, :] > key[:, None]
            rank += tl.sum(first.to(tl.int32), 1)
            before += tl.sum(tl.where(first, q[None, :], 0), 1)
        i = start + tl.arange(0, CHUNK)
        tl.store(rank_out + i, rank, mask=i < n)
        tl.store(before_out + i, before, mask=i < n)
        x = key_value(key)
        inner = (i < n) & (rank < top_k) & ((order != ORDER_VLLM) | (x - row_max >= shift))
        whole += tl.sum(tl.where(inner, mass(x, row_max, hi, lo, floor), 0), 0)
    tl.debug_barrier()  # ranks are read by other threads than wrote them
    return whole


@triton.jit
def keep_listed(
    keys, rank_in, before_in, n, row_max, hi, lo, floor, above_count, above_mass,
    top_k, shift, low_target, high_target,
):  # fmt: skip
    """The kept set among n ranked tokens, for two bounds of the mass that top_p asks for.

    Returns (tokens kept at the low bound, at the high bound, mass, order key of the last): where
    the counts agree, so do the sets.
    """
    low_count, high_count = above_count, above_count
    kept_mass = above_mass
    cut = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        key = _listed(keys, start, n, CHUNK)
        rank = tl.load(rank_in + i, mask=i < n, other=0)
        before = tl.load(before_in + i, mask=i < n, other=0)
        x = key_value(key)
        inner = (i < n) & (rank < top_k) & (x - row_max >= shift)
        kept = inner & (before < low_target)
        low_count += tl.sum(kept.to(tl.int64), 0)
        high_count += tl.sum((inner & (before < high_target)).to(tl.int64), 0)
        kept_mass += tl.sum(tl.where(kept, mass(x, row_max, hi, lo, floor), 0), 0)
        cut = tl.minimum(cut, tl.min(tl.where(kept, key, 0x7FFFFFFFFFFFFFFF), 0))
    return low_count, high_count, kept_mass, cut


@triton.jit
def race_listed(keys, n, cut, row_max, inv_t, seed, position, stream):
    """Packed score of the best of the listed tokens whose key is at least ``cut``."""
    best = tl.full([], LOWEST, tl.int64)
    for start in range(0, n, CHUNK):
        key = _listed(keys, start, n, CHUNK)
        ids, kept = key_id(key), (key >= cut) & (key > 0)
        g = gumbel(uniform(token_words(ids, seed, position, stream), ids, seed, position, stream))
        score = (key_value(key) - row_max) * inv_t + g
        best = tl.maximum(best, best_of(tl.where(kept, score, -INF), ids))
    return best
