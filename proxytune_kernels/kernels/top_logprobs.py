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
    NO_CUTOFF,
    NO_TARGET,
    OPTIONS,
    STATUS_EMPTY,
    TILE,
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
from proxytune_kernels.kernels.launches import launch
from proxytune_kernels.kernels.selection import (
    CHUNK,
    END,
    MAX_SHORT,
    RIVALS,
    SEARCH_PER,
    Amount,
    List,
    Prefix,
    Row,
    append,
    cutoff_bound,
    find_in_list,
    find_in_row,
    list_tiles,
    load_keys,
    trial_keys,
)
from proxytune_kernels.params import RowParams
from proxytune_kernels.reference import TopLogprobs

_WARPS = 8


@triton.jit
def _list_row(logits, row_params, b, t, row_max, keys, n, vocab_size):
    """Lists the n first tokens of a row where its tiles' maxima do not tell them."""
    row, none = Row(logits, row_params, b, t, row_max, vocab_size), tl.full([], NO_TARGET, tl.int64)
    lowest = tl.full([], NO_CUTOFF, tl.int64)
    cutoff = find_in_row(row, 0, lowest, n, none, none).low
    alpha = tl.load(row_params.alpha + b)
    listed = tl.full([], 0, tl.int32)
    for block in range(0, tl.cdiv(vocab_size, LANES * SEARCH_PER)):
        x = block_x(logits, alpha, b, t, block, row_max, vocab_size, SEARCH_PER)
        key = order_key(x, block_ids(block, SEARCH_PER))
        listed = append(keys, listed, key, (x > -INF) & (key >= cutoff), MAX_SHORT)
    tl.debug_barrier()
    return tl.minimum(listed, MAX_SHORT)  # n, unless the row's alpha has changed meanwhile


@triton.jit
def _nth_key(keys, n):
    """The n-th highest of the keys, NO_CUTOFF where there are fewer."""
    lower, upper = tl.full([], NO_CUTOFF, tl.int64), tl.full([], END, tl.int64)
    while upper - lower > 1:
        trials = trial_keys(lower, upper)
        enough = tl.sum((keys[None, :] >= trials[:, None]).to(tl.int32), 1) >= n
        upper = tl.min(tl.where(enough, upper, trials), 0)
        lower = tl.max(tl.where(enough, trials, lower), 0)
    return lower


@triton.jit(do_not_specialize=["n"])
def _top_logprobs_kernel(
    logits, row_params, tiles, workspace, drawn, top, n, vocab_size, num_tiles, NT: tl.constexpr
):
    """Grid [rows]; NT is num_tiles rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row, row * 0
    i = tl.arange(0, CHUNK)
    listed = tl.full([], 0, tl.int32)
    keys, short = ws.list_of(workspace, row, vocab_size)
    row_max = tl.load(workspace.maximum + row)
    raw = log_mass(tl.load(workspace.words + row * ws.WORDS_WIDTH + ws.RAW))
    if tl.load(drawn.status + row) < STATUS_EMPTY:
        tile = tl.arange(0, NT)
        maxima = tl.load(tiles.maximum + row * num_tiles + tile, mask=tile < num_tiles, other=-INF)
        maxima = cleaned(maxima, row_max)
        shifted = shifted_from(maxima, finite_max(row_max))
        alpha = tl.load(row_params.alpha + b)
        # n tiles have n tokens. Where likely tokens lie together, fewer do.
        none, no_target = tl.full([], 0, tl.int64), tl.full([], NO_TARGET, tl.int64)
        least, found = tl.full([], -INF, tl.float32), tl.full([], False, tl.int1)
        for halvings in tl.static_range(3, -1, -1):
            if found == 0:
                need = (n + (1 << halvings) - 1) >> halvings
                least = cutoff_bound(
                    shifted, shifted > -INF, shifted * 0.0, 1.0, need, 2.0, False, True
                )
                wanted = (shifted > -INF) & (shifted >= least)
                listed = list_tiles(
                    logits, alpha, b, t, row, workspace, keys, wanted, row_max, least, none,
                    vocab_size, NT,
                )  # fmt: skip
                found = (listed <= MAX_SHORT) & ((listed >= n) | (least == -INF))
        # Equal logits, or very many likely ones in a tile: the first tiles by key.
        tile_keys = tl.where(maxima > -INF, order_key(maxima, tile), 0)
        tiles_needed = 1
        while (found == 0) & (tiles_needed <= MAX_SHORT):
            last = _nth_key(tile_keys, tiles_needed)
            # All tokens from that tile's last one up, if it were as likely as its likeliest
            cutoff = order_key(key_value(last), key_id(last) * TILE + TILE - 1)
            listed = list_tiles(
                logits, alpha, b, t, row, workspace, keys, tile_keys >= last, row_max, -INF, cutoff,
                vocab_size, NT,
            )  # fmt: skip
            found = (listed <= MAX_SHORT) & (listed >= n)
            tiles_needed = tl.where(listed > MAX_SHORT, MAX_SHORT + 1, 4 * tiles_needed)
        if found == 0:
            listed = _list_row(logits, row_params, b, t, row_max, keys, n, vocab_size)
        e = exponent(tl.full([], 1.0, tl.float32))
        nothing = Amount(none, none)
        anywhere = Prefix(none + NO_CUTOFF, nothing, none + END, nothing)
        given = List(keys, listed, short, finite_max(row_max), e, anywhere, anywhere)
        cutoff = find_in_list(given, 0, none, n, no_target, no_target).low
        copied = tl.full([], 0, tl.int32)
        tl.debug_barrier()  # the search's scratch has been read
        for start in range(0, listed, CHUNK):
            key = load_keys(keys, start, listed, CHUNK)
            copied = append(short, copied, key, (key > 0) & (key >= cutoff), CHUNK)
        tl.debug_barrier()
        listed = copied
        key = load_keys(short, 0, listed, CHUNK)
        rank = tl.zeros([CHUNK], tl.int32)
        for start in range(0, listed, RIVALS):
            rival = load_keys(short, start, listed, RIVALS)
            rank += tl.sum((rival[:, None] > key[None, :]).to(tl.int32), 0)
        logprob = ((key_value(key) - finite_max(row_max)).to(tl.float64) - raw).to(tl.float32)
        at = row * n + rank
        tl.store(top.token_ids + at, key_id(key).to(tl.int64), mask=i < listed)
        tl.store(top.logprobs + at, logprob, mask=i < listed)
    # What is past the last token left is -1 and NaN.
    absent = (i < n) & (i >= listed)
    tl.store(top.token_ids + row * n + i, tl.full([CHUNK], -1, tl.int64), mask=absent)
    tl.store(top.logprobs + row * n + i, tl.full([CHUNK], float("nan"), tl.float32), mask=absent)


def launch_top_logprobs(
    logits: Logits, params: RowParams, tiles: ws.Tiles, workspace: ws.Workspace, drawn: ws.Outputs,
    top: TopLogprobs, vocab_size: int,
) -> None:  # fmt: skip
    """Writes the n likeliest tokens of [B, V] rows; tiles, workspace and drawn are sample's."""
    rows, n = top.token_ids.shape
    if rows == 0:
        return
    width = tiles.maximum.shape[1]
    launch(
        _top_logprobs_kernel, (logits.kind, vocab_size), top.token_ids.device, (rows,),
        logits, params, tiles, workspace, drawn, top, n, vocab_size, width, ws.at_once(width),
        num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
