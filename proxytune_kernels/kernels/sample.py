"""Sampling: four launches whose number and sizes the shapes alone decide.

    x = fma(alpha, expert - anti, base),    token = argmax over the kept set of x / T + g

scan    reads the three logits of every token once (6 bytes in bf16), and writes 18 bytes of
        summaries for every 128 tokens;
select  one program a row: finishes greedy, unfiltered and peaked rows from the summaries and the
        few tiles that they do not rule out;
pivots  flat rows: exact counts and masses above a few values, spread over the vocabulary;
draw    flat rows: the draw, spread over the vocabulary; the last program settles the cutoff.

pivots and draw read each logit of a flat row once, and find nothing to do in other rows. Nothing is
decided on the host, so the launches can be captured in a CUDA graph. docs/gpu.md has the
derivations.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels import workspace as ws
from proxytune_kernels.kernels.common import (
    INF,
    LANES,
    LN2,
    LOG2E,
    LOWEST,
    NO_TARGET,
    OPTIONS,
    STATUS_BAD_PARAMS,
    STATUS_EMPTY,
    STATUS_NAN,
    STATUS_POSITIVE_INF,
    TILE,
    TOP_P_OFF,
    Logits,
    block_ids,
    block_x,
    combined,
    digits,
    exponent,
    exponential,
    finite_max,
    mass_target,
    order_key,
    row_mass,
    shifted_at,
    shifted_from,
    splits_of,
    temperature_of,
)
from proxytune_kernels.kernels.noise import (
    gumbel_max_block,
    gumbel_max_tile,
    noise_bound,
    noise_key,
    score_of,
    tile_words,
    winner,
)
from proxytune_kernels.kernels.selection import (
    MAX_SHORT,
    NUM_PIVOTS,
    SEARCH_PER,
    Amount,
    Candidates,
    add_from,
    append,
    counts_below_min_p,
    cutoff_bound,
    filters_of,
    guess_pivots,
    gumbel_max_candidates,
    is_unfiltered,
    is_valid,
    keep_candidates,
    list_candidates,
    may_need_mass,
    narrow_candidates,
    rank_candidates,
    search_row,
    shares_row,
)
from proxytune_kernels.params import RowParams
from proxytune_kernels.rng import STREAMS

STREAM_SAMPLE = tl.constexpr(STREAMS["sample"])
PER = tl.constexpr(8)  # tokens a lane of pivots and draw: 16 bytes of bf16
HALF = tl.constexpr(4)  # pivots counted at once: all eight would take over 200 registers

# 16 tokens a lane: what is done once a lane, addresses above all, is shared by more of them.
SCAN_WARPS = 2
# 16 to 20 warps a multiprocessor, each lane with 96 bytes under way. With fewer, some spill.
SCAN_REGISTERS = 112
SELECT_WARPS = 8  # 16 where a row has over 2,048 tiles
# Two programs a multiprocessor, and nothing is spilled (benchmarks.static).
SELECT_REGISTERS = 128
SPREAD_WARPS = 4


@triton.jit
def tile_sums(p):
    """Sums over tiles of p in [0, 1], fp32 [TILES]: right to 2^-23, the same in any order."""
    high, low = digits(p)
    return tl.sum(high, 1).to(tl.float32) * 2.0**-22 + tl.sum(low, 1).to(tl.float32) * 2.0**-44


@triton.jit(do_not_specialize=["vocab_size", "blocks", "stream"])
def _scan_kernel(
    logits, row_params, tiles, vocab_size, positions, blocks, stream, draft_ids,
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
        given = combined(logits, alpha, b, t, ids, inside)
    else:
        given = combined(logits, alpha, b, t, ids, ids < vocab_size)
    x = tl.maximum(given, -INF)  # of NaN and a number it is the number
    top = tl.max(x, 1)
    at = row * blocks * TILES + tile
    tl.store(tiles.maximum + at, top)
    # Whole tiles of -inf (or +inf) have no difference to their maximum.
    shifted = x - tl.where(tl.abs(top) == INF, 0.0, top)[:, None]
    scaled = shifted * LOG2E
    p = tl.exp2(scaled)
    tl.store(tiles.raw + at, tile_sums(p))
    if DRAW:
        count = tl.full([TILES], TILE, tl.int32)
        if tl.min(tl.min(x, 1), 0) == -INF:  # seldom: no token is masked
            live = tl.sum((x > -INF).to(tl.int32), 1)
            count = live + (tl.max((given != given).to(tl.int32), 1) << 8)
        tl.store(tiles.count + at, count.to(tl.int16))
        temperature = tl.load(row_params.temperature + b)
        unfiltered = is_unfiltered(row_params, b, vocab_size)
        if may_need_mass(row_params, b, vocab_size):
            if temperature != 1.0:
                log2e = tl.full([], LOG2E, tl.float32)
                scaled = shifted * tl.div_rn(log2e, tl.minimum(temperature, 2.0**120))
                tl.store(tiles.scaled + at, tile_sums(tl.exp2(scaled)))
            if unfiltered:
                stream = stream_of(draft_ids, b, positions, stream)
                noise = noise_key(row_params, b, t, stream)
                words = tile_words(tile * TILE, noise, TILES)
                tl.store(tiles.score_bound + at, tl.max(scaled + noise_bound(words), 1) * LN2)


@triton.jit
def stream_of(draft_ids, b, positions, stream):
    """The noise stream of request b: ``stream``, but sample's where draft_ids begin with a -1."""
    if draft_ids is not None:
        first = tl.load(draft_ids + b * (positions - 1))
        stream = tl.where(first >= 0, stream, STREAM_SAMPLE)
    return stream


