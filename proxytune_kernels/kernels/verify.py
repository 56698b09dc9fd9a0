"""Verification of drafted tokens: every position of every request is one of sample's rows.

coupled    `sample` draws at each position; a program a request compares the draws with the drafts.
rejection  the drafter's rows are selected too; a program a request accepts a draft where
               log u < log target - log draft
           and stops at the first that it does not accept; there the residual is drawn, spread over
           the vocabulary: the argmax of log max(0, target - draft) + g. A request without drafts
           draws with sample's noise; the token behind accepted drafts has noise of its own.

Each logit is read as often as sample reads it, and once more where a residual is drawn. Nothing of
the size of a row is written. docs/contracts.md, Speculative verification.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels import workspace as ws
from proxytune_kernels.kernels.common import (
    FLT_MIN,
    INF,
    LANES,
    LOWEST,
    MASS_ONE,
    OPTIONS,
    STATUS_EMPTY,
    Logits,
    block_ids,
    block_x,
    exponent,
    exponential,
    finite_max,
    inputs,
    log_mass,
    order_key,
    splits_of,
    temperature_of,
    x_at,
)
from proxytune_kernels.kernels.launches import launch
from proxytune_kernels.kernels.noise import (
    best_of,
    block_words,
    gumbel,
    log_positive,
    noise_key,
    score_of,
    token_words,
    uniform,
    winner,
)
from proxytune_kernels.kernels.sample import launch_sample
from proxytune_kernels.params import RowParams
from proxytune_kernels.reference import VerifyOutput
from proxytune_kernels.rng import STREAMS

STREAM_ACCEPT = tl.constexpr(STREAMS["accept"])
STREAM_RESIDUAL = tl.constexpr(STREAMS["residual"])
PER = tl.constexpr(8)  # tokens a lane: 16 bytes of bf16
_WARPS = 4


class Rows(NamedTuple):
    """The target's or the drafter's rows, as sample left them."""

    logits: Logits
    drawn: ws.Outputs
    workspace: ws.Workspace


class Kept(NamedTuple):
    """Kept sets of some rows, int64: order keys of their last tokens, and their masses."""

    cutoff: Any
    mass: Any


class Residual(NamedTuple):
    """What the rejection launch leaves for the residual one, [B]."""

    step: Any  # int32: the position to draw at, -1 for none
    best: Any  # int64 [B, 2]: packed scores, of the residual and of the target
    arrived: Any  # int32


@triton.jit(do_not_specialize=["positions"])
def _coupled_kernel(drawn, draft_ids, out, positions):
    """Grid [B]: the draws as long as the drafts equal them, and the first that differs."""
    b = tl.program_id(0).to(tl.int64)
    active, accepted, status = True, 0, 0
    for j in range(0, positions):
        row = b * positions + j
        token = tl.load(drawn.token_ids + row)
        drafted = tl.load(draft_ids + b * (positions - 1) + j, mask=j < positions - 1, other=-1)
        logprob, raw = tl.load(drawn.logprobs + row), tl.load(drawn.raw_logprobs + row)
        status = tl.where(active, status | tl.load(drawn.status + row), status)
        tl.store(out.token_ids + row, tl.where(active, token, -1))
        tl.store(out.logprobs + row, tl.where(active, logprob, float("nan")))
        tl.store(out.raw_logprobs + row, tl.where(active, raw, float("nan")))
        active = active & (token == drafted) & (token >= 0)
        accepted += active.to(tl.int32)
    tl.store(out.num_accepted + b, accepted)
    tl.store(out.status + b, status)


@triton.jit
def is_likelier(token, target, draft, noise):
    """Whether u < target / draft, both given as logprobs; in fp64 logs."""
    ids = tl.zeros([1], tl.int32) + token.to(tl.int32)
    u = tl.max(uniform(token_words(ids, noise, 0), ids, noise), 0)
    return tl.log(u.to(tl.float64)) < target.to(tl.float64) - draft.to(tl.float64)


@triton.jit
def share_of(kept, row, x, ids, row_max, e):
    """(whether kept, probability) of a block's tokens, fp32; 0 outside the kept set."""
    share = (MASS_ONE / tl.load(kept.mass + row).to(tl.float64)).to(tl.float32)
    inside = (x > -INF) & (order_key(x, ids) >= tl.load(kept.cutoff + row))
    p = exponential(x - finite_max(row_max), e) * share
    return inside, tl.where(inside, p, 0.0)


@triton.jit
def residual_block(best, plain, kept, rest, shifted, ids, block, inv_t, noise, PER: tl.constexpr):
    """The better of (best, plain) and a block's scores: of the residual ``rest``, of the target."""
    g = gumbel(uniform(block_words(block, noise, PER), ids, noise))
    score = log_positive(tl.maximum(rest, FLT_MIN)) + g
    best = tl.maximum(best, best_of(tl.where(kept & (rest >= FLT_MIN), score, -INF), ids))
    score = shifted * inv_t + g
    return best, tl.maximum(plain, best_of(tl.where(kept, score, -INF), ids))


