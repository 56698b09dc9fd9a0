"""The kept set: top_k, min_p and top_p, in three filter orders (docs/contracts.md, Selection).

Tokens are ordered by their order keys, highest first. The kept set is a prefix of that order, the
shortest of what each filter leaves:

    top_k    rank < top_k
    min_p    x - max >= min_p_shift = T log(min_p)
    top_p    mass of the tokens before it < ceil(top_p * whole); whole is the mass of
             what min_p and top_k leave ("vllm"), what top_k leaves ("hf"), or the row ("joint")

Ranks and masses are integers, so what finds the set does not show in it. Three ways find it:

- *Candidates*: at most a few hundred tokens above a bound that holds for sure; pairs are compared.
- *A search through the row*: trial keys, counted over the whole row; it holds for any row.
- *A sorted list*: what the ranks of a sharded row sent, as far as it reaches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from proxytune_kernels.kernels.common import (
    FLT_MAX,
    FLT_MIN,
    INF,
    LANES,
    LOWEST,
    NO_CUTOFF,
    NO_TARGET,
    ORDER_HF,
    ORDER_JOINT,
    ORDER_VLLM,
    TILE,
    TOP_K_OFF,
    TOP_P_OFF,
    block_ids,
    block_x,
    cleaned,
    combined,
    digits,
    exponent,
    exponential,
    finite_max,
    key_id,
    key_value,
    mass,
    mass_target,
    order_key,
    shifted_from,
    temperature_of,
)
from proxytune_kernels.kernels.noise import best_of, gumbel, token_words, uniform

NUM_PIVOTS = tl.constexpr(8)  # values between which a flat row's cutoff is looked for
SAMPLES = tl.constexpr(1024)  # tokens that tell where it may lie
MAX_SHORT = tl.constexpr(512)  # candidates that are ranked
MAX_TILES = tl.constexpr(64)  # tiles that candidates are listed from
GATHERED = tl.constexpr(16)  # of them at once
CHUNK = tl.constexpr(128)  # candidates at once
RIVALS = tl.constexpr(16)  # that each of them is compared with at once
TRIALS = tl.constexpr(8)  # trial cutoffs at once
SEARCH_PER = tl.constexpr(2)  # tokens a lane: trial keys take eight registers for each
SORTED_CHUNK = tl.constexpr(256)

# Phases of the search through a row, in order
EVERY = tl.constexpr(0)
WHOLE = tl.constexpr(1)
COUNT = tl.constexpr(2)
SHARE = tl.constexpr(3)
KEPT_SET = tl.constexpr(4)
FOUND = tl.constexpr(5)


class Filters(NamedTuple):
    """Valid filters of a row."""

    top_k: Any  # TOP_K_OFF where it is off
    top_p: Any  # int64 with 32 fractional bits; TOP_P_OFF where it is off
    min_p_shift: Any  # the least x - max that min_p keeps; -inf where it is off
    order: Any


class Candidates(NamedTuple):
    """A row's listed tokens, in any order, and what is counted of them."""

    keys: Any  # int64: order keys
    n: Any  # their number
    rank: Any  # int32: tokens before each
    before: Any  # int64: and their mass


class Amount(NamedTuple):
    """Tokens and their mass, int64: what a prefix needs (enough of either), or holds."""

    count: Any
    mass: Any


class Prefix(NamedTuple):
    """A prefix of the order, as far as a sorted list tells."""

    known: Any  # whether it ends within the list
    cutoff: Any  # order key of its last token
    length: Any  # where it isn't known, one more than the list's
    mass: Any


@triton.jit
def is_valid(row_params, b, t):
    """Whether request b's parameters are in range at position t."""
    alpha, temperature = tl.load(row_params.alpha + b), tl.load(row_params.temperature + b)
    top_k, top_p = tl.load(row_params.top_k + b), tl.load(row_params.top_p + b)
    min_p, order = tl.load(row_params.min_p + b), tl.load(row_params.filter_order + b)
    # Comparisons are false for NaN.
    valid = (alpha >= -FLT_MAX) & (alpha <= FLT_MAX) & (temperature >= 0)
    valid = valid & (temperature <= FLT_MAX) & (top_k >= -1) & (top_p > 0) & (top_p <= 1)
    valid = valid & (min_p >= 0) & (min_p <= 1) & (order >= 0) & (order <= 2)
    return valid & (tl.load(row_params.position + b) + t >= 0)


