"""sample."""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels.common import (
    ALL,
    FLT_MIN,
    INF,
    LANES,
    LN2,
    LOG2E,
    LOWEST,
    NO_TARGET,
    OPTIONS,
    ORDER_HF,
    ORDER_JOINT,
    STATUS_BAD_PARAMS,
    STATUS_EMPTY,
    STATUS_NAN,
    STATUS_POSITIVE_INF,
    TILE,
    TOP_P_OFF,
    Logits,
    Strides,
    block_ids,
    block_x,
    combined,
    difference_at,
    digits,
    exponent,
    exponential,
    finite_max,
    is_valid,
    mass_target,
    noise_key,
    order_key,
    row_mass,
    splits_of,
    temperature_of,
)
from proxytune_kernels.kernels.noise import (
    noise_bound,
    race_block,
    race_tile,
    score_of,
    tile_words,
    winner,
)
from proxytune_kernels.kernels.selection import (
    NUM_PIVOTS,
    SEARCH_PER,
    SHORT,
    append,
    cutoff_bound,
    filters_of,
    guess_pivots,
    is_unfiltered,
    keep_listed,
    list_tokens,
    race_listed,
    rank_listed,
    search_row,
    shorten,
)
from proxytune_kernels.kernels.workspace import (
    ABOVE_COUNT,
    ABOVE_MASS,
    ALONE,
    BEST,
    COUNTS,
    CUT,
    DONE,
    FINISHED,
    FLAT,
    HIGH,
    KEPT,
    KEYS_WIDTH,
    LIST,
    LISTED,
    LOW,
    MASSES,
    MASSES_WIDTH,
    MAX,
    MODE,
    NARROWED,
    PIVOTS,
    RAW,
    TARGET,
    TILES_PER_PROGRAM,
    TOTAL,
    Outputs,
    State,
    Tiles,
    at_once,
    state_of,
    tiles_of,
    write_drawn,
    write_nothing,
)
from proxytune_kernels.params import RowParams

# 16 tokens a lane: what is done once a lane, addresses above all, is shared by more of them.
SCAN_WARPS = 2
# 16 to 20 warps a multiprocessor, each lane with 96 bytes under way. With fewer, some spill.
SCAN_REGISTERS = 112


@triton.jit
def tile_sums(p):
    """Sums over tiles of p in [0, 1], fp32 [TILES]: right to 2^-23, the same in any order."""
    high, low = digits(p)
    return tl.sum(high, 1).to(tl.float32) * 2.0**-22 + tl.sum(low, 1).to(tl.float32) * 2.0**-44


