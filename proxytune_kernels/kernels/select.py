"""One program a row: what the summaries decide, and a look at the tiles that they do not rule out.

Greedy and unfiltered rows read one tile again, where their token lies. Filtered rows bound the
cutoff from below, list the tokens above the bound, and finish among them. Rows whose tokens are too
many for that (flat ones) are handed to the launches that follow, which spread them over the GPU.
docs/gpu.md derives the bounds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels._bounds import cutoff_bound, guess_pivots
from proxytune_kernels.kernels._common import (
    ALL,
    INF,
    ORDER_HF,
    ORDER_JOINT,
    STATUS_BAD_PARAMS,
    STATUS_EMPTY,
    STATUS_NAN,
    STATUS_POSITIVE_INF,
    TILE,
    TOP_P_OFF,
    cleaned,
    combined,
    exponent,
    mass_target,
    order_key,
)
from proxytune_kernels.kernels._list import append, keep_listed, race_listed, rank_listed
from proxytune_kernels.kernels._noise import score_of, winner
from proxytune_kernels.kernels._row import (
    ALONE,
    BEST,
    COUNTS,
    CUT,
    DONE,
    FINISHED,
    FLAT,
    KEPT,
    KEYS_WIDTH,
    LISTED,
    LOWEST,
    MASSES,
    MASSES_WIDTH,
    MAX,
    MAX_TILES,
    MODE,
    NARROWED,
    NUM_PIVOTS,
    PIVOTS,
    RAW,
    SHORT,
    TOTAL,
    difference_at,
    filters_of,
    finite_max,
    is_unfiltered,
    is_valid,
    noise_key,
    race_tile,
    row_mass,
    temperature_of,
    write_drawn,
    write_nothing,
)

GATHERED = tl.constexpr(16)  # tiles read at once


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