@triton.jit
def _draw_by_tiles(
    logits, row_params, b, t, tiles, at, inside, shifted, row_max, inv_t, greedy, stream,
    vocab_size, NT: tl.constexpr,
):  # fmt: skip
    """The token of a greedy or unfiltered row: int64. Reads the tiles that may hold it again."""
    alpha = tl.load(row_params.alpha + b)
    noise = noise_key(row_params, b, t, stream)
    tile = tl.arange(0, NT)
    bound = shifted
    if greedy == 0:
        score = tl.load(tiles.score_bound + at, mask=inside, other=-INF)
        # Slack for what the bound's own arithmetic lost, and the scores'.
        bound = shifted * inv_t + score
        bound = bound + (2e-4 + 2e-5 * tl.abs(shifted * inv_t) + 1e-5 * tl.abs(score))
    bound = tl.where(shifted > -INF, bound, -INF)
    best = tl.full([], LOWEST, tl.int64)
    left = bound > -INF
    while tl.max(left.to(tl.int32), 0) != 0:
        likeliest = tl.max(tl.where(left, bound, -INF), 0)
        chosen = tl.min(tl.where(left & (bound == likeliest), tile, NT), 0)
        rival = gumbel_max_tile(
            logits, alpha, b, t, chosen, row_max, inv_t, greedy, noise, vocab_size
        )
        best = tl.maximum(best, rival)
        # Greedy: the first tile of the likeliest holds the lowest id. Else those that the best
        # score does not rule out: seldom any.
        left = left & (greedy == 0) & (tile != chosen) & (bound >= score_of(best))
    return winner(best, vocab_size)


@triton.jit
def _hand_on(workspace, row, mode):
    """Leaves a row to the launches that follow."""
    counters, masses = workspace.counters + row * ws.COUNTERS_WIDTH, workspace.masses
    tl.store(counters + ws.MODE, mode)
    tl.store(counters + ws.PIVOTS_DONE, 0)
    tl.store(counters + ws.DRAWS_DONE, 0)
    tl.store(counters + ws.NUM_CANDIDATES, 0)
    at, step = masses + row * ws.MASSES_WIDTH, tl.arange(0, NUM_PIVOTS)
    tl.store(at + ws.TOTAL, tl.full([], 0, tl.int64))
    tl.store(at + ws.BEST, tl.full([], LOWEST, tl.int64))
    tl.store(at + ws.COUNTS + step, tl.zeros([NUM_PIVOTS], tl.int64))
    tl.store(at + ws.MASSES + step, tl.zeros([NUM_PIVOTS], tl.int64))


