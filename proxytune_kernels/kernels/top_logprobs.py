"""top_logprobs."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from proxytune_kernels.kernels.common import (
    ALL,
    INF,
    LANES,
    OPTIONS,
    ORDER_HF,
    STATUS_EMPTY,
    Logits,
    Strides,
    block_ids,
    block_x,
    exponent,
    finite_max,
    key_id,
    key_value,
    log_mass,
    order_key,
)
from proxytune_kernels.kernels.selection import (
    SEARCH_PER,
    SHORT,
    above,
    append,
    cutoff_bound,
    list_tokens,
    narrowed,
    rank_listed,
    trial_keys,
)
from proxytune_kernels.kernels.workspace import (
    KEYS_WIDTH,
    LIST,
    MASSES_WIDTH,
    MAX,
    RAW,
    Outputs,
    State,
    Tiles,
    at_once,
)
from proxytune_kernels.params import RowParams

_WARPS = 8


class Top(NamedTuple):
    """Results, [B, n]."""

    token_ids: Any  # int64
    logprobs: Any  # fp32


@triton.jit
def _list_many(logits, strides, row_params, b, t, row_max, keys, n, vocab_size):
    """Lists the n first tokens of a row where ties keep its tiles' maxima from telling them."""
    alpha = tl.load(row_params.alpha + b)
    lower = tl.full([], 1, tl.int64)
    upper = order_key(finite_max(row_max), tl.full([], 0, tl.int32)) + 1
    while upper - lower > 1:
        trials = trial_keys(lower, upper)
        count, _ = above(logits, strides, row_params, b, t, row_max, -INF, trials, vocab_size)
        lower, upper, _ = narrowed(trials, (count >= n) | (trials == lower), lower, upper)
    listed = tl.full([], 0, tl.int32)
    for block in range(0, tl.cdiv(vocab_size, LANES * SEARCH_PER)):
        x = block_x(logits, strides, alpha, b, t, block, row_max, vocab_size, SEARCH_PER)
        ids = block_ids(block, SEARCH_PER)
        listed = append(keys, listed, x, ids, (x > -INF) & (order_key(x, ids) >= lower), SHORT)
    tl.debug_barrier()
    return listed


@triton.jit(do_not_specialize=["n"])
def _top_kernel(
    logits, strides, row_params, tiles, state, drawn, top, n, vocab_size, num_tiles,
    NT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid [rows]; NT and N are num_tiles and n rounded up to powers of two."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row, row * 0
    i = tl.arange(0, N)
    listed = tl.full([], 0, tl.int32)
    rank = state.rank + row * SHORT
    keys = state.keys + row * KEYS_WIDTH + LIST
    row_max = tl.load(state.numbers + row * 16 + MAX)
    if tl.load(drawn.status + row) < STATUS_EMPTY:
        tile = tl.arange(0, NT)
        maxima = tl.load(tiles.maximum + row * num_tiles + tile, mask=tile < num_tiles, other=-INF)
        d = tl.where(row_max == INF, tl.where(maxima == INF, 0.0, -INF), maxima - row_max)
        bound = cutoff_bound(d, d > -INF, d * 0.0, 1.0, n, 2.0, False)
        alpha = tl.load(row_params.alpha + b)
        listed = list_tokens(
            logits, strides, state, keys, alpha, b, t, row, (d > -INF) & (d >= bound), row_max,
            bound, vocab_size, NT,
        )  # fmt: skip
        if listed > SHORT:
            listed = _list_many(logits, strides, row_params, b, t, row_max, keys, n, vocab_size)
        hi, lo, floor = exponent(tl.full([], 1.0, tl.float32))
        none = tl.full([], 0, tl.int64)
        rank_listed(
            keys, rank, state.before + row * SHORT, listed, finite_max(row_max), hi, lo, floor,
            none, none, ALL, -INF, ORDER_HF,
        )  # fmt: skip
    # Results by rank; what is past the last token left is -1 and NaN.
    absent = (i < n) & (i >= listed)
    tl.store(top.token_ids + row * n + i, tl.full([N], -1, tl.int64), mask=absent)
    tl.store(top.logprobs + row * n + i, tl.full([N], float("nan"), tl.float32), mask=absent)
    raw = log_mass(tl.load(state.masses + row * MASSES_WIDTH + RAW))
    for start in range(0, listed, 128):
        j = start + tl.arange(0, 128)
        key = tl.load(keys + j, mask=j < listed, other=0)
        place = tl.load(rank + j, mask=j < listed, other=n)
        logprob = ((key_value(key) - finite_max(row_max)).to(tl.float64) - raw).to(tl.float32)
        at = row * n + place
        tl.store(top.token_ids + at, key_id(key).to(tl.int64), mask=place < n)
        tl.store(top.logprobs + at, logprob, mask=place < n)


def launch_top(
    logits: Logits, strides: Strides, row_params: RowParams, tiles: Tiles, state: State,
    drawn: Outputs, top: Top, vocab_size: int,
) -> None:  # fmt: skip
    """Writes the n likeliest tokens of [B, V] rows; tiles, state and drawn are sample's."""
    rows, n = top.token_ids.shape
    if rows == 0:
        return
    width = tiles.maximum.shape[1]
    _top_kernel[(rows,)](
        logits, strides, row_params, tiles, state, drawn, top, n, vocab_size, width,
        NT=at_once(width), N=triton.next_power_of_2(n), num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
