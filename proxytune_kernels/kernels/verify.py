"""verify."""

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
    OPTIONS,
    STATUS_EMPTY,
    Logits,
    Strides,
    block_ids,
    block_x,
    exponent,
    exponential,
    finite_max,
    inputs,
    log_mass,
    noise_key,
    order_key,
    splits_of,
    temperature_of,
    x_at,
)
from proxytune_kernels.kernels.noise import (
    best_of,
    gumbel,
    log_positive,
    score_of,
    tile_words,
    token_words,
    uniform,
    winner,
)
from proxytune_kernels.kernels.sample import launch_sample
from proxytune_kernels.kernels.workspace import CUT, KEPT, MASSES_WIDTH, MAX, Outputs
from proxytune_kernels.params import RowParams
from proxytune_kernels.rng import STREAMS

_WARPS = 4
STREAM_ACCEPT = tl.constexpr(STREAMS["accept"])
STREAM_RESIDUAL = tl.constexpr(STREAMS["residual"])
PER = tl.constexpr(8)  # tokens a lane: 16 bytes of bf16


class Verified(NamedTuple):
    """Results, T = k + 1."""

    token_ids: Any  # int64 [B, T]
    num_accepted: Any  # int32 [B]
    logprobs: Any  # fp32 [B, T]
    status: Any  # int32 [B]


class Residual(NamedTuple):
    """What the accept launch leaves for the residual one, [B]."""

    step: Any  # int32: the position to draw at, -1 for none
    best: Any  # int64 [B, 2]: packed scores, of the residual and of the target
    arrived: Any  # int32


@triton.jit(do_not_specialize=["draft_stride"])
def _accept_kernel(drawn, draft_ids, draft_stride, out, positions):
    """Coupled, grid [B]: the draws as long as the drafts equal them, and the first that differs."""
    b = tl.program_id(0).to(tl.int64)
    active, accepted, status = True, 0, 0
    for j in range(0, positions):
        row = b * positions + j
        token = tl.load(drawn.token_ids + row)
        drafted = tl.load(draft_ids + b * draft_stride + j, mask=j < positions - 1, other=-1)
        logprob = tl.load(drawn.logprobs + row)
        status = tl.where(active, status | tl.load(drawn.status + row), status)
        tl.store(out.token_ids + row, tl.where(active, token, -1))
        tl.store(out.logprobs + row, tl.where(active, logprob, float("nan")))
        active = active & (token == drafted) & (token >= 0)
        accepted += active.to(tl.int32)
    tl.store(out.num_accepted + b, accepted)
    tl.store(out.status + b, status)


@triton.jit
def _kept_logprob(state, logits, strides, alpha, b, t, row, token, inv_t, greedy, inside):
    """(kept, logprob fp32) of one token of a selected row; nothing is kept where not ``inside``."""
    row_max = tl.load(state.numbers + row * 16 + MAX)
    at = state.masses + row * MASSES_WIDTH
    token = tl.where(inside, token, 0).to(tl.int32)
    x = x_at(logits, strides, alpha, b, t, token, row_max)
    kept = inside & (x > -INF) & (order_key(x, token) >= tl.load(at + CUT))
    scaled = (x - finite_max(row_max)).to(tl.float64) * inv_t.to(tl.float64)
    logprob = (scaled - log_mass(tl.load(at + KEPT))).to(tl.float32)
    return kept, tl.where(greedy, 0.0, logprob)


@triton.jit
def _accepts(
    logits, strides, state, row, draft_logits, draft_strides, draft_state, draft_row, draft_status,
    row_params, b, t, drafted, vocab_size,
):  # fmt: skip
    """(accepted, the draft's logprob under the target): u < target / draft, in fp64 logs."""
    greedy, inv_t = temperature_of(row_params, b)
    alpha = tl.load(row_params.alpha + b)
    seed, position = noise_key(row_params, b, t)
    inside = (drafted >= 0) & (drafted < vocab_size)
    kept, target = _kept_logprob(
        state, logits, strides, alpha, b, t, row, drafted, inv_t, greedy, inside
    )
    in_draft, draft = _kept_logprob(
        draft_state, draft_logits, draft_strides, alpha, b, t, draft_row, drafted, inv_t, greedy,
        inside & (draft_status < STATUS_EMPTY),
    )  # fmt: skip
    ids = tl.zeros([1], tl.int32) + tl.where(inside, drafted, 0).to(tl.int32)
    words = token_words(ids, seed, position, STREAM_ACCEPT)
    u = tl.max(uniform(words, ids, seed, position, STREAM_ACCEPT), 0)
    likelier = tl.log(u.to(tl.float64)) < target.to(tl.float64) - draft.to(tl.float64)
    # What the draft's distribution does not hold is accepted whenever the target's does.
    return kept & ((in_draft == 0) | likelier), target