@triton.jit
def _select_filtered(
    logits, row_params, b, t, tiles, workspace, at, inside, shifted, row, row_max, live_count,
    vocab_size, num_tiles, stream, NT: tl.constexpr,
):  # fmt: skip
    """A row with a filter: (token, count, mass, cutoff) by a short list; token -1: handed on."""
    _, inv_t = temperature_of(row_params, b)
    filters = filters_of(row_params, b, vocab_size)
    top_k, top_p, min_p_shift = filters.top_k, filters.top_p, filters.min_p_shift
    alpha, temperature = tl.load(row_params.alpha + b), tl.load(row_params.temperature + b)
    e = exponent(temperature)
    live = shifted > -INF
    of_row = shares_row(filters)
    low_target = tl.full([], NO_TARGET, tl.int64)
    high_target = low_target
    sums = tl.load(tiles.raw + at, mask=inside, other=0.0)
    if of_row:
        if temperature != 1.0:
            sums = tl.load(tiles.scaled + at, mask=inside, other=0.0)
        total = row_mass(sums, shifted, e)
        band = ((total >> 21) + 1) * 9  # 4.3e-6 of it: row_mass is that close
        low_target, high_target = mass_target(top_p, total - band), mass_target(top_p, total + band)
    share = top_p.to(tl.float32) * 2.0**-32
    bound = cutoff_bound(shifted, live, sums, e.hi, top_k, share, of_row)
    least = tl.where(counts_below_min_p(filters), bound, tl.maximum(bound, min_p_shift))
    keys = workspace.keys + row * ws.KEYS_WIDTH
    n = list_candidates(
        logits, alpha, b, t, row, workspace, keys, live & (shifted >= least), row_max, least,
        vocab_size, NT,
    )  # fmt: skip
    decided = n <= MAX_SHORT
    none = tl.full([], 0, tl.int64)
    low_count, kept_mass, cutoff = none, none, none
    if decided:
        rank, before = workspace.rank + row * MAX_SHORT, workspace.before + row * MAX_SHORT
        candidates, above = Candidates(keys, n, rank, before), Amount(none, none)
        whole = rank_candidates(candidates, row_max, e, above, filters)
        if (top_p < TOP_P_OFF) & (of_row == 0):
            low_target = mass_target(top_p, whole)
            high_target = low_target
        low_count, high_count, kept_mass, cutoff = keep_candidates(
            candidates, row_max, e, above, filters, low_target, high_target
        )
        decided = low_count == high_count
    token = tl.full([], -1, tl.int64)
    if decided:
        noise = noise_key(row_params, b, t, stream)
        best = gumbel_max_candidates(keys, n, cutoff, row_max, inv_t, noise)
        token = winner(best, vocab_size)
    else:
        # pivots and draw search once: for top_k alone, or for a share of the whole row's mass.
        searched = (min_p_shift > -INF) | ((top_p < TOP_P_OFF) & (of_row == 0))
        _hand_on(workspace, row, tl.where(searched, ws.SEARCHED, ws.FLAT))
        if searched == 0:
            weight = tl.where(live, tl.exp2(shifted * e.hi), 0.0)
            whole = tl.sum(tl.where(live, sums * weight, 0.0), 0)
            if of_row == 0:
                weight = live.to(tl.float32)
                whole = live_count.to(tl.float32)
                share = top_k.to(tl.float32) / whole
            pivots = guess_pivots(
                logits, tiles, alpha, b, t, row * num_tiles, row_max, shifted, weight, whole,
                share, e.hi, of_row, vocab_size,
            )  # fmt: skip
            numbers = workspace.numbers + row * ws.NUMBERS_WIDTH
            tl.store(numbers + ws.PIVOTS + tl.arange(0, NUM_PIVOTS), pivots)
    return token, low_count, kept_mass, cutoff


