"""Sampling: four launches whose number and sizes the shapes alone decide.

    x = fma(alpha, expert - anti, base),    token = argmax over the kept set of x / T + g

scan    reads the three logits of every token once (6 bytes in bf16), and writes 18 bytes of
        summaries for every 128 tokens;
select  one program a row: finishes greedy, unfiltered and peaked rows from the summaries and the
        few tiles that they do not rule out;
pivots  rows of many tokens: exact counts and masses from 32 keys up, spread over the vocabulary;
draw    such rows: the draw, spread over the vocabulary; the last program finds the cutoff.

pivots and draw read each logit of such a row once, and find nothing to do in others. Nothing is
decided on the host, so the launches can be captured in a CUDA graph. docs/gpu.md has the
derivations.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

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
    NO_CUTOFF,
    OPTIONS,
    STATUS_BAD_PARAMS,
    STATUS_EMPTY,
    STATUS_NAN,
    STATUS_POSITIVE_INF,
    TILE,
    TOP_K_OFF,
    Logits,
    block_ids,
    block_x,
    combined,
    digits,
    exponent,
    finite_max,
    key_value,
    mass_target,
    order_key,
    row_mass,
    shifted_at,
    shifted_from,
    splits_of,
    temperature_of,
)
from proxytune_kernels.kernels.launches import launch
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
    COUNT_SHIFT,
    END,
    MASS_BITS,
    MAX_SHORT,
    NUM_PIVOTS,
    SEARCH_PER,
    Amount,
    List,
    Pivots,
    Prefix,
    Row,
    add_from,
    amount_from,
    amount_of_list,
    append,
    block_keys,
    certain,
    choose_pivots,
    counts_below_min_p,
    cutoff_bound,
    cutoff_of,
    filters_of,
    find_in_list,
    find_in_pivots,
    find_in_row,
    gumbel_max_candidates,
    is_unfiltered,
    is_valid,
    list_tiles,
    may_need_mass,
    select_kept,
    shares_row,
    two_stages,
)
from proxytune_kernels.params import RowParams
from proxytune_kernels.rng import STREAMS

STREAM_SAMPLE = tl.constexpr(STREAMS["sample"])
PER = tl.constexpr(8)  # tokens a lane of draw: 16 bytes of bf16
PIVOTS_PER = tl.constexpr(2)  # of pivots, whose sums take 64 registers

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


@triton.jit(
    do_not_specialize=["vocab_size", "blocks", "stream"],
    do_not_specialize_on_alignment=["positions"],
)
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
def _hand_on(logits, row_params, b, t, workspace, row, row_max, filters, bottom, vocab_size):
    """Leaves a row to the launches that follow: no token below ``bottom`` is kept, or counts."""
    counters = workspace.counters + row * ws.COUNTERS_WIDTH
    tl.store(counters + ws.MODE, ws.SPREAD)
    tl.store(counters + ws.DRAWS_DONE, 0)
    tl.store(counters + ws.NUM_CANDIDATES, 0)
    best = tl.full([], LOWEST, tl.int64)
    tl.store(workspace.words + row * ws.WORDS_WIDTH + ws.BEST, best)
    likely = tl.maximum(bottom, cutoff_of(finite_max(row_max), filters.min_p_shift))
    alpha = tl.load(row_params.alpha + b)
    keys, _short = ws.list_of(workspace, row, vocab_size)
    pivots = choose_pivots(logits, alpha, b, t, row_max, bottom, likely, keys, vocab_size)
    at, step = ws.pivots_of(workspace, row), tl.arange(0, NUM_PIVOTS)
    tl.store(at + step, pivots)
    tl.store(at + NUM_PIVOTS + step, pivots * 0)
    tl.store(at + 2 * NUM_PIVOTS + step, pivots * 0)


@triton.jit
def _list_candidates(
    logits, alpha, b, t, row, workspace, keys, shifted, sums, e, row_max, filters, of_row,
    most_target, vocab_size, NT: tl.constexpr,
):  # fmt: skip
    """Lists the tokens that may be kept: (their number, whether all are listed, the bound).

    First those above a bound that a few tiles suggest: where likely tokens lie together, they are
    enough. Else those above a bound that holds for sure.
    """
    live = shifted > -INF
    share = filters.top_p.to(tl.float32) * 2.0**-32
    none = tl.full([], 0, tl.int64)
    n = tl.full([], 0, tl.int32)
    # A part of them is no use where there is no room for all that top_k asks for.
    many = (filters.top_k != TOP_K_OFF) & (filters.top_k > MAX_SHORT) & (of_row == 0)
    attempt = tl.where(many, 1, 0)
    least = tl.full([], -INF, tl.float32)
    listed = tl.full([], False, tl.int1)
    while (attempt < 2) & (listed == 0):
        certainly = attempt == 1
        need_count = tl.where(certainly, filters.top_k, (filters.top_k + 3) // 4)
        need_share = tl.where(certainly, share, share + 0.3 * (1.0 - share))
        bound = cutoff_bound(
            shifted, live, sums, e.hi, need_count, need_share, of_row, certainly
        )  # fmt: skip
        least = tl.where(counts_below_min_p(filters), bound, tl.maximum(bound, filters.min_p_shift))
        n = list_tiles(
            logits, alpha, b, t, row, workspace, keys, live & (shifted >= least), row_max, least,
            none, vocab_size, NT,
        )  # fmt: skip
        listed = n <= MAX_SHORT
        if listed & (certainly == 0):
            listed = (n >= filters.top_k) | (bound == -INF) | (least > bound)
            if of_row:
                listed = listed | (amount_of_list(keys, n, none, row_max, e).mass >= most_target)
        attempt += 1
    return n, listed, least


@triton.jit
def _select_filtered(
    logits, row_params, b, t, tiles, workspace, at, inside, shifted, row, row_max, vocab_size,
    stream, NT: tl.constexpr,
):  # fmt: skip
    """A row with a filter: (token, count, mass, cutoff) by a short list; token -1: handed on."""
    _greedy, inv_t = temperature_of(row_params, b)
    filters = filters_of(row_params, b, vocab_size)
    alpha, temperature = tl.load(row_params.alpha + b), tl.load(row_params.temperature + b)
    e = exponent(temperature)
    of_row = shares_row(filters)
    none = tl.full([], 0, tl.int64)
    total, band = none, none
    sums = tl.load(tiles.raw + at, mask=inside, other=0.0)
    if of_row:
        if temperature != 1.0:
            sums = tl.load(tiles.scaled + at, mask=inside, other=0.0)
        total = row_mass(sums, shifted, e)
        band = ((total >> 21) + 1) * 9  # 4.3e-6 of it: row_mass is that close
    bottom = tl.full([], NO_CUTOFF, tl.int64)
    # Their number is not asked for: there is a filter.
    all_tokens = Prefix(bottom, Amount(none, total + band), bottom, Amount(none, total - band))
    keys, short = ws.list_of(workspace, row, vocab_size)
    n, listed, least = _list_candidates(
        logits, alpha, b, t, row, workspace, keys, shifted, sums, e, row_max, filters, of_row,
        mass_target(filters.top_p, total + band), vocab_size, NT,
    )  # fmt: skip
    kept = all_tokens
    if listed:
        likely = all_tokens
        if filters.min_p_shift > -INF:
            cutoff = cutoff_of(row_max, filters.min_p_shift)
            likely = certain(cutoff, amount_of_list(keys, n, cutoff, row_max, e))
        nothing = Amount(none, none)
        anywhere = Prefix(bottom, nothing, none + END, nothing)
        candidates = List(keys, n, short, row_max, e, anywhere, anywhere)
        kept, _first = select_kept(find_in_list, candidates, filters, all_tokens, likely)
        listed = kept.low == kept.high
    token = tl.full([], -1, tl.int64)
    if listed:
        noise = noise_key(row_params, b, t, stream)
        best = gumbel_max_candidates(keys, n, kept.low, row_max, inv_t, noise)
        token = winner(best, vocab_size)
    else:
        if of_row == 0:
            bottom = cutoff_of(row_max, least)
        _hand_on(logits, row_params, b, t, workspace, row, row_max, filters, bottom, vocab_size)
    return token, kept.most.count, kept.most.mass, kept.low


@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=["positions"])
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
    tl.store(workspace.maximum + row, row_max)
    if (status & (STATUS_EMPTY | STATUS_BAD_PARAMS)) != 0:
        ws.write_nothing(out, row, status)
        tl.store(workspace.counters + row * ws.COUNTERS_WIDTH + ws.MODE, ws.DONE)
    elif row_max == INF:
        tl.store(out.status + row, status)
        filters = filters_of(row_params, b, vocab_size)
        bottom = tl.full([], NO_CUTOFF, tl.int64)
        _hand_on(logits, row_params, b, t, workspace, row, row_max, filters, bottom, vocab_size)
    else:
        tl.store(out.status + row, status)
        masses = workspace.words + row * ws.WORDS_WIDTH
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
                vocab_size, stream, NT,
            )  # fmt: skip
        if token >= 0:
            alpha = tl.load(row_params.alpha + b)
            drawn = shifted_at(logits, alpha, b, t, token.to(tl.int32), row_max)
            ws.write_drawn(out, row, token, drawn, inv_t, greedy, count, kept_mass, raw_mass)
            tl.store(masses + ws.CUTOFF, cutoff)
            tl.store(masses + ws.KEPT, kept_mass)
            tl.store(workspace.counters + row * ws.COUNTERS_WIDTH + ws.MODE, ws.DONE)


@triton.jit
def may_hold(tiles, row, num_tiles, block, least, PER: tl.constexpr):
    """Whether a block of 128 * PER tokens has one with x >= least."""
    tile = row * num_tiles + block * PER + tl.arange(0, PER)
    return tl.max(tl.load(tiles.maximum + tile), 0) >= least


@triton.jit(
    do_not_specialize=["vocab_size", "splits"], do_not_specialize_on_alignment=["positions"]
)
def _pivots_kernel(logits, row_params, tiles, workspace, vocab_size, positions, num_tiles, splits):
    """Grid [rows * splits]: the amounts from each pivot up."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    if tl.load(workspace.counters + row * ws.COUNTERS_WIDTH + ws.MODE) == ws.SPREAD:
        b, t = row // positions, row % positions
        alpha = tl.load(row_params.alpha + b)
        e = exponent(tl.load(row_params.temperature + b))
        row_max = tl.load(workspace.maximum + row)
        at, step = ws.pivots_of(workspace, row), tl.arange(0, NUM_PIVOTS)
        pivots, least = tl.load(at + step), key_value(tl.load(at + ws.BOTTOM))
        sums = tl.zeros([NUM_PIVOTS, LANES], tl.int64)
        for block in range(split, tl.cdiv(vocab_size, LANES * PIVOTS_PER), splits):
            if may_hold(tiles, row, num_tiles, block, least, PIVOTS_PER):
                key, packed = block_keys(
                    logits, alpha, b, t, block, row_max, e, vocab_size, PIVOTS_PER
                )
                sums = add_from(key, packed, pivots, sums)
        tl.atomic_add(at + NUM_PIVOTS + step, tl.sum(sums >> COUNT_SHIFT, 1), sem="relaxed")
        tl.atomic_add(at + 2 * NUM_PIVOTS + step, tl.sum(sums & MASS_BITS, 1), sem="relaxed")