@triton.jit(do_not_specialize=["vocab_size", "draft_stride"])
def _reject_kernel(
    logits, strides, row_params, drawn, state, draft_logits, draft_strides, draft_drawn,
    draft_state, draft_ids, draft_stride, out, residual, vocab_size, positions,
    DRAFTS: tl.constexpr,
):  # fmt: skip
    """Rejection, grid [B]: accepts drafts up to the first that is not; says where to draw anew."""
    b = tl.program_id(0).to(tl.int64)
    active, accepted, status, stopped = True, 0, 0, -1
    for j in range(0, positions):
        row = b * positions + j
        t = row - b * positions  # j as int64
        token, logprob = tl.load(drawn.token_ids + row), tl.load(drawn.logprobs + row)
        state_of_row = tl.load(drawn.status + row)
        status = tl.where(active, status | state_of_row, status)
        goes_on = active & False
        if DRAFTS:
            drafted = tl.load(draft_ids + b * draft_stride + j, mask=j < positions - 1, other=-1)
            if active & (drafted >= 0) & (state_of_row < STATUS_EMPTY):
                draft_row = b * (positions - 1) + j
                goes_on, logprob = _accepts(
                    logits, strides, state, row, draft_logits, draft_strides, draft_state,
                    draft_row, tl.load(draft_drawn.status + draft_row), row_params, b, t, drafted,
                    vocab_size,
                )  # fmt: skip
                token = drafted
                stopped = tl.where(goes_on, stopped, j)
        tl.store(out.token_ids + row, tl.where(active, token, -1))
        tl.store(out.logprobs + row, tl.where(active, logprob, float("nan")))
        active = goes_on
        accepted += tl.where(active, 1, 0)
    tl.store(out.num_accepted + b, accepted)
    tl.store(out.status + b, status)
    tl.store(residual.step + b, stopped)
    tl.store(residual.best + b * 2 + tl.arange(0, 2), tl.full([2], LOWEST, tl.int64))
    tl.store(residual.arrived + b, 0)


@triton.jit
def _share(state, row, x, ids, row_max, hi, lo, floor):
    """Probabilities of a block's tokens under a selected row, fp32; 0 outside its kept set."""
    at = state.masses + row * MASSES_WIDTH
    share = (MASS_ONE / tl.load(at + KEPT).to(tl.float64)).to(tl.float32)
    kept = (x > -INF) & (order_key(x, ids) >= tl.load(at + CUT))
    p = exponential(x - finite_max(row_max), hi, lo, floor) * share
    return kept, tl.where(kept, p, 0.0)


@triton.jit(do_not_specialize=["vocab_size", "splits"])
def _residual_kernel(
    logits, strides, row_params, state, draft_logits, draft_strides, draft_drawn, draft_state, out,
    residual, vocab_size, positions, splits,
):  # fmt: skip
    """Grid [B * splits]: draws from max(0, target - draft) where a draft was rejected.

    Where rounding leaves nothing of it, from the target. The last program of a request writes.
    """
    b, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    j = tl.load(residual.step + b).to(tl.int64)
    if j >= 0:
        greedy, inv_t = temperature_of(row_params, b)
        alpha = tl.load(row_params.alpha + b)
        seed, position = noise_key(row_params, b, j)
        hi, lo, floor = exponent(tl.load(row_params.temperature + b))
        row, draft_row = b * positions + j, b * (positions - 1) + j
        row_max = tl.load(state.numbers + row * 16 + MAX)
        draft_max = tl.load(draft_state.numbers + draft_row * 16 + MAX)
        drafts = tl.load(draft_drawn.status + draft_row) < STATUS_EMPTY
        best, plain = tl.full([], LOWEST, tl.int64), tl.full([], LOWEST, tl.int64)
        for block in range(split, tl.cdiv(vocab_size, LANES * PER), splits):
            ids = block_ids(block, PER)
            x = block_x(logits, strides, alpha, b, j, block, row_max, vocab_size, PER)
            kept, rest = _share(state, row, x, ids, row_max, hi, lo, floor)
            if tl.max(tl.ravel(kept.to(tl.int32)), 0) != 0:
                if drafts:
                    y = block_x(
                        draft_logits, draft_strides, alpha, b, j, block, draft_max, vocab_size, PER
                    )
                    _, drafted = _share(draft_state, draft_row, y, ids, draft_max, hi, lo, floor)
                    rest -= drafted
                first = block * (LANES * PER) + tl.arange(0, PER) * 128
                words = tl.reshape(
                    tile_words(first, seed, position, STREAM_RESIDUAL, PER), [LANES, PER]
                )
                g = gumbel(uniform(words, ids, seed, position, STREAM_RESIDUAL))
                score = log_positive(tl.maximum(rest, FLT_MIN)) + g
                best = tl.maximum(
                    best, best_of(tl.where(kept & (rest >= FLT_MIN), score, -INF), ids)
                )
                score = (x - finite_max(row_max)) * inv_t + g
                plain = tl.maximum(plain, best_of(tl.where(kept, score, -INF), ids))
        tl.atomic_max(residual.best + b * 2, best)
        tl.atomic_max(residual.best + b * 2 + 1, plain)
        tl.debug_barrier()  # this program's scores before its arrival
        if tl.atomic_add(residual.arrived + b, 1) == splits - 1:
            best = tl.load(residual.best + b * 2, cache_modifier=".cg")
            plain = tl.load(residual.best + b * 2 + 1, cache_modifier=".cg")
            token = winner(tl.where(score_of(best) > -INF, best, plain))
            _, logprob = _kept_logprob(
                state, logits, strides, alpha, b, j, row, token, inv_t, greedy, token >= 0
            )
            tl.store(out.token_ids + row, token)
            tl.store(out.logprobs + row, logprob)