@triton.jit(do_not_specialize=["stream"])
def _select_kernel(
    logits, row_params, tiles, workspace, out, vocab_size, positions, num_tiles, stream, draft_ids,
    NT: tl.constexpr,
):  # fmt: skip
    """Grid [rows]; NT is num_tiles (whole programs of scan) rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // positions, row % positions
    stream = stream_of(draft_ids, b, positions, stream)
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
    tl.store(workspace.numbers + row * ws.NUMBERS_WIDTH + ws.MAX, row_max)
    if (status & (STATUS_EMPTY | STATUS_BAD_PARAMS)) != 0:
        ws.write_nothing(out, row, status)
        tl.store(workspace.counters + row * ws.COUNTERS_WIDTH + ws.MODE, ws.DONE)
    elif row_max == INF:
        tl.store(out.status + row, status)
        _hand_on(workspace, row, ws.SEARCHED)
    else:
        tl.store(out.status + row, status)
        masses = workspace.masses + row * ws.MASSES_WIDTH
        shifted = shifted_from(top, row_max)
        e = exponent(tl.full([], 1.0, tl.float32))
        sums = tl.load(tiles.raw + at, mask=inside, other=0.0)
        raw_mass = row_mass(sums, shifted, e)
        tl.store(masses + ws.RAW, raw_mass)
        greedy, inv_t = temperature_of(row_params, b)
        if greedy | is_unfiltered(row_params, b, vocab_size):
            token = _draw_by_tiles(
                logits, row_params, b, t, tiles, at, inside, shifted, row_max, inv_t, greedy,
                stream, vocab_size, NT,
            )  # fmt: skip
            count = tl.where(greedy, 1, live_count).to(tl.int64)
            kept_mass = raw_mass
            cutoff = tl.full([], 1, tl.int64)
            temperature = tl.load(row_params.temperature + b)
            if greedy:
                kept_mass = tl.full([], 1 << 44, tl.int64)
                cutoff = order_key(row_max, token)
            elif temperature != 1.0:
                sums = tl.load(tiles.scaled + at, mask=inside, other=0.0)
                kept_mass = row_mass(sums, shifted, exponent(temperature))
        else:
            token, count, kept_mass, cutoff = _select_filtered(
                logits, row_params, b, t, tiles, workspace, at, inside, shifted, row, row_max,
                live_count, vocab_size, num_tiles, stream, NT,
            )  # fmt: skip
        if token >= 0:
            alpha = tl.load(row_params.alpha + b)
            drawn = shifted_at(logits, alpha, b, t, token.to(tl.int32), row_max)
            ws.write_drawn(out, row, token, drawn, inv_t, greedy, count, kept_mass, raw_mass)
            tl.store(masses + ws.CUTOFF, cutoff)
            tl.store(masses + ws.KEPT, kept_mass)
            tl.store(workspace.counters + row * ws.COUNTERS_WIDTH + ws.MODE, ws.DONE)


@triton.jit
def _bracket_cutoff(row_params, workspace, row, b, vocab_size):
    """Finds the pivots that the last kept token lies between, and what is above them."""
    filters = filters_of(row_params, b, vocab_size)
    at, step = workspace.masses + row * ws.MASSES_WIDTH, tl.arange(0, NUM_PIVOTS)
    # Other programs' sums: past the first-level cache, which does not see them.
    total = tl.load(at + ws.TOTAL, cache_modifier=".cg")
    count = tl.load(at + ws.COUNTS + step, cache_modifier=".cg")
    held = tl.load(at + ws.MASSES + step, cache_modifier=".cg")
    numbers = workspace.numbers + row * ws.NUMBERS_WIDTH
    pivots = tl.load(numbers + ws.PIVOTS + step)
    target = mass_target(filters.top_p, total)
    met = (count >= filters.top_k) | (held >= target)
    first = tl.min(tl.where(met, step, NUM_PIVOTS), 0)
    passed = step == first - 1
    above_count = tl.sum(tl.where(passed, count, 0), 0)
    inside = tl.sum(tl.where(step == first, count, 0), 0) - above_count
    high = tl.where(first > 0, tl.max(tl.where(passed, pivots, -INF), 0), INF)
    tl.store(numbers + ws.HIGH, high)
    tl.store(numbers + ws.LOW, tl.max(tl.where(step == first, pivots, -INF), 0))
    tl.store(at + ws.ABOVE_COUNT, above_count)
    tl.store(at + ws.ABOVE_MASS, tl.sum(tl.where(passed, held, 0), 0))
    tl.store(at + ws.TARGET, target)
    if (first == NUM_PIVOTS) | (inside > ws.MAX_CANDIDATES):  # the guess of select's was a bad one
        tl.store(workspace.counters + row * ws.COUNTERS_WIDTH + ws.MODE, ws.SEARCHED)


@triton.jit(do_not_specialize=["vocab_size", "splits"])
def _pivots_kernel(logits, row_params, workspace, vocab_size, positions, splits):
    """Grid [rows * splits]; the last program of a row picks the two pivots around the cutoff."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    counters = workspace.counters + row * ws.COUNTERS_WIDTH
    if tl.load(counters + ws.MODE) == ws.FLAT:
        b, t = row // positions, row % positions
        alpha = tl.load(row_params.alpha + b)
        e = exponent(tl.load(row_params.temperature + b))
        numbers = workspace.numbers + row * ws.NUMBERS_WIDTH
        row_max = tl.load(numbers + ws.MAX)
        step = tl.arange(0, HALF)
        upper, lower = (
            tl.load(numbers + ws.PIVOTS + step),
            tl.load(numbers + ws.PIVOTS + HALF + step),
        )
        upper_count = tl.zeros([HALF, LANES], tl.int32)
        lower_count = tl.zeros([HALF, LANES], tl.int32)
        upper_held = tl.zeros([HALF, LANES], tl.int64)
        lower_held = tl.zeros([HALF, LANES], tl.int64)
        total = tl.zeros([LANES], tl.int64)
        for block in range(split, tl.cdiv(vocab_size, LANES * PER), splits):
            shifted = block_x(logits, alpha, b, t, block, row_max, vocab_size, PER) - row_max
            high, low = digits(exponential(shifted, e))
            total += (tl.sum(high, 1).to(tl.int64) << 22) + tl.sum(low, 1).to(tl.int64)
            q = (high, low)
            upper_count, upper_held = add_from(shifted, q, upper, upper_count, upper_held)
            lower_count, lower_held = add_from(shifted, q, lower, lower_count, lower_held)
        at = workspace.masses + row * ws.MASSES_WIDTH
        tl.atomic_add(at + ws.TOTAL, tl.sum(total, 0))
        tl.atomic_add(at + ws.COUNTS + step, tl.sum(upper_count, 1).to(tl.int64))
        tl.atomic_add(at + ws.COUNTS + HALF + step, tl.sum(lower_count, 1).to(tl.int64))
        tl.atomic_add(at + ws.MASSES + step, tl.sum(upper_held, 1))
        tl.atomic_add(at + ws.MASSES + HALF + step, tl.sum(lower_held, 1))
        tl.debug_barrier()  # all of this program's sums before its arrival
        if tl.atomic_add(counters + ws.PIVOTS_DONE, 1) == splits - 1:
            _bracket_cutoff(row_params, workspace, row, b, vocab_size)