class Found(NamedTuple):
    """What the pivots say of a row: prefixes, as in select_kept."""

    filters: Any
    row: Any
    likely: Any
    first: Any  # what is left before top_p; kept, where top_p is a share of something else
    kept: Any
    listed: Any  # tokens between pivots that first or kept may end at


@triton.jit
def _find(row_params, workspace, row, b, vocab_size):
    """The kept set as far as the pivots tell, the same in each program of a row."""
    at, step = ws.pivots_of(workspace, row), tl.arange(0, NUM_PIVOTS)
    count, held = tl.load(at + NUM_PIVOTS + step), tl.load(at + 2 * NUM_PIVOTS + step)
    pivots = Pivots(tl.load(at + step), count, held)
    filters = filters_of(row_params, b, vocab_size)
    bottom, cutoff = tl.load(at + ws.BOTTOM), tl.load(at + ws.LIKELY)
    all_tokens = certain(bottom, amount_from(pivots, bottom))
    likely = certain(cutoff, amount_from(pivots, cutoff))
    kept, first = select_kept(find_in_pivots, pivots, filters, all_tokens, likely)
    listed = kept.most.count - kept.least.count
    if two_stages(filters):
        # Both end between two pivots: the same ones, where one list serves for both, or others.
        same = kept.low < first.high
        above = tl.minimum(first.least.count, kept.least.count)
        listed = tl.where(same, 0, listed) + first.most.count
        listed -= tl.where(same, above, first.least.count)
    else:
        first = kept
    return Found(filters, all_tokens, likely, first, kept, listed)