def _drawn(rows: int, device: torch.device) -> Outputs:
    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=device)

    return Outputs(
        empty(torch.int64), empty(torch.float32), empty(torch.float32), empty(torch.int32),
        empty(torch.int32),
    )  # fmt: skip


def launch_coupled(
    logits: Logits, strides: Strides, draft_ids: Tensor, row_params: RowParams, out: Verified,
    vocab_size: int,
) -> None:  # fmt: skip
    """Writes what plain decoding would draw, as far as the drafts [B, k] agree with it."""
    batch_size, positions = out.token_ids.shape
    if batch_size == 0:
        return
    drawn = _drawn(batch_size * positions, out.token_ids.device)
    launch_sample(logits, strides, row_params, drawn, vocab_size, positions, STREAMS["sample"])
    _accept_kernel[(batch_size,)](
        drawn, draft_ids, draft_ids.stride(0), out, positions, num_warps=1, **OPTIONS
    )


def launch_rejection(
    logits: Logits, strides: Strides, draft_ids: Tensor, draft_logits: Tensor | None,
    row_params: RowParams, out: Verified, vocab_size: int,
) -> None:  # fmt: skip
    """Writes drafts [B, k] as far as they are accepted, then a residual or a bonus token."""
    (batch_size, positions), device = out.token_ids.shape, out.token_ids.device
    if batch_size == 0:
        return
    drawn = _drawn(batch_size * positions, device)
    _, state = launch_sample(
        logits, strides, row_params, drawn, vocab_size, positions, STREAMS["bonus"]
    )
    residual = Residual(
        torch.empty(batch_size, dtype=torch.int32, device=device),
        torch.empty((batch_size, 2), dtype=torch.int64, device=device),
        torch.empty(batch_size, dtype=torch.int32, device=device),
    )
    drafts = draft_logits is not None and positions > 1
    draft_roles, draft_strides, draft_drawn, draft_state = logits, strides, drawn, state
    if draft_logits is not None and positions > 1:
        draft_roles, draft_strides = inputs(draft_logits, None, None)
        draft_drawn = _drawn(batch_size * (positions - 1), device)
        _, draft_state = launch_sample(
            draft_roles, draft_strides, row_params, draft_drawn, vocab_size, positions - 1,
            STREAMS["draft"],
        )  # fmt: skip
    _reject_kernel[(batch_size,)](
        logits, strides, row_params, drawn, state, draft_roles, draft_strides, draft_drawn,
        draft_state, draft_ids, draft_ids.stride(0), out, residual, vocab_size, positions,
        DRAFTS=drafts, num_warps=1, **OPTIONS,
    )  # fmt: skip
    if not drafts:
        return
    splits = splits_of(batch_size, vocab_size, device)
    _residual_kernel[(batch_size * splits,)](
        logits, strides, row_params, state, draft_roles, draft_strides, draft_drawn, draft_state,
        out, residual, vocab_size, positions, splits, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
