"""selection."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels.common import (
    ALL,
    FLT_MIN,
    INF,
    LANES,
    LOWEST,
    NO_CUT,
    NO_TARGET,
    ORDER_HF,
    ORDER_JOINT,
    ORDER_VLLM,
    TILE,
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
    temperature_of,
)
from proxytune_kernels.kernels.noise import best_of, gumbel, token_words, uniform


@triton.jit
def filters_of(row_params, b, vocab_size):
    """Valid filters: (top_k, top_p, min_p's shift, order); docs/contracts.md, Selection.

    top_k is ALL where it is off, top_p has 32 fractional bits, the shift is the least x - max that
    min_p keeps, -inf where it is off.
    """
    temperature, top_k = tl.load(row_params.temperature + b), tl.load(row_params.top_k + b)
    top_p, min_p = tl.load(row_params.top_p + b), tl.load(row_params.min_p + b)
    divisor = tl.where(temperature < FLT_MIN, 1.0, temperature)
    shift = (divisor.to(tl.float64) * tl.log(min_p.to(tl.float64))).to(tl.float32)
    shift = tl.where(min_p > 0, shift, -INF)
    top_k = tl.where((top_k > 0) & (top_k < vocab_size), top_k, ALL)
    share = (top_p.to(tl.float64) * 4294967296.0).to(tl.int64)
    return top_k, share, shift, tl.load(row_params.filter_order + b)


@triton.jit
def is_unfiltered(greedy, top_k, top_p, min_p):
    """Whether the row draws from all its tokens: the first pass then bounds every tile's race."""
    return (greedy == 0) & (top_k == ALL) & (top_p >= 1.0) & (min_p <= 0.0)


NUM_PIVOTS = tl.constexpr(8)
SHORT = tl.constexpr(512)
MAX_TILES = tl.constexpr(64)
STEPS = tl.constexpr(8)  # trial cutoffs at once
SAMPLES = tl.constexpr(1024)  # tokens that tell where a flat row's cutoff may lie


@triton.jit
def cutoff_bound(d, live, sums, hi, need_count, need_share, use_mass):
    """A value that the last token needed is not below, as x - max: -inf where none is found.

    Of a tile whose maximum is at least the bound, that maximum is above it, and all of its mass but
    what 127 tokens below the bound can hold. When these meet the need, the tokens do.
    """
    weight = tl.exp2(d * hi)
    inner = tl.where(live, sums * weight, 0.0)
    # fp32 sums of thousands of terms and approximate exponentials: 1e-4 covers both many times.
    need_mass = need_share * tl.sum(inner, 0) * 1.0001
    step = tl.arange(0, STEPS)
    upper = tl.full([], 0.0, tl.float32)
    lower = tl.min(tl.where(live, d, 0.0), 0)
    bound = tl.full([], -INF, tl.float32)
    for trial in tl.static_range(4):
        part = (step + 1).to(tl.float32) / STEPS
        if trial == 0:
            part = part * part * part  # close to the maximum first: outliers lie far below
        pivots = upper + (lower - upper) * part
        above = live[None, :] & (d[None, :] >= pivots[:, None])
        count = tl.sum(above.to(tl.int32), 1)
        rest = inner[None, :] - 127.0 * tl.exp2(pivots * hi)[:, None]
        held = tl.sum(tl.where(above, tl.maximum(weight[None, :], rest), 0.0), 1)
        met = (count >= need_count) | (use_mass & (held >= need_mass))
        first = tl.min(tl.where(met, step, STEPS), 0)
        passed = tl.max(tl.where(step == first - 1, pivots, -INF), 0)
        upper = tl.where(first > 0, passed, upper)
        found = tl.max(tl.where(step == first, pivots, -INF), 0)
        lower = tl.where(first < STEPS, found, lower)
        bound = tl.where(first < STEPS, found, bound)
    return bound


@triton.jit
def guess_pivots(
    logits, strides, tiles, alpha, b, t, first_tile, row_max, d, weight, whole, share, hi, of_mass,
    vocab_size,
):  # fmt: skip
    """Eight values around where a flat row's cutoff may lie, as x - max, descending: fp32 [8].

    The tiles' maxima (d, of weight ``weight``) are known, each the largest of 128; evenly spaced
    tokens stand for the others, whose weights together are known too. The pivots reach four
    standard deviations of that estimate to each side of where the weights above make up ``share``
    of ``whole``. A wrong guess costs time alone.
    """
    ids = ((tl.arange(0, SAMPLES).to(tl.int64) * vocab_size) // SAMPLES).to(tl.int32)
    x = cleaned(combined(logits, strides, alpha, b, t, ids, ids < vocab_size), row_max)
    sampled = x - row_max
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
            middle = 0.5 * (below + above)
            held = tl.sum(tl.where(d[None, :] >= middle[:, None], weight[None, :], 0.0), 1)
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


CHUNK = tl.constexpr(128)
TRIALS = tl.constexpr(8)  # cuts tried at once
PAIRED = tl.constexpr(16)


@triton.jit
def listed_keys(keys, start, n, SIZE: tl.constexpr):
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
            key = listed_keys(keys, start, n, CHUNK)
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
        key = listed_keys(keys, start, n, CHUNK)
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
        key = listed_keys(keys, start, n, CHUNK)
        rank = tl.zeros([CHUNK], tl.int32) + above_count.to(tl.int32)
        before = tl.zeros([CHUNK], tl.int64) + above_mass
        for other in range(0, n, PAIRED):
            rival = listed_keys(keys, other, n, PAIRED)
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
        key = listed_keys(keys, start, n, CHUNK)
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
        key = listed_keys(keys, start, n, CHUNK)
        ids, kept = key_id(key), (key >= cut) & (key > 0)
        g = gumbel(uniform(token_words(ids, seed, position, stream), ids, seed, position, stream))
        score = (key_value(key) - row_max) * inv_t + g
        best = tl.maximum(best, best_of(tl.where(kept, score, -INF), ids))
    return best


GATHERED = tl.constexpr(16)  # tiles read at once


@triton.jit
def list_tokens(
    logits, strides, state, keys, alpha, b, t, row, candidates, row_max, least, vocab_size,
    NT: tl.constexpr,
):  # fmt: skip
    """Lists in ``keys`` the tokens of candidate tiles with x - max >= least; returns their number.

    More than SHORT, or more than MAX_TILES tiles: SHORT + 1, and the list is of no use.
    """
    n = tl.full([], 0, tl.int32)
    number = tl.sum(candidates.to(tl.int32), 0)
    if number > MAX_TILES:
        n = tl.full([], SHORT + 1, tl.int32)
    else:
        chosen = state.tiles + row * MAX_TILES
        slot = tl.cumsum(candidates.to(tl.int32), 0) - 1
        tl.store(chosen + slot, tl.arange(0, NT), mask=candidates)
        tl.debug_barrier()  # read by other threads than wrote them
        for start in range(0, number, GATHERED):
            i = start + tl.arange(0, GATHERED)
            tile = tl.load(chosen + i, mask=i < number, other=0)
            ids = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
            inside = (i < number)[:, None] & (ids < vocab_size)
            x = cleaned(combined(logits, strides, alpha, b, t, ids, inside), row_max)
            taken = (x > -INF) & (x - finite_max(row_max) >= least)
            n = append(keys, n, x, ids, taken, SHORT)
        tl.debug_barrier()
    return n


SEARCH_PER = tl.constexpr(2)  # tokens a lane: trial keys take eight registers for each
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
    for block in range(0, tl.cdiv(vocab_size, LANES * SEARCH_PER)):
        x = block_x(logits, strides, alpha, b, t, block, row_max, vocab_size, SEARCH_PER)
        d = x - top
        key = tl.where((x > -INF) & (d >= least), order_key(x, block_ids(block, SEARCH_PER)), 0)
        high, low = digits(exponential(d, hi, lo, floor))
        above = key[None, :, :] >= trials[:, None, None]
        count += tl.sum(above.to(tl.int32), 2)
        highs = tl.sum(tl.where(above, high[None, :, :], 0), 2).to(tl.int64)
        lows = tl.sum(tl.where(above, low[None, :, :], 0), 2).to(tl.int64)
        held += (highs << 22) + lows
    return tl.sum(count.to(tl.int64), 1), tl.sum(held, 1)


@triton.jit
def search_row(logits, strides, row_params, b, t, row_max, vocab_size):
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


SORTED_CHUNK = tl.constexpr(256)


@triton.jit
def sorted_prefix(keys, n, floor, row_max, hi, lo, floor_d, need_count, need_mass):
    """(known, key of the last token, length, mass) of the shortest prefix that meets a need.

    Keys are sorted, descending; the certain ones are from ``floor`` up. Where they do not meet the
    need, the length is one more than theirs.
    """
    length, held = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    certain = tl.full([], 0, tl.int64)
    last, prefix_mass = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for start in range(0, n, SORTED_CHUNK):
        i = start + tl.arange(0, SORTED_CHUNK)
        key = tl.load(keys + i, mask=i < n, other=0)
        taken = key >= floor
        q = tl.where(taken, mass(key_value(key), row_max, hi, lo, floor_d), 0)
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
    return known, last, tl.where(known, length, certain + 1), prefix_mass


@triton.jit
def shorter(known, cut, length, held, other_known, other_cut, other_length, other_held):
    """The shorter of two prefixes, the first where they are as long."""
    other = other_length < length
    return (
        tl.where(other, other_known, known),
        tl.where(other, other_cut, cut),
        tl.where(other, other_length, length),
        tl.where(other, other_held, held),
    )


@triton.jit
def min_p_cut(row_max, shift):
    """The lowest cut with fl(x - max) >= shift, by halving the ordered values."""
    low = tl.full([], NO_CUT >> 19, tl.int64)
    high = order_key(row_max, tl.full([], 0, tl.int32)) >> 19
    while low < high:
        middle = low + (high - low) // 2
        likely = key_value(middle << 19) - row_max >= shift
        low = tl.where(likely, low, middle + 1)
        high = tl.where(likely, middle, high)
    return low << 19


@triton.jit
def select_sorted(
    keys, n, floor, row_max, hi, lo, floor_d, tokens, total, likely, likely_mass, top_k, top_p,
    shift, order,
):  # fmt: skip
    """(known, cut, length, mass) of the kept set; docs/contracts.md, Selection."""
    yes, none = tl.full([], True, tl.int1), tl.full([], NO_TARGET, tl.int64)
    no_cut = tl.full([], NO_CUT, tl.int64)
    k_known, k_cut, k_length, k_held = yes, no_cut, tokens, total
    if top_k != ALL:
        need = top_k.to(tl.int64)
        k_known, k_cut, k_length, k_held = sorted_prefix(
            keys, n, floor, row_max, hi, lo, floor_d, need, none
        )
        k_length = need
    cut = no_cut
    if shift > -INF:
        cut = min_p_cut(row_max, shift)
    # What top_p's mass is a share of
    whole_known, whole = yes, total
    if order == ORDER_VLLM:
        whole_known, _, _, whole = shorter(
            yes, cut, likely, likely_mass, k_known, k_cut, k_length, k_held
        )
    if order == ORDER_HF:
        whole_known, whole = k_known, k_held
    known, cut, length, held = shorter(
        yes, cut, likely, likely_mass, k_known, k_cut, k_length, k_held
    )
    if top_p < TOP_P_OFF:
        p_known, p_cut, p_length, p_held = sorted_prefix(
            keys, n, floor, row_max, hi, lo, floor_d, none, mass_target(top_p, whole)
        )
        p_known = p_known & whole_known
        p_length = tl.where(whole_known, p_length, 1)
        known, cut, length, held = shorter(
            known, cut, length, held, p_known, p_cut, p_length, p_held
        )
    return known, cut, length, held
