"""Verification by rejection where the vocabulary is spread over ranks (docs/sharded.md).

accept    a program a request walks the drafts, from logprobs that all ranks have;
residual  each rank draws the argmax of log max(0, target - draft) + g over its part, at the step
          where a request's drafts end: 4 bytes a token of both rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import (
    INF,
    LOWEST,
    OPTIONS,
    STATUS_EMPTY,
    exponent,
    finite_max,
    key_id,
    splits_of,
    temperature_of,
)
from proxytune_kernels.kernels.noise import NoiseKey, noise_key, score_of
from proxytune_kernels.kernels.selection import is_valid
from proxytune_kernels.kernels.shard_sample import (
    BEST,
    COUNT,
    RESIDUAL_BIT,
    Part,
    blocks_of,
    count_word,
    head_of,
    score_key,
    shard_x,
    x_here,
)
from proxytune_kernels.kernels.verify import (
    STREAM_ACCEPT,
    STREAM_RESIDUAL,
    Kept,
    is_likelier,
    residual_block,
    share_of,
)
from proxytune_kernels.params import RowParams

PER = tl.constexpr(4)  # fp32: 16 bytes a lane
RESIDUAL_WORDS = tl.constexpr(2)
_WARPS = 4


@triton.jit(do_not_specialize=["drafts"])
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
        noise = NoiseKey(tl.load(seeds + b), tl.load(positions + b) + j, STREAM_ACCEPT)
        likelier = is_likelier(tl.where(active, drafted, 0), target, draft, noise)
        # NaN: not kept. What the draft's distribution does not hold is accepted whenever the
        # target's does.
        accepts = (target == target) & ((draft != draft) | likelier)
        stopped = tl.where(active & (accepts == 0), j, stopped)
        active = active & accepts
        accepted += active.to(tl.int32)
    tl.store(num_accepted + b, accepted)
    tl.store(steps + b, stopped)


@triton.jit(do_not_specialize=["rows", "draft_rows", "world", "drafts", "splits"])
def _shard_residual_kernel(
    part, kept, draft_part, draft_kept, row_params, steps, sums, out, rows, draft_rows, world,
    drafts, splits,
):  # fmt: skip
    """Grid [B * splits]; sums int64 [B, 3]: packed scores of residual and target, arrivals.

    out is zeroed.
    """
    b, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    j = tl.load(steps + b)
    valid = is_valid(row_params, b, j)
    if (j >= 0) & (j < drafts) & valid:
        _, inv_t = temperature_of(row_params, b)
        noise = noise_key(row_params, b, j, STREAM_RESIDUAL)
        e = exponent(tl.load(row_params.temperature + b))
        row, draft_row = b * (drafts + 1) + j, b * drafts + j
        row_max, _, _ = head_of(part.summaries, row, rows, world)
        draft_max, draft_tokens, _ = head_of(draft_part.summaries, draft_row, draft_rows, world)
        best, plain = tl.full([], LOWEST, tl.int64), tl.full([], LOWEST, tl.int64)
        first, end = blocks_of(part, PER)
        for block in range(first + split, end, splits):
            ids, x = shard_x(part, row, block, row_max, PER)
            inside, rest = share_of(kept, row, x, ids, row_max, e)
            if tl.max(tl.ravel(inside.to(tl.int32)), 0) != 0:
                if draft_tokens > 0:
                    _ids, y = shard_x(draft_part, draft_row, block, draft_max, PER)
                    _in_draft, drafted = share_of(draft_kept, draft_row, y, ids, draft_max, e)
                    rest -= drafted
                shifted = x - finite_max(row_max)
                best, plain = residual_block(
                    best, plain, inside, rest, shifted, ids, block, inv_t, noise, PER
                )
        at = sums + b * 3
        tl.atomic_max(at, best, sem="relaxed")
        tl.atomic_max(at + 1, plain, sem="relaxed")
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
    part: Part, kept: Kept, draft_part: Part, draft_kept: Kept, params: RowParams, steps: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """Writes words, int64 [B, 2], zeroed before: requests without a step keep that."""
    rows = len(out)
    if rows == 0 or len(draft_part.x) == 0:
        return
    sums = torch.zeros((rows, 3), dtype=torch.int64, device=out.device)
    sums[:, :2] = LOWEST.value
    splits = splits_of(rows, max(part.size, 1), out.device)
    _shard_residual_kernel[(rows * splits,)](
        part, kept, draft_part, draft_kept, params, steps, sums, out, part.rows, draft_part.rows,
        part.world, draft_part.rows // rows, splits, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
