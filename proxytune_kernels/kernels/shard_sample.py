"""shard_sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import (
    ALL,
    ID_BITS,
    INF,
    LANES,
    LOWEST,
    NO_CUT,
    NO_TARGET,
    OPTIONS,
    STATUS_BAD_PARAMS,
    STATUS_EMPTY,
    STATUS_NAN,
    STATUS_POSITIVE_INF,
    TOP_P_OFF,
    block_ids,
    cleaned,
    digits,
    exponent,
    exponential,
    finite_max,
    is_valid,
    key_id,
    key_value,
    log_mass,
    mass,
    noise_key,
    order_key,
    splits_of,
    temperature_of,
)
from proxytune_kernels.kernels.noise import race_block, score_of, winner
from proxytune_kernels.kernels.selection import (
    SORTED_CHUNK,
    filters_of,
    race_listed,
    select_sorted,
    sorted_prefix,
)
from proxytune_kernels.params import RowParams

COUNT_BITS = tl.constexpr(20)  # of a summary: tokens; above them one bit for NaN, and the maximum
COUNT_MASK = tl.constexpr((1 << 20) - 1)
MAX_SHIFT = tl.constexpr(21)
MASKED = tl.constexpr(0x007FFFFF)  # order bits of -inf
INFINITE = tl.constexpr(0xFF800000)  # of +inf
RESIDUAL_BIT = tl.constexpr(1 << 51)  # a residual goes before what is only the target's
# Words of a rank's draw
BEST = tl.constexpr(0)  # key of the best score among the kept tokens, 0 for none
COUNT = tl.constexpr(1)  # number of the kept tokens << 32 | bits of the best one's x
KEPT_MASS = tl.constexpr(2)
MASS = tl.constexpr(3)
RAW_MASS = tl.constexpr(4)
WANTED = tl.constexpr(5)  # key of the token asked for, 0 where it is elsewhere or masked
WORDS = tl.constexpr(5)
RESIDUAL_WORDS = tl.constexpr(2)


class Part(NamedTuple):
    """A rank's part of some rows, and what all ranks say of them."""

    x: Any  # fp32 [B, n]
    summaries: Any  # int64 [W, B]
    size: Any
    start: Any
    rows: Any
    world: Any


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
def first_block(part, PER: tl.constexpr):
    """The block that the part starts in."""
    return part.start // (LANES * PER)


@triton.jit
def last_block(part, PER: tl.constexpr):
    """The block past the part's last."""
    return tl.cdiv(part.start + part.size, LANES * PER)


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


PER = tl.constexpr(4)  # fp32: 16 bytes a lane
_KEYS = 1024  # keys a program of the histogram takes at once


@triton.jit(do_not_specialize=["splits"])
def _shard_scan_kernel(part, state, out, splits):
    """Grid [B * splits]; state int64 [B, 5], zeroed. The last program of a row writes its word."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    top, nan = tl.full([], MASKED, tl.int64), tl.full([], 0, tl.int64)
    live, infinite = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for block in range(first_block(part, PER) + split, last_block(part, PER), splits):
        ids = block * (LANES * PER) + tl.arange(0, LANES * PER)
        local = ids - part.start
        inside = (local >= 0) & (local < part.size)
        x = tl.load(part.x + row * part.size + local, mask=inside, other=-INF)
        nan += tl.sum((x != x).to(tl.int64), 0)
        x = tl.maximum(x, -INF)  # of NaN and a number it is the number
        live += tl.sum((x > -INF).to(tl.int64), 0)
        infinite += tl.sum((x == INF).to(tl.int64), 0)
        top = tl.maximum(top, order_key(tl.max(x, 0), tl.full([], 0, tl.int32)) >> 19)
    at = state + row * 5
    tl.atomic_max(at, top)
    tl.atomic_add(at + 1, nan)
    tl.atomic_add(at + 2, live)
    tl.atomic_add(at + 3, infinite)
    tl.debug_barrier()  # this program's numbers before its arrival
    if tl.atomic_add(at + 4, 1) == splits - 1:
        top = tl.load(at, cache_modifier=".cg")
        nan = tl.load(at + 1, cache_modifier=".cg")
        live = tl.load(at + 2, cache_modifier=".cg")
        infinite = tl.load(at + 3, cache_modifier=".cg")
        count = tl.where(top == INFINITE, infinite, live)
        word = (top << MAX_SHIFT) | ((nan != 0).to(tl.int64) << COUNT_BITS) | count
        tl.store(out + row, word)


@triton.jit(do_not_specialize=["blocks"])
def _shard_keys_kernel(part, out, blocks):
    """Grid [B * blocks]: order keys, 0 where masked."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row_max, _, _ = head_of(part.summaries, row, part.rows, part.world)
    ids, x = shard_x(part, row, first_block(part, PER) + block, row_max, PER)
    local = ids - part.start
    key = tl.where(x > -INF, order_key(x, ids), 0)
    tl.store(out + row * part.size + local, key, mask=(local >= 0) & (local < part.size))


