"""Sampling from a rank's part of the vocabulary (docs/sharded.md).

A row's part is fp32 [n], of tokens vocab_start to vocab_start + n - 1, as `combine` leaves it.
Blocks of [128, PER] tokens are cut at multiples in the whole vocabulary, wherever the part starts:
noise is keyed by its ids.

scan       reads 4 bytes a token, writes one word a row: maximum, number of tokens, NaN;
keys       writes 8 bytes a token: order keys, for rows with top_k or top_p;
histogram  reads them, for rows whose cutoff lies past the candidates;
draw       reads 4 bytes a token: counts, masses and the draw, relative to the whole row's maximum;
finish     one program a row, the same on every rank: the kept set, the token and the results, from
           all ranks' words and sorted candidates.

Numbers of a row's programs are added up, so how many there are does not show.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import (
    ID_BITS,
    INF,
    LANES,
    LOWEST,
    NO_CUTOFF,
    NO_TARGET,
    OPTIONS,
    STATUS_BAD_PARAMS,
    STATUS_EMPTY,
    STATUS_NAN,
    STATUS_POSITIVE_INF,
    TOP_K_OFF,
    TOP_P_OFF,
    block_ids,
    cdiv,
    cleaned,
    digits,
    exponent,
    exponential,
    finite_max,
    key_id,
    key_value,
    log_mass,
    mass,
    order_key,
    splits_of,
    temperature_of,
)
from proxytune_kernels.kernels.noise import gumbel_max_block, noise_key, score_of, winner
from proxytune_kernels.kernels.selection import (
    SORTED_CHUNK,
    Amount,
    Sorted,
    certain,
    cutoff_of,
    filters_of,
    find_in_sorted,
    gumbel_max_candidates,
    is_valid,
    select_kept,
)
from proxytune_kernels.kernels.workspace import logprob_of, raw_logprob_of, write_nothing
from proxytune_kernels.params import RowParams

PER = tl.constexpr(4)  # fp32: 16 bytes a lane
_WARPS = 4
_KEYS = 1024  # keys a program of the histogram takes at once
_STEPS = 11  # halvings that up to 2,047 edges take

# A summary: 20 bits of tokens, one bit for NaN, and above them the order bits of the maximum
COUNT_BITS = tl.constexpr(20)
COUNT_MASK = tl.constexpr((1 << 20) - 1)
MAX_SHIFT = tl.constexpr(21)
MASKED = tl.constexpr(0x007FFFFF)  # order bits of -inf
INFINITE = tl.constexpr(0xFF800000)  # of +inf

# Words of a rank's draw; a residual has the first two
BEST = tl.constexpr(0)  # key of the best score among the kept tokens, 0 for none
COUNT = tl.constexpr(1)  # number of the kept tokens << 32 | bits of the best one's x
KEPT_MASS = tl.constexpr(2)
MASS = tl.constexpr(3)
RAW_MASS = tl.constexpr(4)
WANTED = tl.constexpr(5)  # key of the token asked for, 0 where it is elsewhere or masked
WORDS = tl.constexpr(5)
RESIDUAL_BIT = tl.constexpr(1 << 51)  # a residual goes before what is only the target's

# What the programs of a row add up before it is written
ARRIVED = tl.constexpr(5)  # of draw, behind the words
SUMS = tl.constexpr(6)


class Part(NamedTuple):
    """A rank's part of some rows, and what all ranks say of them."""

    x: Any  # fp32 [B, n]
    summaries: Any  # int64 [W, B]
    size: Any
    start: Any

    @property
    def rows(self) -> int:
        """B."""
        return len(self.x)

    @property
    def world(self) -> int:
        """W."""
        return len(self.summaries)


@triton.jit
def head_of(summaries, row, rows, world):
    """(row_max, tokens left, status) of a row from all ranks' summaries; the max +inf or not."""
    top = tl.full([], MASKED, tl.int64)
    nan = tl.full([], 0, tl.int64)
    for rank in range(0, world):
        word = tl.load(summaries + rank * rows + row)
        top = tl.maximum(top, word >> MAX_SHIFT)
        nan = nan | ((word >> COUNT_BITS) & 1)
    count = tl.full([], 0, tl.int64)
    for rank in range(0, world):
        word = tl.load(summaries + rank * rows + row)
        # Where a +inf was there, only tokens that are it count.
        counts = (top != INFINITE) | ((word >> MAX_SHIFT) == top)
        count += tl.where(counts, word & COUNT_MASK, 0)
    row_max = key_value(top << ID_BITS)
    status = tl.where(nan != 0, STATUS_NAN, 0)
    status = status | tl.where(top == INFINITE, STATUS_POSITIVE_INF, 0)
    return row_max, count, status | tl.where(count == 0, STATUS_EMPTY, 0)


