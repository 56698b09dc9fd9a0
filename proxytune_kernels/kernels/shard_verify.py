"""shard_verify."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import (
    FLT_MIN,
    INF,
    LANES,
    LOWEST,
    MASS_ONE,
    NO_CUT,
    OPTIONS,
    STATUS_EMPTY,
    exponent,
    exponential,
    finite_max,
    is_valid,
    key_id,
    noise_key,
    order_key,
    splits_of,
    temperature_of,
)
from proxytune_kernels.kernels.noise import (
    best_of,
    gumbel,
    log_positive,
    score_of,
    tile_words,
    token_words,
    uniform,
)
from proxytune_kernels.kernels.shard_sample import (
    BEST,
    COUNT,
    RESIDUAL_BIT,
    RESIDUAL_WORDS,
    Part,
    count_word,
    first_block,
    head_of,
    last_block,
    score_key,
    shard_x,
    x_here,
)
from proxytune_kernels.params import RowParams
from proxytune_kernels.rng import STREAMS

STREAM_ACCEPT = tl.constexpr(STREAMS["accept"])
STREAM_RESIDUAL = tl.constexpr(STREAMS["residual"])
PER = tl.constexpr(4)  # fp32: 16 bytes a lane
_WARPS = 4


class KeptRows(NamedTuple):
    """Kept sets of some rows, int64 [B]."""

    cut: Any
    mass: Any


@triton.jit
def _shard_accept_kernel(
    target_logprobs, target_status, draft_logprobs, draft_ids, seeds, positions, num_accepted,
    steps, drafts,
):  # fmt: skip
    """Grid [B]: accepts drafts up to the first that is not; says where to draw anew."""
    b = tl.program_id(0).to(tl.int64)
    accepted = tl.full([], 0, tl.int32)
    stopped, active = tl.full([], -1, tl.int64), tl.full([], True, tl.int1)
    for j in range(0, drafts):
        row = b * (drafts + 1) + j
        drafted = tl.load(draft_ids + b * drafts + j)
        target, draft = tl.load(target_logprobs + row), tl.load(draft_logprobs + b * drafts + j)
        active = active & (drafted >= 0) & (tl.load(target_status + row) < STATUS_EMPTY)
        ids = tl.zeros([1], tl.int32) + tl.where(active, drafted, 0).to(tl.int32)
        seed, position = tl.load(seeds + b), tl.load(positions + b) + j
        words = token_words(ids, seed, position, STREAM_ACCEPT)
        u = tl.max(uniform(words, ids, seed, position, STREAM_ACCEPT), 0)
        likelier = tl.log(u.to(tl.float64)) < target.to(tl.float64) - draft.to(tl.float64)
        # NaN: not kept. What the draft's distribution does not hold is accepted whenever the
        # target's does.
        accepts = (target == target) & ((draft != draft) | likelier)
        stopped = tl.where(active & (accepts == 0), j, stopped)
        active = active & accepts
        accepted += active.to(tl.int32)
    tl.store(num_accepted + b, accepted)
    tl.store(steps + b, stopped)


@triton.jit
def _share(kept, row, x, ids, row_max, hi, lo, floor):
    """(kept, probability) of a block's tokens, fp32; 0 outside the kept set."""
    share = (MASS_ONE / tl.load(kept.mass + row).to(tl.float64)).to(tl.float32)
    cut = tl.maximum(tl.load(kept.cut + row), NO_CUT)
    inside = (x > -INF) & (order_key(x, ids) >= cut)
    p = exponential(x - finite_max(row_max), hi, lo, floor) * share
    return inside, tl.where(inside, p, 0.0)