@triton.jit(do_not_specialize=["size", "rows", "world", "blocks"])
def _shard_histogram_kernel(
    keys, summaries, temperature, edges, out, size, rows, world, blocks,
    EDGES: tl.constexpr, STEPS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid [B * blocks]; out int64 [B, 2 EDGES], zeroed: numbers, then masses."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row_max, _, _ = head_of(summaries, row, rows, world)
    hi, lo, floor = exponent(tl.load(temperature + row))
    i = block * KEYS + tl.arange(0, KEYS)
    key = tl.load(keys + row * size + i, mask=i < size, other=0)
    # The first edge that is not above the key, by halving: edges descend.
    low = tl.zeros([KEYS], tl.int32)
    high = tl.zeros([KEYS], tl.int32) + EDGES
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        edge = tl.load(edges + row * EDGES + middle, mask=open_, other=0)
        low = tl.where(open_ & (edge > key), middle + 1, low)
        high = tl.where(open_ & (edge <= key), middle, high)
    taken = (key > 0) & (low < EDGES)
    # No key of the row lies above its maximum.
    x = tl.minimum(key_value(key), finite_max(row_max))
    q = mass(x, finite_max(row_max), hi, lo, floor)
    at = out + row * 2 * EDGES
    tl.atomic_add(at + low, tl.full([KEYS], 1, tl.int64), mask=taken)
    tl.atomic_add(at + EDGES + low, q, mask=taken)


def _blocks(part: Part) -> int:
    """Blocks that a part touches."""
    width = LANES.value * PER.value
    return triton.cdiv(part.start + part.size, width) - part.start // width


def launch_shard_scan(part: Part, out: Tensor) -> None:
    """Writes one word a row, int64 [B]; the part's summaries are not read."""
    if len(out) == 0:
        return
    state = torch.zeros((len(out), 5), dtype=torch.int64, device=out.device)
    splits = splits_of(len(out), max(part.size, 1), out.device)
    _shard_scan_kernel[(len(out) * splits,)](part, state, out, splits, num_warps=_WARPS, **OPTIONS)


def launch_shard_keys(part: Part, out: Tensor) -> None:
    """Writes order keys, int64 [B, n]."""
    if out.numel() == 0:
        return
    blocks = _blocks(part)
    _shard_keys_kernel[(len(out) * blocks,)](part, out, blocks, num_warps=_WARPS, **OPTIONS)


def launch_shard_histogram(
    keys: Tensor, summaries: Tensor, temperature: Tensor, edges: Tensor, out: Tensor
) -> None:
    """Adds numbers and masses of keys between edges to out, int64 [B, 2 E]."""
    if keys.numel() == 0:
        return
    (rows, size), num_edges = keys.shape, edges.shape[1]
    blocks = triton.cdiv(size, _KEYS)
    _shard_histogram_kernel[(rows * blocks,)](
        keys, summaries, temperature, edges, out, size, rows, len(summaries), blocks,
        EDGES=num_edges, STEPS=num_edges.bit_length(), KEYS=_KEYS, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip


ARRIVED = tl.constexpr(5)
STATE = tl.constexpr(6)


@triton.jit
def masses_of(d, hi, lo, floor):
    """Masses of a block by lane, int64 [128]."""
    high, low = digits(exponential(d, hi, lo, floor))
    return (tl.sum(high, 1).to(tl.int64) << 22) + tl.sum(low, 1).to(tl.int64)


@triton.jit
def _write_words(part, state, out, wanted, row, row_max, greedy, WIDTH: tl.constexpr):
    """The row's words from what its programs added up."""
    packed = tl.load(state + BEST, cache_modifier=".cg")
    best = tl.where(greedy, tl.where(packed == LOWEST, 0, packed), score_key(packed))
    token = tl.where(best == 0, -1, key_id(best))
    x = x_here(part, row, token.to(tl.int64), row_max)
    at = out + row * WIDTH
    tl.store(at + BEST, best)
    tl.store(at + COUNT, count_word(tl.load(state + COUNT, cache_modifier=".cg"), x))
    tl.store(at + KEPT_MASS, tl.load(state + KEPT_MASS, cache_modifier=".cg"))
    tl.store(at + MASS, tl.load(state + MASS, cache_modifier=".cg"))
    tl.store(at + RAW_MASS, tl.load(state + RAW_MASS, cache_modifier=".cg"))
    if wanted is not None:
        token = tl.load(wanted + row)
        x = x_here(part, row, token, row_max)
        tl.store(at + WANTED, tl.where(x > -INF, order_key(x, token), 0))


@triton.jit(do_not_specialize=["splits", "stream"])
def _shard_draw_kernel(
    part, row_params, cut, wanted, state, out, splits, stream, WIDTH: tl.constexpr
):  # fmt: skip
    """Grid [B * splits]; state int64 [B, 6], zeroed but for the best; out [B, WIDTH], zeroed."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    row_max, tokens, _ = head_of(part.summaries, row, part.rows, part.world)
    if is_valid(row_params, row, tl.full([], 0, tl.int64)) & (tokens > 0):
        greedy, inv_t = temperature_of(row_params, row)
        seed, position = noise_key(row_params, row, tl.full([], 0, tl.int64))
        hi, lo, floor = exponent(tl.load(row_params.temperature + row))
        raw_hi, raw_lo, raw_floor = exponent(tl.full([], 1.0, tl.float32))
        top_k, top_p, shift, _ = filters_of(row_params, row, tokens.to(tl.int32))
        least = tl.full([], NO_CUT, tl.int64)
        race = (top_k == ALL) & (top_p >= TOP_P_OFF)
        if cut is not None:
            least = tl.maximum(tl.load(cut + row), NO_CUT)
            race = tl.full([], True, tl.int1)
        top = finite_max(row_max)
        best = tl.full([], LOWEST, tl.int64)
        count = tl.full([], 0, tl.int64)
        kept_mass, mass = tl.zeros([LANES], tl.int64), tl.zeros([LANES], tl.int64)
        raw = tl.zeros([LANES], tl.int64)
        for block in range(first_block(part, PER) + split, last_block(part, PER), splits):
            ids, x = shard_x(part, row, block, row_max, PER)
            d = x - top
            mass += masses_of(d, hi, lo, floor)
            raw += masses_of(d, raw_hi, raw_lo, raw_floor)
            key = tl.where(x > -INF, order_key(x, ids), 0)
            if greedy:
                highest = tl.max(tl.ravel(key), 0)
                best = tl.maximum(best, tl.where(highest > 0, highest, LOWEST))
            else:
                kept = (key >= least) & (d >= shift)
                count += tl.sum(tl.ravel(kept.to(tl.int64)), 0)
                kept_mass += masses_of(tl.where(kept, d, -INF), hi, lo, floor)
                if race:
                    best = race_block(best, d, kept, block, inv_t, seed, position, stream, PER)
        at = state + row * STATE
        tl.atomic_max(at + BEST, best)
        tl.atomic_add(at + COUNT, count)
        tl.atomic_add(at + KEPT_MASS, tl.sum(kept_mass, 0))
        tl.atomic_add(at + MASS, tl.sum(mass, 0))
        tl.atomic_add(at + RAW_MASS, tl.sum(raw, 0))
        tl.debug_barrier()  # this program's numbers before its arrival
        if tl.atomic_add(at + ARRIVED, 1) == splits - 1:
            _write_words(part, at, out, wanted, row, row_max, greedy, WIDTH)


def launch_shard_draw(
    part: Part, row_params: RowParams, cut: Tensor | None, wanted: Tensor | None, stream: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Writes words, int64 [B, 5 or 6], zeroed before: rows with nothing to draw keep that."""
    rows = len(out)
    if rows == 0:
        return
    state = torch.zeros((rows, STATE.value), dtype=torch.int64, device=out.device)
    state[:, BEST.value] = LOWEST.value
    splits = splits_of(rows, max(part.size, 1), out.device)
    _shard_draw_kernel[(rows * splits,)](
        part, row_params, cut, wanted, state, out, splits, stream,
        WIDTH=WORDS.value + (wanted is not None), num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip


_WARPS = 4


class FinishedOut(NamedTuple):
    """Results, [B]: those of ``shard_finish`` in the table of operators."""

    token_ids: Any
    logprobs: Any
    raw_logprobs: Any
    num_kept: Any
    status: Any
    cut: Any
    kept_mass: Any
    wanted_logprobs: Any
    wanted_raw_logprobs: Any
    raw_mass: Any
    undecided: Any


@triton.jit
def _totals(words, row, rows, world, WIDTH: tl.constexpr):
    """(best, its x, count, kept mass, mass, raw mass, wanted) over the ranks."""
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
    return best & ~RESIDUAL_BIT, x, count, kept_mass, total, raw, wanted


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
    nan = float("nan")
    tl.store(out.token_ids + row, tl.full([], -1, tl.int64))
    tl.store(out.logprobs + row, nan)
    tl.store(out.raw_logprobs + row, nan)
    tl.store(out.num_kept + row, 0)
    tl.store(out.status + row, status)
    tl.store(out.cut + row, tl.full([], 0, tl.int64))
    tl.store(out.kept_mass + row, tl.full([], 0, tl.int64))
    tl.store(out.wanted_logprobs + row, nan)
    tl.store(out.wanted_raw_logprobs + row, nan)
    tl.store(out.raw_mass + row, tl.full([], 0, tl.int64))
    tl.store(out.undecided + row, undecided)


@triton.jit
def _logprob(x, row_max, inv_t, greedy, log_kept):
    scaled = (x - row_max).to(tl.float64) * inv_t.to(tl.float64)
    return tl.where(greedy, 0.0, (scaled - log_kept).to(tl.float32))


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
        hi, lo, floor_d = exponent(tl.load(row_params.temperature + row))
        top = finite_max(row_max)
        best, x, likely, likely_mass, total, raw, wanted = _totals(words, row, rows, world, WIDTH)
        known = tl.full([], True, tl.int1)
        cut, kept, held = best, tl.full([], 1, tl.int64), tl.full([], 1 << 44, tl.int64)
        if given is not None:
            cut, kept = tl.load(given + row * 4), tl.load(given + row * 4 + 1)
            held, raw = tl.load(given + row * 4 + 2), tl.load(given + row * 4 + 3)
        else:
            if greedy == 0:
                top_k, top_p, shift, order = filters_of(row_params, row, tokens.to(tl.int32))
                n, floor = length * 0, tl.full([], 1, tl.int64)
                keys = ordered + row * world * length
                if length > 0:
                    n = world * length
                    floor = _floor(candidates, summaries, row, rows, world, length)
                known, cut, kept, held = select_sorted(
                    keys, n, floor, top, hi, lo, floor_d, tokens, total, likely, likely_mass,
                    top_k, top_p, shift, order,
                )  # fmt: skip
                if (top_k != ALL) | (top_p < TOP_P_OFF):
                    # Drawn from the candidates: as many as are kept must be certain.
                    enough, _, _, _ = sorted_prefix(
                        keys, n, floor, top, hi, lo, floor_d, kept, tl.full([], NO_TARGET, tl.int64)
                    )
                    known = known & enough
                    if known:
                        seed, position = noise_key(row_params, row, start)
                        packed = race_listed(
                            keys, n, tl.maximum(cut, floor), top, inv_t, seed, position, stream
                        )
                        token = winner(packed)
                        best = order_key(tl.full([], 0.0, tl.float32), token)
                        x = _listed_x(keys, n, token)
        if known & (best > 0):
            log_kept = log_mass(held)
            tl.store(out.token_ids + row, key_id(best).to(tl.int64))
            tl.store(out.logprobs + row, _logprob(x, top, inv_t, greedy, log_kept))
            log_raw = log_mass(raw)
            raw_logprob = ((x - top).to(tl.float64) - log_raw).to(tl.float32)
            tl.store(out.raw_logprobs + row, raw_logprob)
            tl.store(out.num_kept + row, kept.to(tl.int32))
            tl.store(out.status + row, status)
            tl.store(out.cut + row, cut)
            tl.store(out.kept_mass + row, held)
            asked_x = key_value(wanted)
            asked = _logprob(asked_x, top, inv_t, greedy, log_kept)
            asked_raw = ((asked_x - top).to(tl.float64) - log_raw).to(tl.float32)
            nan = float("nan")
            tl.store(out.wanted_logprobs + row, tl.where(wanted >= cut, asked, nan))
            tl.store(out.wanted_raw_logprobs + row, tl.where(wanted >= cut, asked_raw, nan))
            tl.store(out.raw_mass + row, raw)
            tl.store(out.undecided + row, 0)
        else:
            _write_nothing(
                out, row, tl.where(known, status, STATUS_BAD_PARAMS), tl.where(known, 0, 1)
            )


@triton.jit
def _listed_x(keys, n, token):
    """x of a listed token."""
    found = tl.full([], 0, tl.int64)
    for start in range(0, n, SORTED_CHUNK):
        i = start + tl.arange(0, SORTED_CHUNK)
        key = tl.load(keys + i, mask=i < n, other=0)
        found = tl.maximum(found, tl.max(tl.where((key > 0) & (key_id(key) == token), key, 0), 0))
    return key_value(found)


def launch_shard_finish(
    summaries: Tensor, words: Tensor, candidates: Tensor | None, row_params: RowParams,
    given: Tensor | None, stream: int, out: FinishedOut,
) -> None:  # fmt: skip
    """Writes the results of B rows: words [W, B, 2 to 6], candidates [W, B, C], given [B, 4]."""
    world, rows, width = words.shape
    if rows == 0:
        return
    if candidates is None or candidates.shape[2] == 0:
        length, sent, ordered = 0, words, words  # neither is read
    else:
        length, sent, ordered = candidates.shape[2], candidates, _sorted(candidates)
    _shard_finish_kernel[(rows,)](
        summaries, words, sent, ordered, row_params, given, out, rows,
        world, length, stream, WIDTH=width, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip


def _sorted(candidates: Tensor) -> Tensor:
    """All ranks' candidates of each row, [B, W C], descending."""
    rows = candidates.permute(1, 0, 2).flatten(1)
    return rows.sort(dim=-1, descending=True).values.contiguous()