@triton.jit
def filters_of(row_params, b, vocab_size):
    """The filters of request b."""
    temperature, top_k = tl.load(row_params.temperature + b), tl.load(row_params.top_k + b)
    top_p, min_p = tl.load(row_params.top_p + b), tl.load(row_params.min_p + b)
    divisor = tl.where(temperature < FLT_MIN, 1.0, temperature)
    min_p_shift = (divisor.to(tl.float64) * tl.log(min_p.to(tl.float64))).to(tl.float32)
    min_p_shift = tl.where(min_p > 0, min_p_shift, -INF)
    top_k = top_k_of(top_k, vocab_size)
    share = (top_p.to(tl.float64) * 4294967296.0).to(tl.int64)
    return Filters(top_k, share, min_p_shift, tl.load(row_params.filter_order + b))


@triton.jit
def top_k_of(top_k, vocab_size):
    """top_k, or TOP_K_OFF where it leaves all tokens."""
    return tl.where((top_k > 0) & (top_k < vocab_size), top_k, TOP_K_OFF)


@triton.jit
def may_need_mass(row_params, b, vocab_size):
    """Whether the mass of the whole row at its temperature may be asked for."""
    temperature, order = tl.load(row_params.temperature + b), tl.load(row_params.filter_order + b)
    top_k = top_k_of(tl.load(row_params.top_k + b), vocab_size)
    return (temperature >= FLT_MIN) & ((top_k == TOP_K_OFF) | (order == ORDER_JOINT))


@triton.jit
def is_unfiltered(row_params, b, vocab_size):
    """Whether the row, if not greedy, draws from all its tokens: tiles' best scores are bounded."""
    top_k = top_k_of(tl.load(row_params.top_k + b), vocab_size)
    top_p, min_p = tl.load(row_params.top_p + b), tl.load(row_params.min_p + b)
    return (top_k == TOP_K_OFF) & (top_p >= 1.0) & (min_p <= 0.0)


@triton.jit
def shares_row(filters):
    """Whether top_p is on and a share of the whole row: no other filter comes before it."""
    of_row = (filters.order == ORDER_JOINT) | (
        (filters.top_k == TOP_K_OFF) & ((filters.order == ORDER_HF) | (filters.min_p_shift == -INF))
    )
    return of_row & (filters.top_p < TOP_P_OFF)


@triton.jit
def counts_below_min_p(filters):
    """Whether top_p is a share of a set that holds tokens which min_p drops."""
    return (filters.order == ORDER_HF) & (filters.top_k != TOP_K_OFF) & (filters.top_p < TOP_P_OFF)


@triton.jit
def is_shared(filters, inside, rank, shifted):
    """Tokens whose mass top_p is a share of, where that is not the row's."""
    return (
        inside
        & (rank < filters.top_k)
        & ((filters.order != ORDER_VLLM) | (shifted >= filters.min_p_shift))
    )


@triton.jit
def is_left(filters, inside, rank, shifted):
    """Tokens that top_k and min_p leave."""
    return inside & (rank < filters.top_k) & (shifted >= filters.min_p_shift)


# Candidates