@triton.jit
def shard_x(part, row, block, row_max, PER: tl.constexpr):
    """(ids, cleaned x) of a block counted from token 0, [128, PER]; -inf outside the part."""
    ids = block_ids(block, PER)
    at = part.x + row * part.size
    local = ids - part.start
    first = block * (LANES * PER) - part.start
    if (first >= 0) & (first + LANES * PER <= part.size):
        x = tl.load(at + local)
    else:
        x = tl.load(at + local, mask=(local >= 0) & (local < part.size), other=-INF)
    return ids, cleaned(x, row_max)


@triton.jit
def x_here(part, row, token, row_max):
    """Cleaned x of one token, int64; -inf where it is not here."""
    local = token - part.start
    here = (token >= 0) & (local >= 0) & (local < part.size)
    x = tl.load(part.x + row * part.size + tl.where(here, local, 0), mask=here, other=-INF)
    return cleaned(x, row_max)


@triton.jit
def blocks_of(part, PER: tl.constexpr):
    """The block that the part starts in, and the block past its last."""
    width = LANES * PER
    return part.start // width, tl.cdiv(part.start + part.size, width)


@triton.jit
def score_key(packed):
    """Order key of a packed score and its token; 0 where there is none."""
    token = winner(packed)
    score = tl.where(packed == LOWEST, 0.0, score_of(packed))
    return tl.where(packed == LOWEST, 0, order_key(score, token))


@triton.jit
def count_word(count, x):
    """The word of a number of tokens and the bits of x."""
    bits = x.to(tl.uint32, bitcast=True).to(tl.int64)
    return (count.to(tl.int64) << 32) | bits


@triton.jit
def word_x(word):
    """x of such a word."""
    return word.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["splits"])
def _shard_scan_kernel(part, sums, out, splits):
    """Grid [B * splits]; sums int64 [B, 5], zeroed. The last program of a row writes its word."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    top, nan = tl.full([], MASKED, tl.int64), tl.full([], 0, tl.int64)
    live, infinite = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    first, end = blocks_of(part, PER)
    for block in range(first + split, end, splits):
        ids = block * (LANES * PER) + tl.arange(0, LANES * PER)
        local = ids - part.start
        inside = (local >= 0) & (local < part.size)
        x = tl.load(part.x + row * part.size + local, mask=inside, other=-INF)
        nan += tl.sum((x != x).to(tl.int64), 0)
        x = tl.maximum(x, -INF)  # of NaN and a number it is the number
        live += tl.sum((x > -INF).to(tl.int64), 0)
        infinite += tl.sum((x == INF).to(tl.int64), 0)
        top = tl.maximum(top, order_key(tl.max(x, 0), tl.full([], 0, tl.int32)) >> 19)
    at = sums + row * 5
    tl.atomic_max(at, top, sem="relaxed")
    tl.atomic_add(at + 1, nan, sem="relaxed")
    tl.atomic_add(at + 2, live, sem="relaxed")
    tl.atomic_add(at + 3, infinite, sem="relaxed")
    tl.debug_barrier()  # this program's numbers before its arrival
    if tl.atomic_add(at + 4, 1) == splits - 1:
        top = tl.load(at, cache_modifier=".cg")
        nan = tl.load(at + 1, cache_modifier=".cg")
        live = tl.load(at + 2, cache_modifier=".cg")
        infinite = tl.load(at + 3, cache_modifier=".cg")
        count = tl.where(top == INFINITE, infinite, live)
        word = (top << MAX_SHIFT) | ((nan != 0).to(tl.int64) << COUNT_BITS) | count
        tl.store(out + row, word)


@triton.jit(do_not_specialize=["rows", "world", "blocks"])
def _shard_keys_kernel(part, out, rows, world, blocks):
    """Grid [B * blocks]: order keys, 0 where masked."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row_max, _, _ = head_of(part.summaries, row, rows, world)
    ids, x = shard_x(part, row, blocks_of(part, PER)[0] + block, row_max, PER)
    local = ids - part.start
    key = tl.where(x > -INF, order_key(x, ids), 0)
    tl.store(out + row * part.size + local, key, mask=(local >= 0) & (local < part.size))