@triton.jit
def _write_drawn(
    logits, row_params, b, t, workspace, out, row, row_max, found, kept, best, vocab_size
):
    """The results of a row whose kept set is ``kept``."""
    greedy, inv_t = temperature_of(row_params, b)
    at = workspace.words + row * ws.WORDS_WIDTH
    raw_mass = tl.load(at + ws.RAW, mask=row_max != INF, other=0)
    if row_max == INF:  # the tokens left are alike
        raw_mass = found.row.most.count << 44
        tl.store(at + ws.RAW, raw_mass)
    token = winner(best, vocab_size)
    alpha = tl.load(row_params.alpha + b)
    drawn = shifted_at(logits, alpha, b, t, token.to(tl.int32), row_max)
    ws.write_drawn(out, row, token, drawn, inv_t, greedy, kept.most.count, kept.most.mass, raw_mass)
    tl.store(at + ws.CUTOFF, kept.low)
    tl.store(at + ws.KEPT, kept.most.mass)


@triton.jit
def _draw_searching(
    logits, row_params, b, t, workspace, out, row, row_max, found, stream, vocab_size
):
    """Selects and draws by reading the row again and again, whatever it holds.

    For rows of which every 125th token, say, is unlike the others: they defeat the pivots.
    """
    given = Row(logits, row_params, b, t, row_max, vocab_size)
    kept, _first = select_kept(find_in_row, given, found.filters, found.row, found.likely)
    _greedy, inv_t = temperature_of(row_params, b)
    alpha = tl.load(row_params.alpha + b)
    noise = noise_key(row_params, b, t, stream)
    best = tl.full([], LOWEST, tl.int64)
    for block in range(0, tl.cdiv(vocab_size, LANES * SEARCH_PER)):
        x = block_x(logits, alpha, b, t, block, row_max, vocab_size, SEARCH_PER)
        taken = (x > -INF) & (order_key(x, block_ids(block, SEARCH_PER)) >= kept.low)
        shifted = x - finite_max(row_max)
        best = gumbel_max_block(best, shifted, taken, block, inv_t, noise, SEARCH_PER)
    _write_drawn(
        logits, row_params, b, t, workspace, out, row, row_max, found, kept, best, vocab_size
    )
    tl.store(workspace.counters + row * ws.COUNTERS_WIDTH + ws.MODE, ws.SEARCHED)