@triton.jit
def cutoff_bound(shifted, live, sums, hi, need_count, need_share, use_mass):
    """A value, as x - max, with enough tokens from it up; -inf where none is found.

    ``shifted`` are the maxima of the tiles. A tile whose maximum is at least the bound holds that
    token above it, and all of its mass but what 127 tokens below the bound can hold. Where these
    meet the need, no token below the bound is kept.
    """
    weight = tl.exp2(shifted * hi)
    inner = tl.where(live, sums * weight, 0.0)
    # fp32 sums of thousands of terms and approximate exponentials: 1e-4 covers both many times.
    need_mass = need_share * tl.sum(inner, 0) * 1.0001
    step = tl.arange(0, TRIALS)
    upper = tl.full([], 0.0, tl.float32)
    lower = tl.min(tl.where(live, shifted, 0.0), 0)
    bound = tl.full([], -INF, tl.float32)
    for trial in tl.static_range(4):
        part = (step + 1).to(tl.float32) / TRIALS
        if trial == 0:
            part = part * part * part  # close to the maximum first: outliers lie far below
        pivots = upper + (lower - upper) * part
        above = live[None, :] & (shifted[None, :] >= pivots[:, None])
        count = tl.sum(above.to(tl.int32), 1)
        rest = inner[None, :] - 127.0 * tl.exp2(pivots * hi)[:, None]
        held = tl.sum(tl.where(above, tl.maximum(weight[None, :], rest), 0.0), 1)
        met = (count >= need_count) | (use_mass & (held >= need_mass))
        first = tl.min(tl.where(met, step, TRIALS), 0)
        passed = tl.max(tl.where(step == first - 1, pivots, -INF), 0)
        upper = tl.where(first > 0, passed, upper)
        found = tl.max(tl.where(step == first, pivots, -INF), 0)
        lower = tl.where(first < TRIALS, found, lower)
        bound = tl.where(first < TRIALS, found, bound)
    return bound