@triton.jit(do_not_specialize=["size", "num_edges", "rows", "world", "blocks"])
def _shard_histogram_kernel(
    keys, summaries, temperature, edges, out, size, num_edges, rows, world, blocks,
    STEPS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid [B * blocks]; out int64 [B, 2 num_edges], zeroed: numbers, then masses."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row_max, _, _ = head_of(summaries, row, rows, world)
    e = exponent(tl.load(temperature + row))
    i = block * KEYS + tl.arange(0, KEYS)
    key = tl.load(keys + row * size + i, mask=i < size, other=0)
    # The first edge that is not above the key, by halving: edges descend.
    low = tl.zeros([KEYS], tl.int32)
    high = tl.zeros([KEYS], tl.int32) + num_edges
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        edge = tl.load(edges + row * num_edges + middle, mask=open_, other=0)
        low = tl.where(open_ & (edge > key), middle + 1, low)
        high = tl.where(open_ & (edge <= key), middle, high)
    taken = (key > 0) & (low < num_edges)
    # No key of the row lies above its maximum.
    x = tl.minimum(key_value(key), finite_max(row_max))
    q = mass(x, finite_max(row_max), e)
    at = out + row * 2 * num_edges
    tl.atomic_add(at + low, tl.full([KEYS], 1, tl.int64), mask=taken, sem="relaxed")
    tl.atomic_add(at + num_edges + low, q, mask=taken, sem="relaxed")


def launch_shard_scan(part: Part, out: Tensor) -> None:
    """Writes one word a row, int64 [B]; the part's summaries are not read."""
    if len(out) == 0:
        return
    sums = torch.zeros((len(out), 5), dtype=torch.int64, device=out.device)
    splits = splits_of(len(out), max(part.size, 1), out.device)
    _shard_scan_kernel[(len(out) * splits,)](part, sums, out, splits, num_warps=_WARPS, **OPTIONS)


def launch_shard_keys(part: Part, out: Tensor) -> None:
    """Writes order keys, int64 [B, n]."""
    if out.numel() == 0:
        return
    width = LANES.value * PER.value
    blocks = cdiv(part.start + part.size, width) - part.start // width
    _shard_keys_kernel[(len(out) * blocks,)](
        part, out, part.rows, part.world, blocks, num_warps=_WARPS, **OPTIONS
    )


def launch_shard_histogram(
    keys: Tensor, summaries: Tensor, temperature: Tensor, edges: Tensor, out: Tensor
) -> None:
    """Adds numbers and masses of keys between edges to out, int64 [B, 2 E]."""
    if keys.numel() == 0:
        return
    (rows, size), num_edges = keys.shape, edges.shape[1]
    blocks = cdiv(size, _KEYS)
    _shard_histogram_kernel[(rows * blocks,)](
        keys, summaries, temperature, edges, out, size, num_edges, rows, len(summaries), blocks,
        STEPS=max(_STEPS, num_edges.bit_length()), KEYS=_KEYS, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip


@triton.jit
def masses_of(shifted, e):
    """Masses of a block by lane, int64 [128]."""
    high, low = digits(exponential(shifted, e))
    return (tl.sum(high, 1).to(tl.int64) << 22) + tl.sum(low, 1).to(tl.int64)


@triton.jit
def _write_words(part, sums, out, wanted, row, row_max, greedy, WIDTH: tl.constexpr):
    """The row's words from what its programs added up."""
    packed = tl.load(sums + BEST, cache_modifier=".cg")
    best = tl.where(greedy, tl.where(packed == LOWEST, 0, packed), score_key(packed))
    token = tl.where(best == 0, -1, key_id(best))
    x = x_here(part, row, token.to(tl.int64), row_max)
    at = out + row * WIDTH
    tl.store(at + BEST, best)
    tl.store(at + COUNT, count_word(tl.load(sums + COUNT, cache_modifier=".cg"), x))
    tl.store(at + KEPT_MASS, tl.load(sums + KEPT_MASS, cache_modifier=".cg"))
    tl.store(at + MASS, tl.load(sums + MASS, cache_modifier=".cg"))
    tl.store(at + RAW_MASS, tl.load(sums + RAW_MASS, cache_modifier=".cg"))
    if wanted is not None:
        token = tl.load(wanted + row)
        x = x_here(part, row, token, row_max)
        tl.store(at + WANTED, tl.where(x > -INF, order_key(x, token), 0))


@triton.jit(do_not_specialize=["rows", "world", "splits", "stream"])
def _shard_draw_kernel(
    part, row_params, cutoff, wanted, sums, out, rows, world, splits, stream, WIDTH: tl.constexpr
):  # fmt: skip
    """Grid [B * splits]; sums int64 [B, 6], zeroed but for the best; out [B, WIDTH], zeroed."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    row_max, tokens, _ = head_of(part.summaries, row, rows, world)
    if is_valid(row_params, row, tl.full([], 0, tl.int64)) & (tokens > 0):
        greedy, inv_t = temperature_of(row_params, row)
        noise = noise_key(row_params, row, tl.full([], 0, tl.int64), stream)
        e = exponent(tl.load(row_params.temperature + row))
        raw_e = exponent(tl.full([], 1.0, tl.float32))
        filters = filters_of(row_params, row, tokens.to(tl.int32))
        least = tl.full([], NO_CUTOFF, tl.int64)
        # Rows with top_k or top_p draw from the candidates, unless the cutoff is given.
        draws = (filters.top_k == TOP_K_OFF) & (filters.top_p >= TOP_P_OFF)
        if cutoff is not None:
            least = tl.maximum(tl.load(cutoff + row), NO_CUTOFF)
            draws = tl.full([], True, tl.int1)
        top = finite_max(row_max)
        best = tl.full([], LOWEST, tl.int64)
        count = tl.full([], 0, tl.int64)
        kept_mass, mass = tl.zeros([LANES], tl.int64), tl.zeros([LANES], tl.int64)
        raw = tl.zeros([LANES], tl.int64)
        first, end = blocks_of(part, PER)
        for block in range(first + split, end, splits):
            ids, x = shard_x(part, row, block, row_max, PER)
            shifted = x - top
            mass += masses_of(shifted, e)
            raw += masses_of(shifted, raw_e)
            key = tl.where(x > -INF, order_key(x, ids), 0)
            if greedy:
                highest = tl.max(tl.ravel(key), 0)
                best = tl.maximum(best, tl.where(highest > 0, highest, LOWEST))
            else:
                kept = (key >= least) & (shifted >= filters.min_p_shift)
                count += tl.sum(tl.ravel(kept.to(tl.int64)), 0)
                kept_mass += masses_of(tl.where(kept, shifted, -INF), e)
                if draws:
                    best = gumbel_max_block(best, shifted, kept, block, inv_t, noise, PER)
        at = sums + row * SUMS
        tl.atomic_max(at + BEST, best, sem="relaxed")
        tl.atomic_add(at + COUNT, count, sem="relaxed")
        tl.atomic_add(at + KEPT_MASS, tl.sum(kept_mass, 0), sem="relaxed")
        tl.atomic_add(at + MASS, tl.sum(mass, 0), sem="relaxed")
        tl.atomic_add(at + RAW_MASS, tl.sum(raw, 0), sem="relaxed")
        tl.debug_barrier()  # this program's numbers before its arrival
        if tl.atomic_add(at + ARRIVED, 1) == splits - 1:
            _write_words(part, at, out, wanted, row, row_max, greedy, WIDTH)


def launch_shard_draw(
    part: Part, params: RowParams, cutoff: Tensor | None, wanted: Tensor | None,
    noise_stream: int, out: Tensor,
) -> None:  # fmt: skip
    """Writes words, int64 [B, 5 or 6], zeroed before: rows with nothing to draw keep that."""
    rows = len(out)
    if rows == 0:
        return
    sums = torch.zeros((rows, SUMS.value), dtype=torch.int64, device=out.device)
    sums[:, BEST.value] = LOWEST.value
    splits = splits_of(rows, max(part.size, 1), out.device)
    _shard_draw_kernel[(rows * splits,)](
        part, params, cutoff, wanted, sums, out, part.rows, part.world, splits, noise_stream,
        WIDTH=WORDS.value + (wanted is not None), num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip


class Finished(NamedTuple):
    """Results, [B]."""

    token_ids: Any  # int64
    logprobs: Any  # fp32
    raw_logprobs: Any  # fp32
    num_kept: Any  # int32
    status: Any  # int32
    cutoff: Any  # int64: order key of the last kept token
    kept_mass: Any  # int64
    wanted_logprobs: Any  # fp32: of the token asked for; NaN where it is not kept
    wanted_raw_logprobs: Any  # fp32
    raw_mass: Any  # int64: of the row at temperature 1
    undecided: Any  # int32: whether the candidates do not reach to the cutoff


class Totals(NamedTuple):
    """A row's words over all ranks."""

    best: Any
    x: Any  # of the best token
    likely: Amount  # what min_p leaves; what is kept, where the cutoff was given
    mass: Any
    raw_mass: Any
    wanted: Any


@triton.jit
def _totals(words, row, rows, world, WIDTH: tl.constexpr):
    """The row's words over the ranks."""
    best, wanted = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    x = tl.full([], -INF, tl.float32)
    count, kept_mass = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    total, raw = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for rank in range(0, world):
        at = words + (rank * rows + row) * WIDTH
        one, word = tl.load(at + BEST), tl.load(at + COUNT)
        x = tl.where(one > best, word_x(word), x)
        best = tl.maximum(best, one)
        count += word >> 32
        if WIDTH >= WORDS:
            kept_mass += tl.load(at + KEPT_MASS)
            total += tl.load(at + MASS)
            raw += tl.load(at + RAW_MASS)
        if WIDTH > WORDS:
            wanted = tl.maximum(wanted, tl.load(at + WANTED))
    return Totals(best & ~RESIDUAL_BIT, x, Amount(count, kept_mass), total, raw, wanted)


@triton.jit
def _floor(candidates, summaries, row, rows, world, length):
    """The key below which a rank may have tokens that it did not send."""
    floor = tl.full([], 1, tl.int64)
    for rank in range(0, world):
        last = tl.load(candidates + (rank * rows + row) * length + length - 1)
        has = tl.load(summaries + rank * rows + row) & COUNT_MASK
        floor = tl.where(has > length, tl.maximum(floor, last), floor)
    return floor


@triton.jit
def _write_nothing(out, row, status, undecided):
    write_nothing(out, row, status)
    tl.store(out.cutoff + row, tl.full([], 0, tl.int64))
    tl.store(out.kept_mass + row, tl.full([], 0, tl.int64))
    tl.store(out.wanted_logprobs + row, float("nan"))
    tl.store(out.wanted_raw_logprobs + row, float("nan"))
    tl.store(out.raw_mass + row, tl.full([], 0, tl.int64))
    tl.store(out.undecided + row, undecided)


@triton.jit
def _listed_x(keys, n, token):
    """x of a listed token."""
    found = tl.full([], 0, tl.int64)
    for start in range(0, n, SORTED_CHUNK):
        i = start + tl.arange(0, SORTED_CHUNK)
        key = tl.load(keys + i, mask=i < n, other=0)
        found = tl.maximum(found, tl.max(tl.where((key > 0) & (key_id(key) == token), key, 0), 0))
    return key_value(found)


@triton.jit(do_not_specialize=["rows", "world", "length", "stream"])
def _shard_finish_kernel(
    summaries, words, candidates, ordered, row_params, given, out, rows, world, length, stream,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid [B]; candidates [W, B, length] as the ranks sent them, ordered [B, W length] sorted."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.full([], 0, tl.int64)
    row_max, tokens, status = head_of(summaries, row, rows, world)
    valid = is_valid(row_params, row, start)
    if (valid == 0) | (tokens == 0):
        _write_nothing(out, row, tl.where(valid, status, STATUS_BAD_PARAMS), 0)
    else:
        greedy, inv_t = temperature_of(row_params, row)
        e = exponent(tl.load(row_params.temperature + row))
        top = finite_max(row_max)
        totals = _totals(words, row, rows, world, WIDTH)
        best, x = totals.best, totals.x
        known = tl.full([], True, tl.int1)
        cutoff, kept, held = best, tl.full([], 1, tl.int64), tl.full([], 1 << 44, tl.int64)
        raw_mass = totals.raw_mass
        if given is not None:
            at = given + row * 4
            cutoff, kept = tl.load(at), tl.load(at + 1)
            held, raw_mass = tl.load(at + 2), tl.load(at + 3)
        else:
            if greedy == 0:
                filters = filters_of(row_params, row, tokens.to(tl.int32))
                n, floor = length * 0, tl.full([], 1, tl.int64)
                keys = ordered + row * world * length
                if length > 0:
                    n = world * length
                    floor = _floor(candidates, summaries, row, rows, world, length)
                all_tokens = certain(tl.full([], NO_CUTOFF, tl.int64), Amount(tokens, totals.mass))
                likely = certain(cutoff_of(top, filters.min_p_shift), totals.likely)
                given_keys = Sorted(keys, n, floor, top, e, all_tokens, likely)
                found, _first = select_kept(find_in_sorted, given_keys, filters, all_tokens, likely)
                known = found.low == found.high
                cutoff, kept, held = found.low, found.most.count, found.most.mass
                if (filters.top_k != TOP_K_OFF) | (filters.top_p < TOP_P_OFF):
                    # Drawn from the candidates: as many as are kept must be certain.
                    no_target = tl.full([], NO_TARGET, tl.int64)
                    listed = find_in_sorted(given_keys, 0, start, kept, no_target, no_target)
                    known = known & (listed.low == listed.high)
                    if known:
                        noise = noise_key(row_params, row, start, stream)
                        packed = gumbel_max_candidates(
                            keys, n, tl.maximum(cutoff, floor), top, inv_t, noise
                        )
                        token = winner(packed)
                        best = order_key(tl.full([], 0.0, tl.float32), token)
                        x = _listed_x(keys, n, token)
        if known & (best > 0):
            log_kept = log_mass(held)
            tl.store(out.token_ids + row, key_id(best).to(tl.int64))
            tl.store(out.logprobs + row, logprob_of(x - top, inv_t, greedy, log_kept))
            tl.store(out.raw_logprobs + row, raw_logprob_of(x - top, raw_mass))
            tl.store(out.num_kept + row, kept.to(tl.int32))
            tl.store(out.status + row, status)
            tl.store(out.cutoff + row, cutoff)
            tl.store(out.kept_mass + row, held)
            asked, is_kept = key_value(totals.wanted) - top, totals.wanted >= cutoff
            nan = float("nan")
            logprob = tl.where(is_kept, logprob_of(asked, inv_t, greedy, log_kept), nan)
            tl.store(out.wanted_logprobs + row, logprob)
            raw_logprob = tl.where(is_kept, raw_logprob_of(asked, raw_mass), nan)
            tl.store(out.wanted_raw_logprobs + row, raw_logprob)
            tl.store(out.raw_mass + row, raw_mass)
            tl.store(out.undecided + row, 0)
        else:
            _write_nothing(
                out, row, tl.where(known, status, STATUS_BAD_PARAMS), tl.where(known, 0, 1)
            )


def launch_shard_finish(
    summaries: Tensor, words: Tensor, candidates: Tensor | None, params: RowParams,
    given: Tensor | None, noise_stream: int, out: Finished,
) -> None:  # fmt: skip
    """Writes the results of B rows.

    Args:
        summaries: int64 [W, B].
        words: int64 [W, B, 5 or 6]; 2 where the kept sets are given.
        candidates: int64 [W, B, C], or None.
        params: one value per row.
        given: cutoff, number and mass of each kept set, and the row's mass at temperature 1, int64
            [B, 4], where they are known.
        noise_stream: its number (rng.STREAMS).
        out: tensors of B rows.
    """
    world, rows, width = words.shape
    if rows == 0:
        return
    length, sent, ordered = 0, words, words  # neither is read
    if candidates is not None and candidates.shape[2] > 0:
        length, sent = candidates.shape[2], candidates
        flat = candidates.permute(1, 0, 2).flatten(1)
        ordered = flat.sort(dim=-1, descending=True).values.contiguous()
    _shard_finish_kernel[(rows,)](
        summaries, words, sent, ordered, params, given, out, rows, world, length, noise_stream,
        WIDTH=width, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