@triton.jit
def _settle(logits, row_params, b, t, workspace, out, row, row_max, found, stream, vocab_size):
    """The kept set's end among the listed tokens, their part of the draw, and the row's results."""
    _greedy, inv_t = temperature_of(row_params, b)
    noise = noise_key(row_params, b, t, stream)
    e = exponent(tl.load(row_params.temperature + b))
    counters = workspace.counters + row * ws.COUNTERS_WIDTH
    # Other programs' results: past the first-level cache, which does not see them.
    n = tl.load(counters + ws.NUM_CANDIDATES, cache_modifier=".cg")
    n = tl.minimum(n, ws.max_candidates(vocab_size))  # unless logits changed since pivots
    best = tl.load(workspace.words + row * ws.WORDS_WIDTH + ws.BEST, cache_modifier=".cg")
    keys, short = ws.list_of(workspace, row, vocab_size)
    listed = List(keys, n, short, finite_max(row_max), e, found.first, found.kept)
    kept, _first = select_kept(find_in_list, listed, found.filters, found.row, found.likely)
    rival = gumbel_max_candidates(keys, n, kept.low, finite_max(row_max), inv_t, noise)
    best = tl.maximum(best, rival)
    _write_drawn(
        logits, row_params, b, t, workspace, out, row, row_max, found, kept, best, vocab_size
    )