@triton.jit
def guess_pivots(
    logits, tiles, alpha, b, t, first_tile, row_max, shifted, weight, whole, share, hi, of_mass,
    vocab_size,
):  # fmt: skip
    """Eight values around where a flat row's cutoff may lie, as x - max, descending: fp32 [8].

    The tiles' maxima (``shifted``, of weight ``weight``) are known, each the largest of 128. Evenly
    spaced tokens stand for the others, whose weights together are known too. The pivots reach four
    standard deviations of that estimate to each side of where the weights above make up ``share``
    of ``whole``. A wrong guess costs time alone.
    """
    ids = ((tl.arange(0, SAMPLES).to(tl.int64) * vocab_size) // SAMPLES).to(tl.int32)
    x = cleaned(combined(logits, alpha, b, t, ids, ids < vocab_size), row_max)
    sampled = shifted_from(x, row_max)
    other = (x > -INF) & (x < tl.load(tiles.maximum + first_tile + ids // TILE))
    stands = tl.where(other, tl.where(of_mass, tl.exp2(sampled * hi), 1.0), 0.0)
    rest = tl.maximum(whole - tl.sum(weight, 0), 0.0)
    stands = stands * (rest / tl.maximum(tl.sum(stands, 0), 1e-30))
    lowest = tl.min(tl.where(other, sampled, 0.0), 0)
    side = tl.where(tl.arange(0, 2) == 0, -1.0, 1.0)
    error = tl.full([], 0.0, tl.float32)
    upper, lower = error, error
    for _ in range(2):  # the cutoff itself, then both ends
        wanted = share * whole + 4.0 * side * error
        below, above = tl.zeros([2], tl.float32) + lowest, tl.zeros([2], tl.float32)
        for _step in range(16):
            middle = 0.5 * below + 0.5 * above  # their sum may be past fp32
            held = tl.sum(tl.where(shifted[None, :] >= middle[:, None], weight[None, :], 0.0), 1)
            reached = sampled[None, :] >= middle[:, None]
            held += tl.sum(tl.where(reached, stands[None, :], 0.0), 1)
            below = tl.where(held >= wanted, middle, below)
            above = tl.where(held >= wanted, above, middle)
        upper = tl.max(tl.where(side < 0, below, -INF), 0)
        lower = tl.min(tl.where(side > 0, below, INF), 0)
        # The share of the others that lies above is estimated from SAMPLES of them.
        taken = (sampled >= upper).to(tl.float32)
        inner = tl.sum(stands * taken, 0) / tl.maximum(rest, 1e-30)
        off = stands * (taken - inner)
        error = tl.sqrt(tl.sum(off * off, 0))
    part = tl.arange(0, NUM_PIVOTS).to(tl.float32) / (NUM_PIVOTS - 1)
    return upper + (lower - upper) * part


@triton.jit
def load_keys(keys, start, n, SIZE: tl.constexpr):
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
def list_candidates(
    logits, alpha, b, t, row, workspace, keys, wanted, row_max, least, vocab_size,
    NT: tl.constexpr,
):  # fmt: skip
    """Lists in ``keys`` the tokens of wanted tiles with x - max >= least; returns their number.

    Where there are more than MAX_SHORT, or more than MAX_TILES tiles, it returns MAX_SHORT + 1, and
    the list is of no use.
    """
    n = tl.full([], 0, tl.int32)
    number = tl.sum(wanted.to(tl.int32), 0)
    if number > MAX_TILES:
        n = tl.full([], MAX_SHORT + 1, tl.int32)
    else:
        chosen = workspace.tiles + row * MAX_TILES
        slot = tl.cumsum(wanted.to(tl.int32), 0) - 1
        tl.store(chosen + slot, tl.arange(0, NT), mask=wanted)
        tl.debug_barrier()  # read by other threads than wrote them
        for start in range(0, number, GATHERED):
            i = start + tl.arange(0, GATHERED)
            tile = tl.load(chosen + i, mask=i < number, other=0)
            ids = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
            inside = (i < number)[:, None] & (ids < vocab_size)
            x = cleaned(combined(logits, alpha, b, t, ids, inside), row_max)
            # As the tiles' maxima: least may be -FLT_MAX for differences past it.
            taken = (x > -INF) & (tl.maximum(x - finite_max(row_max), -FLT_MAX) >= least)
            n = append(keys, n, x, ids, taken, MAX_SHORT)
        tl.debug_barrier()
    return n


@triton.jit
def narrow_candidates(keys, n, short, limit, row_max, e, above, need):
    """Copies to ``short`` at most ``limit`` of n listed tokens: the last one needed is among them.

    The list meets the need; what is ``above`` it does not. Returns how many were copied, and the
    amount above them.
    """
    above_count, above_mass = above.count, above.mass
    lower, upper = tl.full([], 1, tl.int64), tl.full([], 1 << 51, tl.int64)
    inside = n.to(tl.int64)
    while inside > limit:
        trials = trial_keys(lower, upper)
        count = tl.zeros([TRIALS], tl.int64)
        held = tl.zeros([TRIALS], tl.int64)
        for start in range(0, n, CHUNK):
            key = load_keys(keys, start, n, CHUNK)
            q = tl.where(key > 0, mass(key_value(key), row_max, e), 0)
            taken = (key[None, :] >= trials[:, None]) & (key[None, :] < upper)
            count += tl.sum(taken.to(tl.int64), 1)
            held += tl.sum(tl.where(taken, q[None, :], 0), 1)
        met = (above_count + count >= need.count) | (above_mass + held >= need.mass)
        lower, upper, first = bracket(trials, met, lower, upper)
        step = tl.arange(0, TRIALS)
        passed_count = tl.sum(tl.where(step == first - 1, count, 0), 0)
        inside = tl.sum(tl.where(step == first, count, 0), 0) - passed_count
        above_count += passed_count
        above_mass += tl.sum(tl.where(step == first - 1, held, 0), 0)
    copied = tl.full([], 0, tl.int32)
    for start in range(0, n, CHUNK):
        key = load_keys(keys, start, n, CHUNK)
        taken = (key >= lower) & (key < upper)
        copied = append(short, copied, key_value(key), key_id(key), taken, limit)
    tl.debug_barrier()
    return copied, Amount(above_count, above_mass)


@triton.jit
def rank_candidates(candidates, row_max, e, above, filters):
    """Writes each candidate's rank and the mass before it; ``above`` comes before all of them.

    Returns the mass that top_p is a share of, where that is not the row's.
    """
    n, whole = candidates.n, above.mass
    for start in range(0, n, CHUNK):
        key = load_keys(candidates.keys, start, n, CHUNK)
        rank = tl.zeros([CHUNK], tl.int32) + above.count.to(tl.int32)
        before = tl.zeros([CHUNK], tl.int64) + above.mass
        for other in range(0, n, RIVALS):
            rival = load_keys(candidates.keys, other, n, RIVALS)
            q = tl.where(rival > 0, mass(key_value(rival), row_max, e), 0)
            first = rival[None, :] > key[:, None]
            rank += tl.sum(first.to(tl.int32), 1)
            before += tl.sum(tl.where(first, q[None, :], 0), 1)
        i = start + tl.arange(0, CHUNK)
        tl.store(candidates.rank + i, rank, mask=i < n)
        tl.store(candidates.before + i, before, mask=i < n)
        x = key_value(key)
        shared = is_shared(filters, i < n, rank, x - row_max)
        whole += tl.sum(tl.where(shared, mass(x, row_max, e), 0), 0)
    tl.debug_barrier()  # ranks are read by other threads than wrote them
    return whole


@triton.jit
def keep_candidates(candidates, row_max, e, above, filters, low_target, high_target):
    """The kept set among ranked candidates, for two bounds of the mass that top_p asks for.

    Returns (tokens kept at the low bound, at the high bound, mass, order key of the last): where
    the counts agree, so do the sets.
    """
    n, kept_mass = candidates.n, above.mass
    low_count, high_count = above.count, above.count
    cutoff = tl.full([], NO_TARGET, tl.int64)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        key = load_keys(candidates.keys, start, n, CHUNK)
        rank = tl.load(candidates.rank + i, mask=i < n, other=0)
        before = tl.load(candidates.before + i, mask=i < n, other=0)
        x = key_value(key)
        left = is_left(filters, i < n, rank, x - row_max)
        kept = left & (before < low_target)
        low_count += tl.sum(kept.to(tl.int64), 0)
        high_count += tl.sum((left & (before < high_target)).to(tl.int64), 0)
        kept_mass += tl.sum(tl.where(kept, mass(x, row_max, e), 0), 0)
        cutoff = tl.minimum(cutoff, tl.min(tl.where(kept, key, NO_TARGET), 0))
    return low_count, high_count, kept_mass, cutoff


@triton.jit
def gumbel_max_candidates(keys, n, cutoff, row_max, inv_t, noise):
    """Packed score of the best of the listed tokens whose key is at least ``cutoff``."""
    best = tl.full([], LOWEST, tl.int64)
    for start in range(0, n, CHUNK):
        key = load_keys(keys, start, n, CHUNK)
        ids, kept = key_id(key), (key >= cutoff) & (key > 0)
        g = gumbel(uniform(token_words(ids, noise, 0), ids, noise))
        score = (key_value(key) - row_max) * inv_t + g
        best = tl.maximum(best, best_of(tl.where(kept, score, -INF), ids))
    return best


# A search through the row


@triton.jit
def trial_keys(lower, upper):
    """Keys that part [lower, upper) evenly, descending, the last of them lower: int64 [TRIALS]."""
    span = (upper - lower + TRIALS - 1) // TRIALS
    return tl.maximum(upper - span * (tl.arange(0, TRIALS) + 1), lower)


@triton.jit
def bracket(trials, met, lower, upper):
    """[lower, upper) between the first trial that meets the need and the one before it."""
    step = tl.arange(0, TRIALS)
    first = tl.min(tl.where(met, step, TRIALS), 0)
    lower = tl.where(first < TRIALS, tl.max(tl.where(step == first, trials, 0), 0), lower)
    upper = tl.where(first > 0, tl.max(tl.where(step == first - 1, trials, 0), 0), upper)
    return lower, upper, first


@triton.jit
def amounts_from(logits, row_params, b, t, row_max, least, trials, vocab_size):
    """Counts and masses of the tokens from each trial key up, x - max at least ``least``: int64."""
    alpha = tl.load(row_params.alpha + b)
    e = exponent(tl.load(row_params.temperature + b))
    top = finite_max(row_max)
    count = tl.zeros([TRIALS, LANES], tl.int32)
    held = tl.zeros([TRIALS, LANES], tl.int64)
    for block in range(0, tl.cdiv(vocab_size, LANES * SEARCH_PER)):
        x = block_x(logits, alpha, b, t, block, row_max, vocab_size, SEARCH_PER)
        shifted = x - top
        inside = (x > -INF) & (shifted >= least)
        key = tl.where(inside, order_key(x, block_ids(block, SEARCH_PER)), 0)
        count, held = add_from(key, digits(exponential(shifted, e)), trials, count, held)
    return tl.sum(count.to(tl.int64), 1), tl.sum(held, 1)


@triton.jit
def add_from(values, q, trials, count, held):
    """Adds to each lane's counts and masses, [n, 128], a block's tokens from each trial value up.

    Values are keys or x, [128, PER]; q is the digits of the tokens' masses.
    """
    above = values[None, :, :] >= trials[:, None, None]
    count += tl.sum(above.to(tl.int32), 2)
    highs = tl.sum(tl.where(above, q[0][None, :, :], 0), 2).to(tl.int64)
    lows = tl.sum(tl.where(above, q[1][None, :, :], 0), 2).to(tl.int64)
    return count, held + (highs << 22) + lows


@triton.jit
def search_row(logits, row_params, b, t, row_max, vocab_size):
    """The kept set of any row: (least key, least x - max, count, mass, number of its tokens).

    It reads the row once for every three bits of a cutoff's key, seventeen times at most. One loop
    of passes with trial keys between ``lower`` and ``upper``; a phase ends where one key is left.
    EVERY: the row. WHOLE: what order "vllm" leaves of min_p; the row in other orders. COUNT:
    top_k's cutoff. SHARE: top_p's. KEPT_SET: the result, min_p's threshold included.
    """
    greedy, _ = temperature_of(row_params, b)
    filters = filters_of(row_params, b, vocab_size)
    order = filters.order
    top_k = tl.where(greedy, 1, filters.top_k)
    top_p = tl.where(greedy, TOP_P_OFF, filters.top_p)
    min_p_shift = tl.where(greedy, -INF, filters.min_p_shift)
    none = tl.full([], NO_TARGET, tl.int64)
    top = order_key(finite_max(row_max), tl.full([], 0, tl.int32)) + 1
    lowest = tl.full([], 1, tl.int64)
    phase = tl.full([], EVERY, tl.int32)
    lower, upper, cutoff = lowest, lowest, lowest
    least = tl.full([], -INF, tl.float32)
    need_count, need_mass = tl.full([], TOP_K_OFF, tl.int32), none
    at_lower, mass_at_lower = lowest, lowest
    live, whole = lowest, lowest
    step = tl.arange(0, TRIALS)
    while phase != FOUND:
        trials = trial_keys(lower, upper)
        count, held = amounts_from(logits, row_params, b, t, row_max, least, trials, vocab_size)
        met = (count >= need_count) | (held >= need_mass)
        met = met | (trials == lower)  # where none has enough, all tokens are kept
        lower, upper, first = bracket(trials, met, lower, upper)
        at_lower = tl.sum(tl.where(step == first, count, 0), 0)
        mass_at_lower = tl.sum(tl.where(step == first, held, 0), 0)
        if upper - lower <= 1:
            if phase == EVERY:
                live = at_lower
                phase = tl.full([], WHOLE, tl.int32)
                least = tl.where(order == ORDER_VLLM, min_p_shift, -INF)
                lower, upper = lowest, lowest
            elif phase == KEPT_SET:
                phase = tl.full([], FOUND, tl.int32)
            else:
                cutoff = tl.maximum(cutoff, lower)
                whole = mass_at_lower
                if (phase == WHOLE) & (top_k < at_lower) & (order != ORDER_JOINT):
                    phase = tl.full([], COUNT, tl.int32)
                    need_count, need_mass = top_k, none
                    lower, upper = lowest, top
                elif (phase != SHARE) & (
                    (top_p < TOP_P_OFF) | ((phase == WHOLE) & (top_k < at_lower))
                ):
                    phase = tl.full([], SHARE, tl.int32)
                    need_count = tl.where(order == ORDER_JOINT, top_k, TOP_K_OFF)
                    need_mass = mass_target(top_p, whole)
                    lower, upper = lowest, top
                else:
                    phase = tl.full([], KEPT_SET, tl.int32)
                    least = min_p_shift
                    lower, upper = cutoff, cutoff
    return cutoff, min_p_shift, at_lower, mass_at_lower, live


# A sorted list


@triton.jit
def sorted_prefix(keys, n, floor, row_max, e, need_count, need_mass):
    """The shortest prefix that meets a need. Keys descend; those from ``floor`` up are certain."""
    length, held = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    certain = tl.full([], 0, tl.int64)
    last, prefix_mass = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for start in range(0, n, SORTED_CHUNK):
        i = start + tl.arange(0, SORTED_CHUNK)
        key = tl.load(keys + i, mask=i < n, other=0)
        taken = key >= floor
        q = tl.where(taken, mass(key_value(key), row_max, e), 0)
        through = held + tl.cumsum(q, 0)
        # Tokens before which the need is not met: the prefix is these.
        short = taken & (i < need_count) & (through - q < need_mass)
        length += tl.sum(short.to(tl.int64), 0)
        prefix_mass += tl.sum(tl.where(short, q, 0), 0)
        ends = tl.where(short, key, NO_TARGET)
        last = tl.where(tl.sum(short.to(tl.int64), 0) > 0, tl.min(ends, 0), last)
        certain += tl.sum(taken.to(tl.int64), 0)
        held += tl.sum(q, 0)
    known = (length == need_count) | (prefix_mass >= need_mass)
    return Prefix(known, last, tl.where(known, length, certain + 1), prefix_mass)


@triton.jit
def shorter(one, other):
    """The shorter of two prefixes, the first where they are as long."""
    takes = other.length < one.length
    return Prefix(
        tl.where(takes, other.known, one.known),
        tl.where(takes, other.cutoff, one.cutoff),
        tl.where(takes, other.length, one.length),
        tl.where(takes, other.mass, one.mass),
    )


@triton.jit
def min_p_cutoff(row_max, min_p_shift):
    """The lowest key with fl(x - max) >= min_p_shift, by halving the ordered values."""
    low = tl.full([], NO_CUTOFF >> 19, tl.int64)
    high = order_key(row_max, tl.full([], 0, tl.int32)) >> 19
    while low < high:
        middle = low + (high - low) // 2
        likely = key_value(middle << 19) - row_max >= min_p_shift
        low = tl.where(likely, low, middle + 1)
        high = tl.where(likely, middle, high)
    return low << 19


@triton.jit
def select_sorted(keys, n, floor, row_max, e, row, likely, filters):
    """The kept set, from a sorted list and the amounts of the row and of what min_p leaves."""
    yes, none = tl.full([], True, tl.int1), tl.full([], NO_TARGET, tl.int64)
    no_cutoff = tl.full([], NO_CUTOFF, tl.int64)
    by_count = Prefix(yes, no_cutoff, row.count, row.mass)
    if filters.top_k != TOP_K_OFF:
        need = filters.top_k.to(tl.int64)
        found = sorted_prefix(keys, n, floor, row_max, e, need, none)
        by_count = Prefix(found.known, found.cutoff, need, found.mass)
    cutoff = no_cutoff
    if filters.min_p_shift > -INF:
        cutoff = min_p_cutoff(row_max, filters.min_p_shift)
    by_min_p = Prefix(yes, cutoff, likely.count, likely.mass)
    # What top_p's mass is a share of
    whole_known, whole = yes, row.mass
    if filters.order == ORDER_VLLM:
        both = shorter(by_min_p, by_count)
        whole_known, whole = both.known, both.mass
    if filters.order == ORDER_HF:
        whole_known, whole = by_count.known, by_count.mass
    kept = shorter(by_min_p, by_count)
    if filters.top_p < TOP_P_OFF:
        target = mass_target(filters.top_p, whole)
        found = sorted_prefix(keys, n, floor, row_max, e, none, target)
        known, length = found.known & whole_known, tl.where(whole_known, found.length, 1)
        kept = shorter(kept, Prefix(known, found.cutoff, length, found.mass))
    return kept