@triton.jit(do_not_specialize=["vocab_size", "blocks", "stream"])
def scan_kernel(
    logits, strides, row_params, tiles, vocab_size, positions, blocks, stream,
    DRAW: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid [rows, blocks]; DRAW is off for score, which needs maxima and masses alone."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row // positions, row % positions
    alpha = tl.load(row_params.alpha + b)
    tile = block * TILES + tl.arange(0, TILES)
    ids = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    if (block + 1) * TILES * TILE <= vocab_size:  # no mask: loads stay wide whatever the vocabulary
        inside = tl.full([TILES, TILE], True, tl.int1)
        given = combined(logits, strides, alpha, b, t, ids, inside)
    else:
        given = combined(logits, strides, alpha, b, t, ids, ids < vocab_size)
    x = tl.maximum(given, -INF)  # of NaN and a number it is the number
    top = tl.max(x, 1)
    at = row * blocks * TILES + tile
    tl.store(tiles.maximum + at, top)
    # Whole tiles of -inf (or +inf) have no difference to their maximum.
    d = x - tl.where(tl.abs(top) == INF, 0.0, top)[:, None]
    scaled = d * LOG2E
    p = tl.exp2(scaled)
    tl.store(tiles.raw + at, tile_sums(p))
    if DRAW:
        count = tl.full([TILES], TILE, tl.int32)
        if tl.min(tl.min(x, 1), 0) == -INF:  # seldom: no token is masked
            live = tl.sum((x > -INF).to(tl.int32), 1)
            count = live + (tl.max((given != given).to(tl.int32), 1) << 8)
        tl.store(tiles.count + at, count.to(tl.int16))
        temperature = tl.load(row_params.temperature + b)
        top_k, top_p = tl.load(row_params.top_k + b), tl.load(row_params.top_p + b)
        min_p, order = tl.load(row_params.min_p + b), tl.load(row_params.filter_order + b)
        top_k = tl.where((top_k > 0) & (top_k < vocab_size), top_k, ALL)
        if (temperature >= FLT_MIN) & ((top_k == ALL) | (order == ORDER_JOINT)):
            if temperature != 1.0:
                log2e = tl.full([], LOG2E, tl.float32)
                scaled = d * tl.div_rn(log2e, tl.minimum(temperature, 2.0**120))
                tl.store(tiles.scaled + at, tile_sums(tl.exp2(scaled)))
            if is_unfiltered(0, top_k, top_p, min_p):
                seed, position = noise_key(row_params, b, t)
                words = tile_words(tile * TILE, seed, position, stream, TILES)
                tl.store(tiles.race + at, tl.max(scaled + noise_bound(words), 1) * LN2)


@triton.jit
def _race(
    logits, strides, row_params, tiles, at, inside, d, b, t, row_max, inv_t, greedy, stream,
    vocab_size, NT: tl.constexpr,
):  # fmt: skip
    """The token of a greedy or unfiltered row: int64. Reads the tiles that may hold it again."""
    alpha = tl.load(row_params.alpha + b)
    seed, position = noise_key(row_params, b, t)
    tile = tl.arange(0, NT)
    bound = d
    if greedy == 0:
        race = tl.load(tiles.race + at, mask=inside, other=-INF)
        # Slack for what the bound's own arithmetic lost, and the scores'.
        bound = d * inv_t + race
        bound = bound + (2e-4 + 2e-5 * tl.abs(d * inv_t) + 1e-5 * tl.abs(race))
    bound = tl.where(d > -INF, bound, -INF)
    best = tl.full([], LOWEST, tl.int64)
    left = bound > -INF
    while tl.max(left.to(tl.int32), 0) != 0:
        likeliest = tl.max(tl.where(left, bound, -INF), 0)
        chosen = tl.min(tl.where(left & (bound == likeliest), tile, NT), 0)
        rival = race_tile(
            logits, strides, alpha, b, t, chosen, row_max, inv_t, greedy, seed, position, stream,
            vocab_size,
        )  # fmt: skip
        best = tl.maximum(best, rival)
        # Greedy: the first tile of the likeliest holds the lowest id. Else those that the best
        # score does not rule out: seldom any.
        left = left & (greedy == 0) & (tile != chosen) & (bound >= score_of(best))
    return winner(best)


@triton.jit
def _hand_on(state, row, mode):
    """Leaves a row to the launches that follow."""
    tl.store(state.counters + row * 4 + MODE, mode)
    tl.store(state.counters + row * 4 + NARROWED, 0)
    tl.store(state.counters + row * 4 + FINISHED, 0)
    tl.store(state.counters + row * 4 + LISTED, 0)
    at, step = state.masses + row * MASSES_WIDTH, tl.arange(0, NUM_PIVOTS)
    tl.store(at + TOTAL, tl.full([], 0, tl.int64))
    tl.store(at + BEST, tl.full([], LOWEST, tl.int64))
    tl.store(at + COUNTS + step, tl.zeros([NUM_PIVOTS], tl.int64))
    tl.store(at + MASSES + step, tl.zeros([NUM_PIVOTS], tl.int64))


@triton.jit
def _select_filtered(
    logits, strides, row_params, tiles, state, at, inside, d, row, b, t, row_max, live_count,
    vocab_size, num_tiles, stream, NT: tl.constexpr,
):  # fmt: skip
    """A row with a filter: (token, count, mass, cut) by a short list; token -1: handed on."""
    _, inv_t = temperature_of(row_params, b)
    top_k, top_p, shift, order = filters_of(row_params, b, vocab_size)
    alpha, temperature = tl.load(row_params.alpha + b), tl.load(row_params.temperature + b)
    hi, lo, floor = exponent(temperature)
    live = d > -INF
    # top_p is a share of the whole row's mass, unless top_k or min_p come before it.
    of_row = (order == ORDER_JOINT) | ((top_k == ALL) & ((order == ORDER_HF) | (shift == -INF)))
    of_row = of_row & (top_p < TOP_P_OFF)
    low_target = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    high_target = low_target
    sums = tl.load(tiles.raw + at, mask=inside, other=0.0)
    if of_row:
        if temperature != 1.0:
            sums = tl.load(tiles.scaled + at, mask=inside, other=0.0)
        total = row_mass(sums, d, hi, lo, floor)
        band = ((total >> 21) + 1) * 9  # 4.3e-6 of it: row_mass is that close
        low_target, high_target = mass_target(top_p, total - band), mass_target(top_p, total + band)
    share = top_p.to(tl.float32) * 2.0**-32
    bound = cutoff_bound(d, live, sums, hi, top_k, share, of_row)
    # All below min_p's threshold may go, unless top_p is a share of what has it.
    keeps_all = (order == ORDER_HF) & (top_k != ALL) & (top_p < TOP_P_OFF)
    least = tl.where(keeps_all, bound, tl.maximum(bound, shift))
    keys = state.keys + row * KEYS_WIDTH
    n = list_tokens(
        logits, strides, state, keys, alpha, b, t, row, live & (d >= least), row_max, least,
        vocab_size, NT,
    )  # fmt: skip
    decided = n <= SHORT
    none = tl.full([], 0, tl.int64)
    low_count, kept_mass, cut = none, none, none
    if decided:
        rank, before = state.rank + row * SHORT, state.before + row * SHORT
        whole = rank_listed(
            keys, rank, before, n, row_max, hi, lo, floor, none, none, top_k, shift, order
        )
        if (top_p < TOP_P_OFF) & (of_row == 0):
            low_target = mass_target(top_p, whole)
            high_target = low_target
        low_count, high_count, kept_mass, cut = keep_listed(
            keys, rank, before, n, row_max, hi, lo, floor, none, none, top_k, shift, low_target,
            high_target,
        )  # fmt: skip
        decided = low_count == high_count
    token = tl.full([], -1, tl.int64)
    if decided:
        seed, position = noise_key(row_params, b, t)
        token = winner(race_listed(keys, n, cut, row_max, inv_t, seed, position, stream))
    else:
        # narrow and finish search once: for top_k alone, or for a share of the whole row's mass.
        alone = (shift > -INF) | ((top_p < TOP_P_OFF) & (of_row == 0))
        _hand_on(state, row, tl.where(alone, ALONE, FLAT))
        if alone == 0:
            weight = tl.where(live, tl.exp2(d * hi), 0.0)
            whole = tl.sum(tl.where(live, sums * weight, 0.0), 0)
            if of_row == 0:
                weight = live.to(tl.float32)
                whole = live_count.to(tl.float32)
                share = top_k.to(tl.float32) / whole
            pivots = guess_pivots(
                logits, strides, tiles, alpha, b, t, row * num_tiles, row_max, d, weight, whole,
                share, hi, of_row, vocab_size,
            )  # fmt: skip
            tl.store(state.numbers + row * 16 + PIVOTS + tl.arange(0, NUM_PIVOTS), pivots)
    return token, low_count, kept_mass, cut


@triton.jit(do_not_specialize=["stream"])
def _select_kernel(
    logits, strides, row_params, tiles, state, out, vocab_size, positions, num_tiles, stream,
    NT: tl.constexpr,
):  # fmt: skip
    """Grid [rows]; NT is num_tiles (whole programs of scan) rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // positions, row % positions
    valid = is_valid(row_params, b, t)
    tile = tl.arange(0, NT)
    inside, at = tile < num_tiles, row * num_tiles + tile
    top = tl.load(tiles.maximum + at, mask=inside, other=-INF)
    counts = tl.load(tiles.count + at, mask=inside, other=0).to(tl.int32)
    row_max = tl.max(top, 0)
    live_count = tl.sum(counts & 255, 0)
    status = tl.where(tl.max(counts, 0) > 255, STATUS_NAN, 0)
    status = tl.where(row_max == INF, status | STATUS_POSITIVE_INF, status)
    status = tl.where(row_max == -INF, status | STATUS_EMPTY, status)
    status = tl.where(valid, status, STATUS_BAD_PARAMS)
    tl.store(state.numbers + row * 16 + MAX, row_max)
    if (status & (STATUS_EMPTY | STATUS_BAD_PARAMS)) != 0:
        write_nothing(out, row, status)
        tl.store(state.counters + row * 4 + MODE, DONE)
    elif row_max == INF:
        tl.store(out.status + row, status)
        _hand_on(state, row, ALONE)
    else:
        tl.store(out.status + row, status)
        d = top - row_max
        hi, lo, floor = exponent(tl.full([], 1.0, tl.float32))
        sums = tl.load(tiles.raw + at, mask=inside, other=0.0)
        raw_mass = row_mass(sums, d, hi, lo, floor)
        tl.store(state.masses + row * MASSES_WIDTH + RAW, raw_mass)
        greedy, inv_t = temperature_of(row_params, b)
        top_k = tl.load(row_params.top_k + b)
        top_k = tl.where((top_k > 0) & (top_k < vocab_size), top_k, ALL)
        top_p, min_p = tl.load(row_params.top_p + b), tl.load(row_params.min_p + b)
        unfiltered = is_unfiltered(greedy, top_k, top_p, min_p)
        if greedy | unfiltered:
            token = _race(
                logits, strides, row_params, tiles, at, inside, d, b, t, row_max, inv_t, greedy,
                stream, vocab_size, NT,
            )  # fmt: skip
            count = tl.where(greedy, 1, live_count).to(tl.int64)
            kept_mass = raw_mass
            cut = tl.full([], 1, tl.int64)
            temperature = tl.load(row_params.temperature + b)
            if greedy:
                kept_mass = tl.full([], 1 << 44, tl.int64)
                cut = order_key(row_max, token)
            elif temperature != 1.0:
                hi, lo, floor = exponent(temperature)
                sums = tl.load(tiles.scaled + at, mask=inside, other=0.0)
                kept_mass = row_mass(sums, d, hi, lo, floor)
        else:
            token, count, kept_mass, cut = _select_filtered(
                logits, strides, row_params, tiles, state, at, inside, d, row, b, t, row_max,
                live_count, vocab_size, num_tiles, stream, NT,
            )  # fmt: skip
        if token >= 0:
            alpha = tl.load(row_params.alpha + b)
            drawn = difference_at(logits, strides, alpha, b, t, token.to(tl.int32), row_max)
            write_drawn(out, row, token, drawn, inv_t, greedy, count, kept_mass, raw_mass)
            tl.store(state.masses + row * MASSES_WIDTH + CUT, cut)
            tl.store(state.masses + row * MASSES_WIDTH + KEPT, kept_mass)
            tl.store(state.counters + row * 4 + MODE, DONE)


PER = tl.constexpr(8)  # tokens a lane: 16 bytes of bf16
HALF = tl.constexpr(4)


@triton.jit
def _no_counts():
    return tl.zeros([HALF, LANES], tl.int32)


@triton.jit
def _no_masses():
    return tl.zeros([HALF, LANES], tl.int64)


@triton.jit
def _add_above(d, high, low, pivots, count, held):
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
            upper_count, upper_held = _add_above(d, high, low, upper, upper_count, upper_held)
            lower_count, lower_held = _add_above(d, high, low, lower, lower_count, lower_held)
        at = state.masses + row * MASSES_WIDTH
        tl.atomic_add(at + TOTAL, tl.sum(total, 0))
        tl.atomic_add(at + COUNTS + step, tl.sum(upper_count, 1).to(tl.int64))
        tl.atomic_add(at + COUNTS + HALF + step, tl.sum(lower_count, 1).to(tl.int64))
        tl.atomic_add(at + MASSES + step, tl.sum(upper_held, 1))
        tl.atomic_add(at + MASSES + HALF + step, tl.sum(lower_held, 1))
        tl.debug_barrier()  # all of this program's sums before its arrival
        if tl.atomic_add(state.counters + row * 4 + NARROWED, 1) == splits - 1:
            _bracket(row_params, state, row, b, vocab_size)


@triton.jit
def do_alone(logits, strides, row_params, state, out, row, b, t, stream, vocab_size):
    """Selects and draws; the row has a token and valid parameters, its status is written."""
    greedy, inv_t = temperature_of(row_params, b)
    alpha = tl.load(row_params.alpha + b)
    seed, position = noise_key(row_params, b, t)
    row_max = tl.load(state.numbers + row * 16 + MAX)
    at = state.masses + row * MASSES_WIDTH
    cut, least, count, kept_mass, live = search_row(
        logits, strides, row_params, b, t, row_max, vocab_size
    )
    # Where +inf was there, the tokens left are alike.
    raw_mass = tl.where(row_max == INF, live << 44, tl.load(at + RAW))
    best = tl.full([], LOWEST, tl.int64)
    last = tl.full([], NO_TARGET, tl.int64)
    for block in range(0, tl.cdiv(vocab_size, LANES * SEARCH_PER)):
        x = block_x(logits, strides, alpha, b, t, block, row_max, vocab_size, SEARCH_PER)
        d = x - finite_max(row_max)
        key = order_key(x, block_ids(block, SEARCH_PER))
        kept = (x > -INF) & (d >= least) & (key >= cut)
        last = tl.minimum(last, tl.min(tl.ravel(tl.where(kept, key, NO_TARGET)), 0))
        best = race_block(best, d, kept, block, inv_t, seed, position, stream, SEARCH_PER)
    token = winner(best)
    d = difference_at(logits, strides, alpha, b, t, token.to(tl.int32), row_max)
    write_drawn(out, row, token, d, inv_t, greedy, count, kept_mass, raw_mass)
    tl.store(at + RAW, raw_mass)
    tl.store(at + CUT, last)
    tl.store(at + KEPT, kept_mass)


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


SELECT_WARPS = 8  # 16 where a row has over 2,048 tiles
SPREAD_WARPS = 4


def launch_sample(
    logits: Logits, strides: Strides, params: RowParams, out: Outputs, vocab_size: int,
    positions: int, stream: int,
) -> tuple[Tiles, State]:  # fmt: skip
    """Draws one token for each of ``positions`` positions of each request.

    Args:
        logits, strides: [B, T, V] or, at one position, [B, V].
        params: one value per request; ``position`` is that of the first.
        out: tensors of B * T rows.
        vocab_size: agreed width.
        positions: T.
        stream: number of the noise stream (rng.STREAMS).

    Returns:
        The rows' summaries and state: their maxima and kept sets, for verify and top_logprobs.
    """
    device, rows = logits.base.device, out.token_ids.numel()
    tiles = tiles_of(rows, vocab_size, device)
    if rows > 0:
        blocks = tiles.maximum.shape[1] // TILES_PER_PROGRAM
        scan_kernel[(rows, blocks)](
            logits, strides, params, tiles, vocab_size, positions, blocks, stream, DRAW=True,
            TILES=TILES_PER_PROGRAM, num_warps=SCAN_WARPS, maxnreg=SCAN_REGISTERS, **OPTIONS,
        )  # fmt: skip
    return tiles, launch_selection(
        logits, strides, params, tiles, out, vocab_size, positions, stream
    )


def launch_selection(
    logits: Logits, strides: Strides, params: RowParams, tiles: Tiles, out: Outputs,
    vocab_size: int, positions: int, stream: int,
) -> State:  # fmt: skip
    """What comes after the tiles' summaries, whoever wrote them; arguments as in launch_sample."""
    device, rows = logits.base.device, out.token_ids.numel()
    state, width = state_of(rows, device), tiles.maximum.shape[1]
    if rows == 0:
        return state
    tiles_at_once = at_once(width)
    # 128 registers: two programs a multiprocessor, and nothing is spilled (benchmarks.static).
    _select_kernel[(rows,)](
        logits, strides, params, tiles, state, out, vocab_size, positions, width, stream,
        NT=tiles_at_once, num_warps=SELECT_WARPS if tiles_at_once <= 2048 else 16, maxnreg=128,
        **OPTIONS,
    )  # fmt: skip
    splits = splits_of(rows, vocab_size, device)
    _narrow_kernel[(rows * splits,)](
        logits, strides, params, state, vocab_size, positions, splits,
        num_warps=SPREAD_WARPS, **OPTIONS,
    )  # fmt: skip
    _finish_kernel[(rows * splits,)](
        logits, strides, params, state, out, vocab_size, positions, splits, stream,
        num_warps=SPREAD_WARPS, **OPTIONS,
    )  # fmt: skip
    return state