@triton.jit(do_not_specialize=["drafts", "splits"])
def _shard_residual_kernel(
    part, kept, draft_part, draft_kept, row_params, steps, state, out, drafts, splits
):
    """Grid [B * splits]; state int64 [B, 3]: packed scores of both races, arrivals; out zeroed."""
    b, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    j = tl.load(steps + b)
    valid = is_valid(row_params, b, j)
    if (j >= 0) & (j < drafts) & valid:
        _, inv_t = temperature_of(row_params, b)
        seed, position = noise_key(row_params, b, j)
        hi, lo, floor = exponent(tl.load(row_params.temperature + b))
        row, draft_row = b * (drafts + 1) + j, b * drafts + j
        row_max, _, _ = head_of(part.summaries, row, part.rows, part.world)
        draft_max, draft_tokens, _ = head_of(
            draft_part.summaries, draft_row, draft_part.rows, draft_part.world
        )
        best, plain = tl.full([], LOWEST, tl.int64), tl.full([], LOWEST, tl.int64)
        for block in range(first_block(part, PER) + split, last_block(part, PER), splits):
            ids, x = shard_x(part, row, block, row_max, PER)
            inside, rest = _share(kept, row, x, ids, row_max, hi, lo, floor)
            if tl.max(tl.ravel(inside.to(tl.int32)), 0) != 0:
                if draft_tokens > 0:
                    _ids, y = shard_x(draft_part, draft_row, block, draft_max, PER)
                    _in_draft, drafted = _share(
                        draft_kept, draft_row, y, ids, draft_max, hi, lo, floor
                    )
                    rest -= drafted
                first = block * (LANES * PER) + tl.arange(0, PER) * 128
                words = tl.reshape(
                    tile_words(first, seed, position, STREAM_RESIDUAL, PER), [LANES, PER]
                )
                g = gumbel(uniform(words, ids, seed, position, STREAM_RESIDUAL))
                score = log_positive(tl.maximum(rest, FLT_MIN)) + g
                taken = inside & (rest >= FLT_MIN)
                best = tl.maximum(best, best_of(tl.where(taken, score, -INF), ids))
                score = (x - finite_max(row_max)) * inv_t + g
                plain = tl.maximum(plain, best_of(tl.where(inside, score, -INF), ids))
        at = state + b * 3
        tl.atomic_max(at, best)
        tl.atomic_max(at + 1, plain)
        tl.debug_barrier()  # this program's scores before its arrival
        if tl.atomic_add(at + 2, 1) == splits - 1:
            best = tl.load(at, cache_modifier=".cg")
            plain = tl.load(at + 1, cache_modifier=".cg")
            found = (best != LOWEST) & (score_of(best) > -INF)
            key = score_key(tl.where(found, best, plain))
            token = tl.where(key == 0, -1, key_id(key))
            word = out + b * RESIDUAL_WORDS
            tl.store(word + BEST, key | tl.where(found, RESIDUAL_BIT, 0))
            x = x_here(part, row, token.to(tl.int64), row_max)
            tl.store(word + COUNT, count_word(tl.full([], 0, tl.int64), x))


def launch_shard_accept(
    target_logprobs: Tensor, target_status: Tensor, draft_logprobs: Tensor, draft_ids: Tensor,
    seed: Tensor, position: Tensor, num_accepted: Tensor, steps: Tensor,
) -> None:  # fmt: skip
    """Writes the number of accepted drafts and the step of the residual, -1 for none, [B] each."""
    if len(seed) == 0:
        return
    _shard_accept_kernel[(len(seed),)](
        target_logprobs, target_status, draft_logprobs, draft_ids, seed, position, num_accepted,
        steps, draft_ids.shape[1], num_warps=1, **OPTIONS,
    )  # fmt: skip


def launch_shard_residual(
    part: Part, kept: KeptRows, draft_part: Part, draft_kept: KeptRows, row_params: RowParams,
    steps: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Writes words, int64 [B, 2], zeroed before: requests without a step keep that."""
    rows = len(out)
    if rows == 0 or len(draft_part.x) == 0:
        return
    state = torch.zeros((rows, 3), dtype=torch.int64, device=out.device)
    state[:, :2] = LOWEST.value
    splits = splits_of(rows, max(part.size, 1), out.device)
    _shard_residual_kernel[(rows * splits,)](
        part, kept, draft_part, draft_kept, row_params, steps, state, out,
        len(draft_part.x) // rows, splits, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