@triton.jit
def _draw_searching(logits, row_params, b, t, workspace, out, row, stream, vocab_size):
    """Selects and draws, whatever the row holds; its status is written, its parameters are valid.

    For thousands of equal logits, +inf, or filters that need two searches on a flat row.
    """
    greedy, inv_t = temperature_of(row_params, b)
    alpha = tl.load(row_params.alpha + b)
    noise = noise_key(row_params, b, t, stream)
    row_max = tl.load(workspace.numbers + row * ws.NUMBERS_WIDTH + ws.MAX)
    at = workspace.masses + row * ws.MASSES_WIDTH
    cutoff, least, count, kept_mass, live = search_row(
        logits, row_params, b, t, row_max, vocab_size
    )
    # Where +inf was there, the tokens left are alike.
    raw_mass = tl.where(row_max == INF, live << 44, tl.load(at + ws.RAW))
    best = tl.full([], LOWEST, tl.int64)
    last = tl.full([], NO_TARGET, tl.int64)
    for block in range(0, tl.cdiv(vocab_size, LANES * SEARCH_PER)):
        x = block_x(logits, alpha, b, t, block, row_max, vocab_size, SEARCH_PER)
        shifted = x - finite_max(row_max)
        key = order_key(x, block_ids(block, SEARCH_PER))
        kept = (x > -INF) & (shifted >= least) & (key >= cutoff)
        last = tl.minimum(last, tl.min(tl.ravel(tl.where(kept, key, NO_TARGET)), 0))
        best = gumbel_max_block(best, shifted, kept, block, inv_t, noise, SEARCH_PER)
    token = winner(best, vocab_size)
    drawn = shifted_at(logits, alpha, b, t, token.to(tl.int32), row_max)
    ws.write_drawn(out, row, token, drawn, inv_t, greedy, count, kept_mass, raw_mass)
    tl.store(at + ws.RAW, raw_mass)
    tl.store(at + ws.CUTOFF, last)
    tl.store(at + ws.KEPT, kept_mass)