@triton.jit(
    do_not_specialize=["vocab_size", "splits", "stream"],
    do_not_specialize_on_alignment=["positions"],
)
def _draw_kernel(
    logits, row_params, tiles, workspace, out, vocab_size, positions, num_tiles, splits, stream,
    draft_ids,
):  # fmt: skip
    """Grid [rows * splits]: tokens that are kept for sure are scored at once, others listed."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    counters = workspace.counters + row * ws.COUNTERS_WIDTH
    if tl.load(counters + ws.MODE) != ws.DONE:
        b, t = row // positions, row % positions
        stream = stream_of(draft_ids, b, positions, stream)
        row_max = tl.load(workspace.maximum + row)
        found = _find(row_params, workspace, row, b, vocab_size)
        if found.listed > ws.max_candidates(vocab_size):
            if split == 0:
                _draw_searching(
                    logits, row_params, b, t, workspace, out, row, row_max, found, stream,
                    vocab_size,
                )  # fmt: skip
        else:
            first, kept = found.first, found.kept
            least = key_value(tl.minimum(first.low, kept.low))
            alpha = tl.load(row_params.alpha + b)
            noise = noise_key(row_params, b, t, stream)
            _greedy, inv_t = temperature_of(row_params, b)
            best = tl.full([], LOWEST, tl.int64)
            keys, _short = ws.list_of(workspace, row, vocab_size)
            for block in range(split, tl.cdiv(vocab_size, LANES * PER), splits):
                if may_hold(tiles, row, num_tiles, block, least, PER):
                    x = block_x(logits, alpha, b, t, block, row_max, vocab_size, PER)
                    key = tl.where(x > -INF, order_key(x, block_ids(block, PER)), 0)
                    sure = key >= kept.high
                    shifted = x - finite_max(row_max)
                    best = gumbel_max_block(best, shifted, sure, block, inv_t, noise, PER)
                    taken = (key >= kept.low) & (key < kept.high)
                    taken = taken | ((key >= first.low) & (key < first.high))
                    number = tl.sum(tl.ravel(taken.to(tl.int32)), 0)
                    if number > 0:
                        start = tl.atomic_add(counters + ws.NUM_CANDIDATES, number, sem="relaxed")
                        append(keys, start, key, taken, ws.max_candidates(vocab_size))
            best_at = workspace.words + row * ws.WORDS_WIDTH + ws.BEST
            tl.atomic_max(best_at, best, sem="relaxed")
            tl.debug_barrier()  # all of this program's tokens before its arrival
            if tl.atomic_add(counters + ws.DRAWS_DONE, 1) == splits - 1:
                _settle(
                    logits, row_params, b, t, workspace, out, row, row_max, found, stream,
                    vocab_size,
                )  # fmt: skip


def kind_of(
    logits: Logits, vocab_size: int, positions: int, draft_ids: Tensor | None = None
) -> Hashable:
    """What launches of sample's kernels are compiled for: their tensors are at 16 bytes."""
    return logits.kind, vocab_size, positions == 1, draft_ids is None


def launch_scan(
    logits: Logits, params: Any, tiles: ws.Tiles, vocab_size: int, positions: int,
    noise_stream: int, draft_ids: Tensor | None = None, draw: bool = True,
) -> None:  # fmt: skip
    """Writes the rows' summaries; without ``draw`` maxima and raw sums, and only alpha is read."""
    rows, width = tiles.maximum.shape
    blocks = width // ws.TILES_PER_PROGRAM
    launch(
        _scan_kernel, (kind_of(logits, vocab_size, positions, draft_ids), draw),
        tiles.maximum.device, (rows, blocks),
        logits, params, tiles, vocab_size, positions, blocks, noise_stream, draft_ids, draw,
        ws.TILES_PER_PROGRAM, num_warps=SCAN_WARPS, maxnreg=SCAN_REGISTERS, **OPTIONS,
    )  # fmt: skip


def launch_selection(
    logits: Logits, params: RowParams, tiles: ws.Tiles, out: ws.Outputs, vocab_size: int,
    positions: int, noise_stream: int, draft_ids: Tensor | None = None,
) -> ws.Workspace:  # fmt: skip
    """What comes after the tiles' summaries, whoever wrote them; arguments as in launch_sample."""
    device, rows = out.token_ids.device, out.token_ids.numel()
    workspace, width = ws.workspace_of(rows, vocab_size, device), tiles.maximum.shape[1]
    if rows == 0:
        return workspace
    held, kind = ws.at_once(width), kind_of(logits, vocab_size, positions, draft_ids)
    launch(
        _select_kernel, kind, device, (rows,),
        logits, params, tiles, workspace, out, vocab_size, positions, width, noise_stream,
        draft_ids, held, num_warps=SELECT_WARPS if held <= 2048 else 16, maxnreg=SELECT_REGISTERS,
        **OPTIONS,
    )  # fmt: skip
    splits = splits_of(rows, vocab_size, device)
    launch(
        _pivots_kernel, kind, device, (rows * splits,),
        logits, params, tiles, workspace, vocab_size, positions, width, splits,
        num_warps=SPREAD_WARPS, **OPTIONS,
    )  # fmt: skip
    launch(
        _draw_kernel, kind, device, (rows * splits,),
        logits, params, tiles, workspace, out, vocab_size, positions, width, splits, noise_stream,
        draft_ids, num_warps=SPREAD_WARPS, **OPTIONS,
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
    tiles = ws.tiles_of(rows, vocab_size, out.token_ids.device)
    if rows > 0:
        launch_scan(logits, params, tiles, vocab_size, positions, noise_stream, draft_ids)
    return tiles, launch_selection(
        logits, params, tiles, out, vocab_size, positions, noise_stream, draft_ids
    )