@triton.jit
def _logprobs_at(rows, alpha, b, t, row, token, inv_t, greedy, inside):
    """(kept, logprob, raw logprob) of one token of a row; nothing is kept where not ``inside``."""
    row_max = tl.load(rows.workspace.maximum + row)
    at = rows.workspace.words + row * ws.WORDS_WIDTH
    token = tl.where(inside, token, 0).to(tl.int32)
    x = x_at(rows.logits, alpha, b, t, token, row_max)
    kept = inside & (x > -INF) & (order_key(x, token) >= tl.load(at + ws.CUTOFF))
    shifted = x - finite_max(row_max)
    logprob = ws.logprob_of(shifted, inv_t, greedy, log_mass(tl.load(at + ws.KEPT)))
    return kept, logprob, ws.raw_logprob_of(shifted, tl.load(at + ws.RAW))


@triton.jit
def _accepts(target, draft, row, draft_row, row_params, b, t, drafted, vocab_size):
    """(accepted, the draft's logprob and raw logprob under the target)."""
    greedy, inv_t = temperature_of(row_params, b)
    alpha = tl.load(row_params.alpha + b)
    inside = (drafted >= 0) & (drafted < vocab_size)
    kept, logprob, raw = _logprobs_at(target, alpha, b, t, row, drafted, inv_t, greedy, inside)
    drawable = tl.load(draft.drawn.status + draft_row) < STATUS_EMPTY
    in_draft, draft_logprob, _ = _logprobs_at(
        draft, alpha, b, t, draft_row, drafted, inv_t, greedy, inside & drawable
    )
    noise = noise_key(row_params, b, t, STREAM_ACCEPT)
    likelier = is_likelier(tl.where(inside, drafted, 0), logprob, draft_logprob, noise)
    # What the draft's distribution does not hold is accepted whenever the target's does.
    return kept & ((in_draft == 0) | likelier), logprob, raw


@triton.jit(do_not_specialize=["vocab_size", "positions"])
def _rejection_kernel(
    target, draft, row_params, draft_ids, out, residual, vocab_size, positions,
    DRAFTS: tl.constexpr,
):  # fmt: skip
    """Grid [B]: accepts drafts up to the first that is not; says where to draw anew."""
    b = tl.program_id(0).to(tl.int64)
    active, accepted, status, stopped = True, 0, 0, -1
    for j in range(0, positions):
        row = b * positions + j
        t = row - b * positions  # j as int64
        token = tl.load(target.drawn.token_ids + row)
        logprob = tl.load(target.drawn.logprobs + row)
        raw = tl.load(target.drawn.raw_logprobs + row)
        row_status = tl.load(target.drawn.status + row)
        status = tl.where(active, status | row_status, status)
        goes_on = active & False
        if DRAFTS:
            drafted = tl.load(draft_ids + b * (positions - 1) + j, mask=j < positions - 1, other=-1)
            if active & (drafted >= 0) & (row_status < STATUS_EMPTY):
                goes_on, logprob, raw = _accepts(
                    target, draft, row, b * (positions - 1) + j, row_params, b, t, drafted,
                    vocab_size,
                )  # fmt: skip
                token = drafted
                stopped = tl.where(goes_on, stopped, j)
        tl.store(out.token_ids + row, tl.where(active, token, -1))
        tl.store(out.logprobs + row, tl.where(active, logprob, float("nan")))
        tl.store(out.raw_logprobs + row, tl.where(active, raw, float("nan")))
        active = goes_on
        accepted += tl.where(active, 1, 0)
    tl.store(out.num_accepted + b, accepted)
    tl.store(out.status + b, status)
    tl.store(residual.step + b, stopped)
    tl.store(residual.best + b * 2 + tl.arange(0, 2), tl.full([2], LOWEST, tl.int64))
    tl.store(residual.arrived + b, 0)


