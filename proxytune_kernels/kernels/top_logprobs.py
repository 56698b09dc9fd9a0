"""The likeliest tokens of each row and their raw logprobs; a launch after sample's, only if asked.

The maxima of tiles bound the n-th token from below, as they do for top_k: a few tiles of 128 tokens
are read again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from proxytune_kernels.kernels import workspace as ws
from proxytune_kernels.kernels.common import (
    INF,
    LANES,
    OPTIONS,
    ORDER_HF,
    STATUS_EMPTY,
    TOP_K_OFF,
    TOP_P_OFF,
    Logits,
    block_ids,
    block_x,
    cleaned,
    exponent,
    finite_max,
    key_id,
    key_value,
    log_mass,
    order_key,
    shifted_from,
)
from proxytune_kernels.kernels.selection import (
    CHUNK,
    MAX_SHORT,
    SEARCH_PER,
    Amount,
    Candidates,
    Filters,
    amounts_from,
    append,
    bracket,
    cutoff_bound,
    list_candidates,
    rank_candidates,
    trial_keys,
)
from proxytune_kernels.params import RowParams
from proxytune_kernels.reference import TopLogprobs

_WARPS = 8


@triton.jit
def _list_by_search(logits, row_params, b, t, row_max, keys, n, vocab_size):
    """Lists the n first tokens of a row where ties keep its tiles' maxima from telling them."""
    alpha = tl.load(row_params.alpha + b)
    lower = tl.full([], 1, tl.int64)
    upper = order_key(finite_max(row_max), tl.full([], 0, tl.int32)) + 1
    while upper - lower > 1:
        trials = trial_keys(lower, upper)
        count, _ = amounts_from(logits, row_params, b, t, row_max, -INF, trials, vocab_size)
        lower, upper, _ = bracket(trials, (count >= n) | (trials == lower), lower, upper)
    listed = tl.full([], 0, tl.int32)
    for block in range(0, tl.cdiv(vocab_size, LANES * SEARCH_PER)):
        x = block_x(logits, alpha, b, t, block, row_max, vocab_size, SEARCH_PER)
        ids = block_ids(block, SEARCH_PER)
        listed = append(keys, listed, x, ids, (x > -INF) & (order_key(x, ids) >= lower), MAX_SHORT)
    tl.debug_barrier()
    return tl.minimum(listed, MAX_SHORT)  # n, unless the row's alpha has changed meanwhile


@triton.jit(do_not_specialize=["n"])
def _top_logprobs_kernel(
    logits, row_params, tiles, workspace, drawn, top, n, vocab_size, num_tiles,
    NT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid [rows]; NT and N are num_tiles and n rounded up to powers of two."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row, row * 0
    i = tl.arange(0, N)
    listed = tl.full([], 0, tl.int32)
    rank = workspace.rank + row * MAX_SHORT
    keys = workspace.keys + row * ws.KEYS_WIDTH + ws.MAX_CANDIDATES
    row_max = tl.load(workspace.numbers + row * ws.NUMBERS_WIDTH + ws.MAX)
    if tl.load(drawn.status + row) < STATUS_EMPTY:
        tile = tl.arange(0, NT)
        maxima = tl.load(tiles.maximum + row * num_tiles + tile, mask=tile < num_tiles, other=-INF)
        shifted = shifted_from(cleaned(maxima, row_max), finite_max(row_max))
        bound = cutoff_bound(shifted, shifted > -INF, shifted * 0.0, 1.0, n, 2.0, False)
        alpha = tl.load(row_params.alpha + b)
        wanted = (shifted > -INF) & (shifted >= bound)
        listed = list_candidates(
            logits, alpha, b, t, row, workspace, keys, wanted, row_max, bound, vocab_size, NT
        )
        if listed > MAX_SHORT:
            listed = _list_by_search(logits, row_params, b, t, row_max, keys, n, vocab_size)
        e = exponent(tl.full([], 1.0, tl.float32))
        none = tl.full([], 0, tl.int64)
        candidates = Candidates(keys, listed, rank, workspace.before + row * MAX_SHORT)
        filters = Filters(TOP_K_OFF, TOP_P_OFF, -INF, ORDER_HF)
        rank_candidates(candidates, finite_max(row_max), e, Amount(none, none), filters)
    # Results by rank; what is past the last token left is -1 and NaN.
    absent = (i < n) & (i >= listed)
    tl.store(top.token_ids + row * n + i, tl.full([N], -1, tl.int64), mask=absent)
    tl.store(top.logprobs + row * n + i, tl.full([N], float("nan"), tl.float32), mask=absent)
    raw = log_mass(tl.load(workspace.masses + row * ws.MASSES_WIDTH + ws.RAW))
    for start in range(0, listed, CHUNK):
        j = start + tl.arange(0, CHUNK)
        key = tl.load(keys + j, mask=j < listed, other=0)
        place = tl.load(rank + j, mask=j < listed, other=n)
        logprob = ((key_value(key) - finite_max(row_max)).to(tl.float64) - raw).to(tl.float32)
        at = row * n + place
        tl.store(top.token_ids + at, key_id(key).to(tl.int64), mask=place < n)
        tl.store(top.logprobs + at, logprob, mask=place < n)


def launch_top_logprobs(
    logits: Logits, params: RowParams, tiles: ws.Tiles, workspace: ws.Workspace, drawn: ws.Outputs,
    top: TopLogprobs, vocab_size: int,
) -> None:  # fmt: skip
    """Writes the n likeliest tokens of [B, V] rows; tiles, workspace and drawn are sample's."""
    rows, n = top.token_ids.shape
    if rows == 0:
        return
    width = tiles.maximum.shape[1]
    _top_logprobs_kernel[(rows,)](
        logits, params, tiles, workspace, drawn, top, n, vocab_size, width,
        NT=ws.at_once(width), N=triton.next_power_of_2(n), num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
