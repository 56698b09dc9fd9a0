"""What all ranks' numbers on a row decide: its kept set, token and results, the same on every rank.

A program a row: sums over the ranks, then three passes over their candidates, which are sorted.
docs/sharded.md has the argument; docs/contracts.md, Selection, the filters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels._common import (
    ALL,
    INF,
    NO_TARGET,
    OPTIONS,
    ORDER_HF,
    ORDER_VLLM,
    STATUS_BAD_PARAMS,
    TOP_P_OFF,
    exponent,
    key_id,
    key_value,
    mass,
    mass_target,
    order_key,
)
from proxytune_kernels.kernels._list import race_listed
from proxytune_kernels.kernels._noise import winner
from proxytune_kernels.kernels._row import (
    filters_of,
    finite_max,
    is_valid,
    log_mass,
    noise_key,
    temperature_of,
)
from proxytune_kernels.kernels._shard import (
    BEST,
    COUNT,
    COUNT_MASK,
    KEPT_MASS,
    MASS,
    NO_CUT,
    RAW_MASS,
    RESIDUAL_BIT,
    WANTED,
    WORDS,
    head_of,
    word_x,
)
from proxytune_kernels.params import RowParams

CHUNK = tl.constexpr(256)
_WARPS = 4


class FinishedOut(NamedTuple):
    """Results, [B]; _shard_library.FINISHED."""

    token_ids: Any
    logprobs: Any
    raw_logprobs: Any
    num_kept: Any
    status: Any
    cut: Any
    kept_mass: Any
    wanted_logprobs: Any
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
def _prefix(keys, n, floor, row_max, hi, lo, floor_d, need_count, need_mass):
    """(known, key of the last token, length, mass) of the shortest prefix that meets a need.

    Keys are sorted, descending; the certain ones are from ``floor`` up. Where they do not meet the
    need, the length is one more than theirs.
    """
    length, held = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    certain = tl.full([], 0, tl.int64)
    last, prefix_mass = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
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
def _shorter(known, cut, length, held, other_known, other_cut, other_length, other_held):
    """The shorter of two prefixes, the first where they are as long."""
    other = other_length < length
    return (
        tl.where(other, other_known, known),
        tl.where(other, other_cut, cut),
        tl.where(other, other_length, length),
        tl.where(other, other_held, held),
    )


@triton.jit
def _min_p_cut(row_max, shift):
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
def _select(
    keys, n, floor, row_max, hi, lo, floor_d, tokens, total, likely, likely_mass, top_k, top_p,
    shift, order,
):  # fmt: skip
    """(known, cut, length, mass) of the kept set; docs/contracts.md, Selection."""
    yes, none = tl.full([], True, tl.int1), tl.full([], NO_TARGET, tl.int64)
    no_cut = tl.full([], NO_CUT, tl.int64)
    k_known, k_cut, k_length, k_held = yes, no_cut, tokens, total
    if top_k != ALL:
        need = top_k.to(tl.int64)
        k_known, k_cut, k_length, k_held = _prefix(
            keys, n, floor, row_max, hi, lo, floor_d, need, none
        )
        k_length = need
    cut = no_cut
    if shift > -INF:
        cut = _min_p_cut(row_max, shift)
    # What top_p's mass is a share of
    whole_known, whole = yes, total
    if order == ORDER_VLLM:
        whole_known, _, _, whole = _shorter(
            yes, cut, likely, likely_mass, k_known, k_cut, k_length, k_held
        )
    if order == ORDER_HF:
        whole_known, whole = k_known, k_held
    known, cut, length, held = _shorter(
        yes, cut, likely, likely_mass, k_known, k_cut, k_length, k_held
    )
    if top_p < TOP_P_OFF:
        p_known, p_cut, p_length, p_held = _prefix(
            keys, n, floor, row_max, hi, lo, floor_d, none, mass_target(top_p, whole)
        )
        p_known = p_known & whole_known
        p_length = tl.where(whole_known, p_length, 1)
        known, cut, length, held = _shorter(
            known, cut, length, held, p_known, p_cut, p_length, p_held
        )
    return known, cut, length, held


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
            cut = tl.load(given + row * 3)
            kept, held = tl.load(given + row * 3 + 1), tl.load(given + row * 3 + 2)
        else:
            if greedy == 0:
                top_k, top_p, shift, order = filters_of(row_params, row, tokens.to(tl.int32))
                n, floor = length * 0, tl.full([], 1, tl.int64)
                keys = ordered + row * world * length
                if length > 0:
                    n = world * length
                    floor = _floor(candidates, summaries, row, rows, world, length)
                known, cut, kept, held = _select(
                    keys, n, floor, top, hi, lo, floor_d, tokens, total, likely, likely_mass,
                    top_k, top_p, shift, order,
                )  # fmt: skip
                if (top_k != ALL) | (top_p < TOP_P_OFF):
                    # Drawn from the candidates: as many as are kept must be certain.
                    enough, _, _, _ = _prefix(
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
            raw_logprob = float("nan")
            if WIDTH >= WORDS:
                raw_logprob = ((x - top).to(tl.float64) - log_mass(raw)).to(tl.float32)
            tl.store(out.raw_logprobs + row, raw_logprob)
            tl.store(out.num_kept + row, kept.to(tl.int32))
            tl.store(out.status + row, status)
            tl.store(out.cut + row, cut)
            tl.store(out.kept_mass + row, held)
            asked = _logprob(key_value(wanted), top, inv_t, greedy, log_kept)
            tl.store(out.wanted_logprobs + row, tl.where(wanted >= cut, asked, float("nan")))
            tl.store(out.undecided + row, 0)
        else:
            _write_nothing(
                out, row, tl.where(known, status, STATUS_BAD_PARAMS), tl.where(known, 0, 1)
            )


@triton.jit
def _listed_x(keys, n, token):
    """x of a listed token."""
    found = tl.full([], 0, tl.int64)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        key = tl.load(keys + i, mask=i < n, other=0)
        found = tl.maximum(found, tl.max(tl.where((key > 0) & (key_id(key) == token), key, 0), 0))
    return key_value(found)


def launch_shard_finish(
    summaries: Tensor, words: Tensor, candidates: Tensor | None, row_params: RowParams,
    given: Tensor | None, stream: int, out: FinishedOut,
) -> None:  # fmt: skip
    """Writes the results of B rows: words [W, B, 2 to 6], candidates [W, B, C], given [B, 3]."""
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