@triton.jit(do_not_specialize=["vocab_size", "positions", "splits"])
def _residual_kernel(target, draft, row_params, out, residual, vocab_size, positions, splits):
    """Grid [B * splits]: draws from max(0, target - draft) where a draft was rejected.

    Where rounding leaves nothing of it, from the target. The last program of a request writes.
    """
    b, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    j = tl.load(residual.step + b).to(tl.int64)
    if j >= 0:
        greedy, inv_t = temperature_of(row_params, b)
        alpha = tl.load(row_params.alpha + b)
        noise = noise_key(row_params, b, j, STREAM_RESIDUAL)
        e = exponent(tl.load(row_params.temperature + b))
        row, draft_row = b * positions + j, b * (positions - 1) + j
        work, draft_work = target.workspace, draft.workspace
        row_max = tl.load(work.maximum + row)
        draft_max = tl.load(draft_work.maximum + draft_row)
        drafts = tl.load(draft.drawn.status + draft_row) < STATUS_EMPTY
        in_target = Kept(work.words + ws.CUTOFF, work.words + ws.KEPT)
        in_draft = Kept(draft_work.words + ws.CUTOFF, draft_work.words + ws.KEPT)
        best, plain = tl.full([], LOWEST, tl.int64), tl.full([], LOWEST, tl.int64)
        for block in range(split, tl.cdiv(vocab_size, LANES * PER), splits):
            ids = block_ids(block, PER)
            x = block_x(target.logits, alpha, b, j, block, row_max, vocab_size, PER)
            kept, rest = share_of(in_target, row * ws.WORDS_WIDTH, x, ids, row_max, e)
            if tl.max(tl.ravel(kept.to(tl.int32)), 0) != 0:
                if drafts:
                    y = block_x(draft.logits, alpha, b, j, block, draft_max, vocab_size, PER)
                    _, drafted = share_of(
                        in_draft, draft_row * ws.WORDS_WIDTH, y, ids, draft_max, e
                    )
                    rest -= drafted
                best, plain = residual_block(
                    best, plain, kept, rest, x - finite_max(row_max), ids, block, inv_t, noise, PER
                )
        tl.atomic_max(residual.best + b * 2, best, sem="relaxed")
        tl.atomic_max(residual.best + b * 2 + 1, plain, sem="relaxed")
        tl.debug_barrier()  # this program's scores before its arrival
        if tl.atomic_add(residual.arrived + b, 1) == splits - 1:
            best = tl.load(residual.best + b * 2, cache_modifier=".cg")
            plain = tl.load(residual.best + b * 2 + 1, cache_modifier=".cg")
            token = winner(tl.where(score_of(best) > -INF, best, plain), vocab_size)
            _, logprob, raw = _logprobs_at(
                target, alpha, b, j, row, token, inv_t, greedy, token >= 0
            )
            tl.store(out.token_ids + row, token)
            tl.store(out.logprobs + row, logprob)
            tl.store(out.raw_logprobs + row, raw)


def launch_coupled(
    logits: Logits, draft_ids: Tensor, params: RowParams, out: VerifyOutput, vocab_size: int
) -> None:
    """Writes what plain decoding would draw, as far as the drafts agree with it.

    Args:
        logits: [B, k + 1, V].
        draft_ids: int64 [B, k], contiguous; -1 from where a request has no more drafts.
        params: one value per request; ``position`` is that of its first draft.
        out: tensors of B requests.
        vocab_size: agreed width.
    """
    batch_size, positions = out.token_ids.shape
    if batch_size == 0:
        return
    drawn = ws.outputs_of(batch_size * positions, out.token_ids.device)
    launch_sample(logits, params, drawn, vocab_size, positions, STREAMS["sample"])
    launch(
        _coupled_kernel, None, draft_ids.device, (batch_size,), drawn, draft_ids, out, positions,
        num_warps=1, **OPTIONS,
    )  # fmt: skip


def launch_rejection(
    logits: Logits, draft_ids: Tensor, draft_logits: Tensor | None, params: RowParams,
    out: VerifyOutput, vocab_size: int,
) -> None:  # fmt: skip
    """Writes drafts as far as they are accepted, then a residual or a bonus token.

    Requests without drafts (k = 0, or their first is -1) get what `sample` draws. Arguments as in
    launch_coupled; draft_logits [B, k, V] are what the drafter drew from.
    """
    (batch_size, positions), device = out.token_ids.shape, out.token_ids.device
    if batch_size == 0:
        return

    def rows(given: Logits, steps: int, noise_stream: str, ids: Tensor | None = None) -> Rows:
        drawn, stream = ws.outputs_of(batch_size * steps, device), STREAMS[noise_stream]
        _, workspace = launch_sample(given, params, drawn, vocab_size, steps, stream, ids)
        return Rows(given, drawn, workspace)

    if draft_logits is not None and positions > 1:
        target = rows(logits, positions, "bonus", draft_ids)
        draft = rows(inputs(draft_logits, None, None), positions - 1, "draft")
    else:
        target = draft = rows(logits, positions, "sample")
    residual = Residual(
        torch.empty(batch_size, dtype=torch.int32, device=device),
        torch.empty((batch_size, 2), dtype=torch.int64, device=device),
        torch.empty(batch_size, dtype=torch.int32, device=device),
    )
    kind = target.logits.kind, draft.logits.kind, draft is target
    launch(
        _rejection_kernel, kind, device, (batch_size,),
        target, draft, params, draft_ids, out, residual, vocab_size, positions,
        draft is not target, num_warps=1, **OPTIONS,
    )  # fmt: skip
    if draft is target:
        return
    splits = splits_of(batch_size, vocab_size, device)
    launch(
        _residual_kernel, kind, device, (batch_size * splits,),
        target, draft, params, out, residual, vocab_size, positions, splits, num_warps=_WARPS,
        **OPTIONS,
    )  # fmt: skip
