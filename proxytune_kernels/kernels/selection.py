"""The kept set: top_k, min_p and top_p, in three filter orders (docs/contracts.md, Selection).

Tokens are ordered by their order keys, highest first. The kept set is a prefix of that order, the
shortest of what each filter leaves:

    top_k    rank < top_k
    min_p    x - max >= min_p_shift = T log(min_p)
    top_p    mass of the tokens before it < ceil(top_p * whole); whole is the mass of
             what min_p and top_k leave ("vllm"), what top_k leaves ("hf"), or the row ("joint")

Ranks and masses are integers, so what finds the set does not show in it. :func:`select_kept` has
the policy; what looks for a prefix is one of four searches:

- *pivots*: amounts of the row from a few keys up. It may leave a prefix between two of them;
- *a list* of tokens, all that there are between two keys;
- *the row*, read once for every three bits of a key: for rows that defeat the pivots;
- *a sorted list*: what the ranks of a sharded row sent, as far as it reaches.
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
    LAST_ID,
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
    exponent,
    finite_max,
    key_id,
    key_value,
    mass,
    mass_target,
    order_key,
)
from proxytune_kernels.kernels.noise import gumbel, packed_score, token_words, uniform

NUM_PIVOTS = tl.constexpr(32)  # the row's bottom, min_p's cutoff, and 30 between which tokens lie
SAMPLES = tl.constexpr(1024)  # tokens that say where the pivots should be
RANKED = tl.constexpr(512)  # of them that may be one
MAX_SHORT = tl.constexpr(512)  # candidates of a row that select finishes
MAX_TILES = tl.constexpr(256)  # tiles that they are listed from
GATHERED = tl.constexpr(8)  # of them at once
CHUNK = tl.constexpr(128)  # listed tokens at once
COPIED = tl.constexpr(512)  # at once where they are sorted out
RIVALS = tl.constexpr(16)  # that each of them is compared with at once
TRIALS = tl.constexpr(8)  # trial cutoffs at once
SEARCH_PER = tl.constexpr(2)  # tokens a lane: trial keys take eight registers for each
SORTED_CHUNK = tl.constexpr(128)
END = tl.constexpr(1 << 51)  # above all order keys
# A count above a mass, in 64 bits: of fewer than 512 tokens, as many as a lane takes.
COUNT_SHIFT = tl.constexpr(54)
COUNT_ONE = tl.constexpr(1 << 54)
MASS_BITS = tl.constexpr((1 << 54) - 1)


class Filters(NamedTuple):
    """Valid filters of a row."""

    top_k: Any  # TOP_K_OFF where it is off
    top_p: Any  # int64 with 32 fractional bits; TOP_P_OFF where it is off
    min_p_shift: Any  # the least x - max that min_p keeps; -inf where it is off
    order: Any


class Amount(NamedTuple):
    """Tokens and their mass, int64."""

    count: Any
    mass: Any


class Prefix(NamedTuple):
    """A prefix of the order, as far as it is known: its last token's key is in [low, high].

    Where low and high are the same the amounts are too, and it is the tokens from that key up.
    """

    low: Any
    most: Amount  # of the tokens from low up
    high: Any
    least: Amount  # from high up


class Pivots(NamedTuple):
    """Keys of a row in any order, and the amounts from each up: int64 [NUM_PIVOTS]."""

    key: Any
    count: Any
    mass: Any


class List(NamedTuple):
    """Order keys in any order: all tokens of two prefixes that are not certain, and others."""

    keys: Any  # int64
    n: Any  # their number
    short: Any  # int64 [CHUNK]: scratch
    row_max: Any
    exponent: Any
    first: Prefix  # what select_kept's first stage looks for
    second: Prefix


class Row(NamedTuple):
    """A row, to be read as often as it takes."""

    logits: Any
    row_params: Any
    b: Any
    t: Any
    row_max: Any
    vocab_size: Any


class Sorted(NamedTuple):
    """Order keys, descending, 0 past the last; all of the row from ``floor`` up are among them."""

    keys: Any  # int64
    n: Any
    floor: Any
    row_max: Any
    exponent: Any
    row: Prefix  # all tokens
    likely: Prefix  # what min_p leaves


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
    """The filters of request b; greedy rows keep one token."""
    temperature, top_k = tl.load(row_params.temperature + b), tl.load(row_params.top_k + b)
    top_p, min_p = tl.load(row_params.top_p + b), tl.load(row_params.min_p + b)
    greedy = temperature < FLT_MIN
    divisor = tl.where(greedy, 1.0, temperature)
    min_p_shift = (divisor.to(tl.float64) * tl.log(min_p.to(tl.float64))).to(tl.float32)
    min_p_shift = tl.where((min_p > 0) & (greedy == 0), min_p_shift, -INF)
    top_k = tl.where(greedy, 1, top_k_of(top_k, vocab_size))
    share = tl.where(greedy, TOP_P_OFF, (top_p.to(tl.float64) * 4294967296.0).to(tl.int64))
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


# The policy


@triton.jit
def shorter(one, other):
    """The shorter of two prefixes, ``other`` certain."""
    low_is_other, high_is_other = other.low > one.low, other.low > one.high
    most = Amount(
        tl.where(low_is_other, other.most.count, one.most.count),
        tl.where(low_is_other, other.most.mass, one.most.mass),
    )
    least = Amount(
        tl.where(high_is_other, other.most.count, one.least.count),
        tl.where(high_is_other, other.most.mass, one.least.mass),
    )
    return Prefix(tl.maximum(one.low, other.low), most, tl.maximum(one.high, other.low), least)


@triton.jit
def select_kept(find: tl.constexpr, data, filters, row, likely):
    """The kept set, and what is left before top_p: prefixes. The one place of the filters' policy.

    As select_kept in csrc/common/order.h.

    Args:
        find: ``find(data, stage, low, count, least_mass, most_mass)`` gives the shortest prefix of
            the tokens from key ``low`` up that has ``count`` tokens or the mass, which is within
            the two bounds; all of them where none has. It is called once a stage, 0 and 1.
        data: its first argument.
        filters: valid ones.
        row: all tokens; its mass, which counts where top_p is a share of it, may have two bounds.
        likely: what min_p leaves; ``row`` where it is off. Both end at a key that is certain.
    """
    joint, by_mass = filters.order == ORDER_JOINT, filters.top_p < TOP_P_OFF
    kept = row
    if filters.order == ORDER_VLLM:
        kept = likely
    low = kept.low
    if (filters.top_k != TOP_K_OFF) | (joint & by_mass):
        none = tl.full([], NO_TARGET, tl.int64)
        least = tl.where(joint, mass_target(filters.top_p, row.least.mass), none)
        most = tl.where(joint, mass_target(filters.top_p, row.most.mass), none)
        kept = find(data, 0, low, filters.top_k, least, most)
    first = kept
    if by_mass & (joint == 0):
        least = mass_target(filters.top_p, kept.least.mass)
        most = mass_target(filters.top_p, kept.most.mass)
        kept = find(data, 1, low, TOP_K_OFF, least, most)
    return shorter(kept, likely), first


@triton.jit
def two_stages(filters):
    """Whether top_p is a share of what top_k leaves."""
    cuts = (filters.top_k != TOP_K_OFF) & (filters.top_p < TOP_P_OFF)
    return cuts & (filters.order != ORDER_JOINT)


# Pivots


@triton.jit
def amount_from(pivots, key):
    """The amount from one of the pivots up."""
    at = pivots.key == key
    return Amount(tl.max(tl.where(at, pivots.count, 0), 0), tl.max(tl.where(at, pivots.mass, 0), 0))


@triton.jit
def certain(key, amount):
    """The prefix of the tokens from a key up."""
    return Prefix(key, amount, key, amount)


@triton.jit
def find_in_pivots(pivots, stage: tl.constexpr, low, count, least_mass, most_mass):
    """A search for :func:`select_kept`; ``low`` is one of the pivots."""
    inside = pivots.key >= low
    enough = inside & ((pivots.count >= count) | (pivots.mass >= most_mass))
    scarce = inside & (pivots.count < count) & (pivots.mass < least_mass)
    found = tl.max(enough.to(tl.int32), 0) != 0
    below = tl.max(tl.where(enough, pivots.key, low), 0)
    above = tl.where(found, tl.min(tl.where(scarce, pivots.key, END), 0), low)
    # No pivot is END, and the amount from there up is 0.
    return Prefix(below, amount_from(pivots, below), above, amount_from(pivots, above))


@triton.jit
def choose_pivots(logits, alpha, b, t, row_max, bottom, likely, keys, vocab_size):
    """Keys that part the tokens from ``bottom`` up into about equal numbers: int64 [NUM_PIVOTS].

    Among them are ``bottom`` itself and ``likely``, min_p's cutoff. The others are quantiles of
    evenly spaced tokens, by key, so that equal logits are parted by their ids. Between two lie a
    thirtieth of the tokens, and with 33 samples there seldom twice as many. ``keys`` is scratch.
    """
    i = tl.arange(0, SAMPLES)
    ids = ((i.to(tl.int64) * vocab_size) // SAMPLES).to(tl.int32)
    x = cleaned(combined(logits, alpha, b, t, ids, ids < vocab_size), row_max)
    key = tl.where(x > -INF, order_key(x, ids), 0)
    key = tl.where(key >= bottom, key, 0)
    n = tl.sum((key > 0).to(tl.int32), 0)
    tl.debug_barrier()  # the list has been read
    tl.store(keys + i, key)
    tl.debug_barrier()
    key = tl.load(keys + tl.arange(0, RANKED) * (SAMPLES // RANKED))
    rank = tl.zeros([RANKED], tl.int32)
    for start in range(0, SAMPLES, RIVALS):
        rival = load_keys(keys, start, SAMPLES, RIVALS)
        rank += tl.sum((rival[:, None] > key[None, :]).to(tl.int32), 0)
    step = tl.arange(0, NUM_PIVOTS)
    wanted = (step - 1) * n // (NUM_PIVOTS - 1)
    reached = (key > 0)[None, :] & (rank[None, :] >= wanted[:, None])
    found = tl.max(tl.where(reached, key[None, :], bottom), 1)
    return tl.where(step == 0, bottom, tl.where(step == 1, likely, found))


# A list


@triton.jit
def cutoff_bound(shifted, live, sums, hi, need_count, need_share, use_mass, certainly):
    """A value, as x - max, with enough tokens from it up; -inf where none is found.

    ``shifted`` are the maxima of the tiles. A tile whose maximum is at least the bound holds that
    token above it, and all of its mass but what 127 tokens below the bound can hold. Where these
    meet the need, no token below the bound is kept. Unless ``certainly``, all mass of such a tile
    counts: then the tokens above the bound may be too few.
    """
    weight = tl.exp2(shifted * hi)
    inner = tl.where(live, sums * weight, 0.0)
    # fp32 sums of thousands of terms and approximate exponentials: 1e-4 covers both many times.
    need_mass = need_share * tl.sum(inner, 0) * 1.0001
    most_below = tl.where(certainly, 127.0, 0.0)
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
        rest = inner[None, :] - most_below * tl.exp2(pivots * hi)[:, None]
        held = tl.sum(tl.where(above, tl.maximum(weight[None, :], rest), 0.0), 1)
        met = (count >= need_count) | (use_mass & (held >= need_mass))
        first = tl.min(tl.where(met, step, TRIALS), 0)
        passed = tl.max(tl.where(step == first - 1, pivots, -INF), 0)
        upper = tl.where(first > 0, passed, upper)
        found = tl.max(tl.where(step == first, pivots, -INF), 0)
        lower = tl.where(first < TRIALS, found, lower)
        bound = tl.where(first < TRIALS, found, bound)
    return tl.where(bound > -FLT_MAX, bound, -INF)  # some differences are past fp32


@triton.jit
def load_keys(keys, start, n, SIZE: tl.constexpr):
    """Keys of the list from ``start``, 0 past its end (no token's key is 0)."""
    i = start + tl.arange(0, SIZE)
    return tl.load(keys + i, mask=i < n, other=0)


@triton.jit
def append(keys, n, key, taken, limit):
    """Appends the taken keys to a list of n; returns the new n, also past limit."""
    flat = tl.ravel(taken.to(tl.int32))
    slot = n + tl.cumsum(flat, 0) - 1
    tl.store(keys + slot, tl.ravel(key), mask=(flat != 0) & (slot < limit))
    return n + tl.sum(flat, 0)


@triton.jit
def list_tiles(
    logits, alpha, b, t, row, workspace, keys, wanted, row_max, least, cutoff, vocab_size,
    NT: tl.constexpr,
):  # fmt: skip
    """Lists in ``keys`` tokens of wanted tiles with x - max >= least and a key from ``cutoff`` up.

    Returns their number.

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
        tl.debug_barrier()  # an earlier list's tiles have been read
        tl.store(chosen + slot, tl.arange(0, NT), mask=wanted)
        tl.debug_barrier()  # read by other threads than wrote them
        start = tl.full([], 0, tl.int32)
        while (start < number) & (n <= MAX_SHORT):
            i = start + tl.arange(0, GATHERED)
            tile = tl.load(chosen + i, mask=i < number, other=0)
            ids = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
            inside = (i < number)[:, None] & (ids < vocab_size)
            x = cleaned(combined(logits, alpha, b, t, ids, inside), row_max)
            key = order_key(x, ids)
            taken = (x > -INF) & (x - finite_max(row_max) >= least) & (key >= cutoff)
            n = append(keys, n, key, taken, MAX_SHORT)
            start += GATHERED
        tl.debug_barrier()
    return n


@triton.jit
def amount_of_list(keys, n, cutoff, row_max, e):
    """The amount of the listed tokens whose key is at least ``cutoff``."""
    count, held = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for start in range(0, n, CHUNK):
        key = load_keys(keys, start, n, CHUNK)
        taken = (key > 0) & (key >= cutoff)
        count += tl.sum(taken.to(tl.int64), 0)
        held += tl.sum(tl.where(taken, mass(key_value(key), row_max, e), 0), 0)
    return Amount(count, held)


@triton.jit
def find_in_list(given, stage: tl.constexpr, low, count, least_mass, most_mass):
    """A search for :func:`select_kept`: trial keys until few tokens are left, then all pairs."""
    sought = given.first if stage == 0 else given.second
    if sought.low != sought.high:
        e, row_max = given.exponent, given.row_max
        lower, upper = tl.maximum(sought.low, low), sought.high
        above_count, above_mass = sought.least.count, sought.least.mass
        inside = given.n.to(tl.int64)
        narrows = inside > CHUNK
        by_value = narrows
        while narrows:
            lower, upper = _ends(given, lower, upper)
            trials = _trials(lower, upper, by_value)
            by_value = by_value == 0
            lane_sums = tl.zeros([TRIALS, CHUNK], tl.int64)
            for start in range(0, given.n, CHUNK):
                key = load_keys(given.keys, start, given.n, CHUNK)
                packed = mass(key_value(key), row_max, e) + COUNT_ONE
                packed = tl.where(key < upper, packed, 0)
                lane_sums += tl.where(key[None, :] >= trials[:, None], packed[None, :], 0)
            counts, held = tl.sum(lane_sums >> COUNT_SHIFT, 1), tl.sum(lane_sums & MASS_BITS, 1)
            enough = (above_count + counts >= count) | (above_mass + held >= most_mass)
            enough = enough | (trials == lower)  # where none has enough, all tokens are kept
            scarce = (above_count + counts < count) & (above_mass + held < least_mass)
            step = tl.arange(0, TRIALS)
            # Between the last trial that surely has too little and the first that has enough
            first = tl.min(tl.where(enough, step, TRIALS), 0)
            last = tl.max(tl.where(scarce & (step < first), step, -1), 0)
            passed = tl.sum(tl.where(step == last, counts, 0), 0)
            inside = tl.sum(tl.where(step == first, counts, 0), 0) - passed
            narrowed = tl.max(tl.where(step == first, trials, 0), 0)
            raised = tl.where(last >= 0, tl.max(tl.where(step == last, trials, 0), 0), upper)
            # Bounds of the mass that lie apart may hold more tokens than can be compared.
            narrows = (inside > CHUNK) & ((narrowed > lower) | (raised < upper))
            lower, upper = narrowed, raised
            above_count += passed
            above_mass += tl.sum(tl.where(step == last, held, 0), 0)
        sought = _rank(
            given, lower, upper, Amount(above_count, above_mass), count, least_mass, most_mass
        )
    return sought


@triton.jit
def _trials(lower, upper, by_value):
    """As trial_keys, or evenly by value: keys lie close around 0, values around an outlier."""
    step = tl.arange(0, TRIALS)
    part = (step + 1).to(tl.float32) / TRIALS
    highest, lowest = key_value(upper - 1), key_value(lower)
    x = highest * (1.0 - part) + lowest * part
    keys = tl.maximum(tl.minimum(order_key(x, step * 0 + LAST_ID), upper - 1), lower)
    keys = tl.where(step == TRIALS - 1, lower, keys)
    return tl.where(by_value & (highest != lowest), keys, trial_keys(lower, upper))


@triton.jit
def _ends(given, lower, upper):
    """The narrowest [lower, upper) with the same listed tokens in it: equal logits differ by id."""
    lowest, highest = tl.full([CHUNK], END, tl.int64), tl.zeros([CHUNK], tl.int64)
    for start in range(0, given.n, CHUNK):
        key = load_keys(given.keys, start, given.n, CHUNK)
        inside = (key >= lower) & (key < upper)
        lowest = tl.minimum(lowest, tl.where(inside, key, END))
        highest = tl.maximum(highest, tl.where(inside, key, 0))
    return tl.minimum(tl.min(lowest, 0), upper - 1), tl.maximum(tl.max(highest, 0), lower) + 1


@triton.jit
def _rank(given, lower, upper, above, count, least_mass, most_mass):
    """The prefix that ends among the at most CHUNK listed tokens in [lower, upper)."""
    n = tl.full([], 0, tl.int32)
    tl.debug_barrier()  # an earlier search's tokens have been read
    for start in range(0, given.n, COPIED):
        key = load_keys(given.keys, start, given.n, COPIED)
        n = append(given.short, n, key, (key >= lower) & (key < upper), CHUNK)
    tl.debug_barrier()
    n = tl.minimum(n, CHUNK)
    key = load_keys(given.short, 0, n, CHUNK)
    sums = tl.zeros([CHUNK], tl.int64)
    for start in range(0, n, RIVALS):
        rival = load_keys(given.short, start, n, RIVALS)
        packed = mass(key_value(rival), given.row_max, given.exponent) + COUNT_ONE
        sums += tl.sum(tl.where(rival[:, None] > key[None, :], packed[:, None], 0), 0)
    rank, before = above.count + (sums >> COUNT_SHIFT), above.mass + (sums & MASS_BITS)
    q = tl.where(key > 0, mass(key_value(key), given.row_max, given.exponent), 0)
    most = (key > 0) & (rank < count) & (before < most_mass)
    least = most & (before < least_mass)
    return Prefix(
        tl.min(tl.where(most, key, upper), 0),
        Amount(
            above.count + tl.sum(most.to(tl.int64), 0), above.mass + tl.sum(tl.where(most, q, 0), 0)
        ),
        tl.min(tl.where(least, key, upper), 0),
        Amount(
            above.count + tl.sum(least.to(tl.int64), 0),
            above.mass + tl.sum(tl.where(least, q, 0), 0),
        ),
    )


@triton.jit
def gumbel_max_candidates(keys, n, cutoff, row_max, inv_t, noise):
    """Packed score of the best of the listed tokens whose key is at least ``cutoff``."""
    best = tl.full([CHUNK], LOWEST, tl.int64)
    for start in range(0, n, CHUNK):
        key = load_keys(keys, start, n, CHUNK)
        ids, kept = key_id(key), (key >= cutoff) & (key > 0)
        g = gumbel(uniform(token_words(ids, noise, 0), ids, noise))
        score = (key_value(key) - row_max) * inv_t + g
        best = tl.maximum(best, packed_score(tl.where(kept, score, -INF), ids))
    return tl.max(best, 0)


# The row


@triton.jit
def trial_keys(lower, upper):
    """Keys that part [lower, upper) evenly, descending, the last of them lower: int64 [TRIALS]."""
    span = (upper - lower + TRIALS - 1) // TRIALS
    return tl.maximum(upper - span * (tl.arange(0, TRIALS) + 1), lower)


@triton.jit
def add_from(key, packed, pivots, lane_sums):
    """Adds to each lane's sums, int64 [n, 128], a block's tokens from each of n keys up.

    Keys of the tokens and what is added for each, a mass and COUNT_ONE, are int64 [128, 2].
    """
    # One token a lane after the other: all n sums of both would take too many registers.
    key, next_key = tl.split(key)
    packed, next_packed = tl.split(packed)
    lane_sums += tl.where(key[None, :] >= pivots[:, None], packed[None, :], 0)
    return lane_sums + tl.where(next_key[None, :] >= pivots[:, None], next_packed[None, :], 0)


@triton.jit
def amounts_in_row(row, trials):
    """The amounts of a row from each trial key up."""
    alpha = tl.load(row.row_params.alpha + row.b)
    e = exponent(tl.load(row.row_params.temperature + row.b))
    count, held = tl.zeros([TRIALS, LANES], tl.int64), tl.zeros([TRIALS, LANES], tl.int64)
    for block in range(0, tl.cdiv(row.vocab_size, LANES * SEARCH_PER)):
        key, packed = block_keys(
            row.logits, alpha, row.b, row.t, block, row.row_max, e, row.vocab_size, SEARCH_PER
        )
        sums = add_from(key, packed, trials, tl.zeros([TRIALS, LANES], tl.int64))
        count += sums >> COUNT_SHIFT
        held += sums & MASS_BITS
    return Amount(tl.sum(count, 1), tl.sum(held, 1))


@triton.jit
def block_keys(logits, alpha, b, t, block, row_max, e, vocab_size, PER: tl.constexpr):
    """Keys of a block's tokens, 0 where masked, and mass + COUNT_ONE of each: int64 [128, PER]."""
    x = block_x(logits, alpha, b, t, block, row_max, vocab_size, PER)
    key = tl.where(x > -INF, order_key(x, block_ids(block, PER)), 0)
    return key, mass(x, finite_max(row_max), e) + COUNT_ONE


@triton.jit
def find_in_row(row, stage: tl.constexpr, low, count, least_mass, most_mass):
    """A search for :func:`select_kept`, seventeen readings at most; the mass is certain."""
    lower, upper = low, tl.full([], END, tl.int64)
    amount = Amount(low * 0, low * 0)
    step = tl.arange(0, TRIALS)
    while upper - lower > 1:
        trials = trial_keys(lower, upper)
        found = amounts_in_row(row, trials)
        enough = (found.count >= count) | (found.mass >= most_mass) | (trials == lower)
        first = tl.min(tl.where(enough, step, TRIALS), 0)
        lower = tl.max(tl.where(step == first, trials, 0), 0)
        upper = tl.where(first > 0, tl.max(tl.where(step == first - 1, trials, 0), 0), upper)
        amount = Amount(
            tl.max(tl.where(step == first, found.count, 0), 0),
            tl.max(tl.where(step == first, found.mass, 0), 0),
        )
    return certain(lower, amount)


@triton.jit
def cutoff_of(row_max, least):
    """The lowest key with fl(x - max) >= least, by halving the ordered values."""
    low = tl.full([], NO_CUTOFF >> 19, tl.int64)
    high = order_key(row_max, tl.full([], 0, tl.int32)) >> 19
    while low < high:
        middle = low + (high - low) // 2
        likely = key_value(middle << 19) - row_max >= least
        low = tl.where(likely, low, middle + 1)
        high = tl.where(likely, middle, high)
    return low << 19


# A sorted list


@triton.jit
def find_in_sorted(given, stage: tl.constexpr, low, count, least_mass, most_mass):
    """A search for :func:`select_kept`; the prefix may end where the list is not certain."""
    length, held = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    certain_count = tl.full([], 0, tl.int64)
    last, prefix_mass = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for start in range(0, given.n, SORTED_CHUNK):
        i = start + tl.arange(0, SORTED_CHUNK)
        key = tl.load(given.keys + i, mask=i < given.n, other=0)
        taken = key >= given.floor
        q = tl.where(taken, mass(key_value(key), given.row_max, given.exponent), 0)
        through = held + tl.cumsum(q, 0)
        # Tokens before which the need is not met: the prefix is these.
        short = taken & (i < count) & (through - q < most_mass)
        length += tl.sum(short.to(tl.int64), 0)
        prefix_mass += tl.sum(tl.where(short, q, 0), 0)
        ends = tl.where(short, key, NO_TARGET)
        last = tl.where(tl.sum(short.to(tl.int64), 0) > 0, tl.min(ends, 0), last)
        certain_count += tl.sum(taken.to(tl.int64), 0)
        held += tl.sum(q, 0)
    known = ((length == count) | (prefix_mass >= most_mass)) & (least_mass == most_mass)
    # Of a share of an unknown mass nothing is known; else all certain tokens are in the prefix.
    least = tl.where(least_mass == most_mass, certain_count, 0)
    high = tl.where(least_mass == most_mass, given.floor, END)
    # All that min_p leaves are certain: whether others lie above its cutoff makes no difference.
    holds_likely = given.likely.most.count <= least
    high = tl.where(holds_likely, tl.minimum(high, given.likely.low), high)
    found = Prefix(
        tl.where(known, last, 0),
        Amount(
            tl.where(known, length, given.row.most.count),
            tl.where(known, prefix_mass, given.row.most.mass),
        ),
        tl.where(known, last, high),
        Amount(tl.where(known, length, least), tl.where(known, prefix_mass, 0)),
    )
    if low == given.likely.low:
        found = shorter(found, given.likely)
    return found