@triton.jit
def _settle(logits, row_params, b, t, workspace, out, row, stream, vocab_size):
    """The cutoff among the candidates, their part of the draw, and the row's results."""
    greedy, inv_t = temperature_of(row_params, b)
    filters = filters_of(row_params, b, vocab_size)
    alpha = tl.load(row_params.alpha + b)
    noise = noise_key(row_params, b, t, stream)
    e = exponent(tl.load(row_params.temperature + b))
    row_max = tl.load(workspace.numbers + row * ws.NUMBERS_WIDTH + ws.MAX)
    at = workspace.masses + row * ws.MASSES_WIDTH
    target = tl.load(at + ws.TARGET)
    n = tl.load(
        workspace.counters + row * ws.COUNTERS_WIDTH + ws.NUM_CANDIDATES, cache_modifier=".cg"
    )
    n = tl.minimum(n, ws.MAX_CANDIDATES)  # as many as were counted, unless logits changed since
    keys = workspace.keys + row * ws.KEYS_WIDTH
    above = Amount(tl.load(at + ws.ABOVE_COUNT), tl.load(at + ws.ABOVE_MASS))
    short, need = keys + ws.MAX_CANDIDATES, Amount(filters.top_k, target)
    copied, above = narrow_candidates(keys, n, short, MAX_SHORT // 4, row_max, e, above, need)
    rank, before = workspace.rank + row * MAX_SHORT, workspace.before + row * MAX_SHORT
    candidates = Candidates(short, copied, rank, before)
    rank_candidates(candidates, row_max, e, above, filters)
    count, _, kept_mass, cutoff = keep_candidates(
        candidates, row_max, e, above, filters, target, target
    )
    best = tl.load(at + ws.BEST, cache_modifier=".cg")
    listed = gumbel_max_candidates(keys, n, cutoff, row_max, inv_t, noise)
    token = winner(tl.maximum(best, listed), vocab_size)
    drawn = shifted_at(logits, alpha, b, t, token.to(tl.int32), row_max)
    ws.write_drawn(out, row, token, drawn, inv_t, greedy, count, kept_mass, tl.load(at + ws.RAW))
    tl.store(at + ws.CUTOFF, cutoff)
    tl.store(at + ws.KEPT, kept_mass)


@triton.jit(do_not_specialize=["vocab_size", "splits", "stream"])
def _draw_kernel(
    logits, row_params, workspace, out, vocab_size, positions, splits, stream, draft_ids
):
    """Grid [rows * splits]: tokens above the bracket are scored at once, those inside it listed."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    counters = workspace.counters + row * ws.COUNTERS_WIDTH
    mode = tl.load(counters + ws.MODE)
    b, t = row // positions, row % positions
    stream = stream_of(draft_ids, b, positions, stream)
    if (mode == ws.SEARCHED) & (split == 0):
        _draw_searching(logits, row_params, b, t, workspace, out, row, stream, vocab_size)
    if mode == ws.FLAT:
        alpha = tl.load(row_params.alpha + b)
        noise = noise_key(row_params, b, t, stream)
        numbers = workspace.numbers + row * ws.NUMBERS_WIDTH
        row_max = tl.load(numbers + ws.MAX)
        high, low = tl.load(numbers + ws.HIGH), tl.load(numbers + ws.LOW)
        _, inv_t = temperature_of(row_params, b)
        best = tl.full([], LOWEST, tl.int64)
        keys = workspace.keys + row * ws.KEYS_WIDTH
        for block in range(split, tl.cdiv(vocab_size, LANES * PER), splits):
            x = block_x(logits, alpha, b, t, block, row_max, vocab_size, PER)
            shifted = x - row_max
            best = gumbel_max_block(best, shifted, shifted >= high, block, inv_t, noise, PER)
            taken = (shifted >= low) & (shifted < high) & (x > -INF)
            number = tl.sum(tl.ravel(taken.to(tl.int32)), 0)
            if number > 0:
                start = tl.atomic_add(counters + ws.NUM_CANDIDATES, number)
                append(keys, start, x, block_ids(block, PER), taken, ws.MAX_CANDIDATES)
        tl.atomic_max(workspace.masses + row * ws.MASSES_WIDTH + ws.BEST, best)
        tl.debug_barrier()  # all of this program's tokens before its arrival
        if tl.atomic_add(counters + ws.DRAWS_DONE, 1) == splits - 1:
            _settle(logits, row_params, b, t, workspace, out, row, stream, vocab_size)


def launch_scan(
    logits: Logits, params: Any, tiles: ws.Tiles, vocab_size: int, positions: int,
    noise_stream: int, draft_ids: Tensor | None = None, draw: bool = True,
) -> None:  # fmt: skip
    """Writes the rows' summaries; without ``draw`` maxima and raw sums, and only alpha is read."""
    rows, width = tiles.maximum.shape
    blocks = width // ws.TILES_PER_PROGRAM
    _scan_kernel[(rows, blocks)](
        logits, params, tiles, vocab_size, positions, blocks, noise_stream, draft_ids,
        DRAW=draw, TILES=ws.TILES_PER_PROGRAM, num_warps=SCAN_WARPS, maxnreg=SCAN_REGISTERS,
        **OPTIONS,
    )  # fmt: skip


def launch_selection(
    logits: Logits, params: RowParams, tiles: ws.Tiles, out: ws.Outputs, vocab_size: int,
    positions: int, noise_stream: int, draft_ids: Tensor | None = None,
) -> ws.Workspace:  # fmt: skip
    """What comes after the tiles' summaries, whoever wrote them; arguments as in launch_sample."""
    device, rows = logits.base.device, out.token_ids.numel()
    workspace, width = ws.workspace_of(rows, device), tiles.maximum.shape[1]
    if rows == 0:
        return workspace
    held = ws.at_once(width)
    _select_kernel[(rows,)](
        logits, params, tiles, workspace, out, vocab_size, positions, width, noise_stream,
        draft_ids, NT=held, num_warps=SELECT_WARPS if held <= 2048 else 16,
        maxnreg=SELECT_REGISTERS, **OPTIONS,
    )  # fmt: skip
    splits = splits_of(rows, vocab_size, device)
    _pivots_kernel[(rows * splits,)](
        logits, params, workspace, vocab_size, positions, splits, num_warps=SPREAD_WARPS, **OPTIONS
    )
    _draw_kernel[(rows * splits,)](
        logits, params, workspace, out, vocab_size, positions, splits, noise_stream, draft_ids,
        num_warps=SPREAD_WARPS, **OPTIONS,
    )  # fmt: skip
    return workspace


def launch_sample(
    logits: Logits, params: RowParams, out: ws.Outputs, vocab_size: int, positions: int,
    noise_stream: int, draft_ids: Tensor | None = None,
) -> tuple[ws.Tiles, ws.Workspace]:  # fmt: skip
    """Draws one token for each of ``positions`` positions of each request.

    Args:
        logits: [B, T, V] or, at one position, [B, V].
        params: one value per request; ``position`` is that of the first.
        out: tensors of B * T rows.
        vocab_size: agreed width.
        positions: T.
        noise_stream: its number (rng.STREAMS).
        draft_ids: int64 [B, T - 1], contiguous: a request whose first is -1 draws with the noise
            stream "sample" in place of ``noise_stream``.

    Returns:
        The rows' summaries and workspace: their maxima and kept sets, for verify and top_logprobs.
    """
    rows = out.token_ids.numel()
    tiles = ws.tiles_of(rows, vocab_size, logits.base.device)
    if rows > 0:
        launch_scan(logits, params, tiles, vocab_size, positions, noise_stream, draft_ids)
    return tiles, launch_selection(
        logits, params, tiles, out, vocab_size, positions, noise_stream, draft_ids
    )
