"""``verify`` over the ranks' parts of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels import reference, rng
from proxytune_kernels.ops import checks, operators
from proxytune_kernels.ops.sharded.rows import Candidates, Finished, candidates_for, draw_rows
from proxytune_kernels.ops.sharded.sample import (
    NUM_CANDIDATES,
    check_candidates,
    combine,
    prepare,
    whole_rows,
)
from proxytune_kernels.ops.sharded.shard import Shard
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.reference import VerifyOutput

_STATUS_BITS = (1, 2, 4, 8)


def verify(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    draft_token_ids: Tensor,
    params: RowParams | SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    shard: Shard,
    mode: str = "coupled",
    draft_logits: Tensor | None = None,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    max_top_k: int | None = None,
    num_candidates: int = NUM_CANDIDATES,
    **values: Any,
) -> VerifyOutput:
    """Check k drafted tokens per row where the logits are spread over ranks; a collective.

    Every rank gets what :func:`proxytune_kernels.verify` would give for the whole rows, as
    :func:`sample` does.

    Args:
        base, expert, anti: this rank's logits [B, k + 1, n_role], as in :func:`sample`.
        draft_token_ids: int64 [B, k], ids in the whole vocabulary, the same on every rank; -1 from
            where a row has no more drafts.
        params: as in :func:`sample`; ``position`` is that of the first drafted token.
        shard: this rank's part, from :meth:`Shard.agree`.
        mode: "coupled" or "rejection", as in :func:`proxytune_kernels.verify`.
        draft_logits: [B, k, n_draft], this rank's part of what the drafter drew from; rejection
            only.
        bias, allowed_mask: as in :func:`sample`, with a dimension k + 1 after the first.
        max_top_k, num_candidates: as in :func:`sample`.
        values: in place of ``params``.

    Returns:
        :class:`VerifyOutput`; the same on every rank.

    Raises:
        As :func:`sample`.

    Source: docs/sharded.md; docs/contracts.md, Speculative verification.
    """
    op = "sharded.verify"
    requests = prepare(op, base, expert, anti, params, values, shard, bias, allowed_mask, 3)
    check_candidates(op, max_top_k, num_candidates)
    if mode not in operators.VERIFY_MODES:
        raise ValueError(f"{op}: mode must be one of {list(operators.VERIFY_MODES)}, got {mode!r}")
    drafts = (base.shape[0], base.shape[1] - 1)
    checks.ids(op, "draft_token_ids", draft_token_ids, drafts, base.device)
    checks.draft_logits(draft_logits, mode, drafts, shard.size, base.device, op)
    x = combine(shard, base, expert, anti, requests.alpha, bias, allowed_mask)
    draft_x = None
    if draft_logits is not None:
        draft_x = combine(shard, draft_logits, None, None, requests.alpha)
    if shard.backend == "reference":
        size = shard.vocab_size
        whole = whole_rows(shard, x).view(*base.shape[:2], size)
        whole_draft = None if draft_x is None else whole_rows(shard, draft_x).view(*drafts, size)
        return reference.verify(whole, draft_token_ids, requests, mode, whole_draft)
    given = params if params is not None else requests
    candidates = candidates_for(given, requests, shard.vocab_size, max_top_k, num_candidates)
    ids = draft_token_ids.contiguous()
    if draft_x is None:
        return _coupled(shard, x, ids, requests, candidates)
    return _rejection(shard, x, draft_x, ids, requests, candidates)


def _at_positions(requests: RowParams, positions: int) -> RowParams:
    """One row for each position of each request; a position past 2^63 - 1 becomes negative."""
    rows = RowParams(*(column.repeat_interleave(positions) for column in requests))
    steps = torch.arange(positions, device=rows.position.device).repeat(requests.batch_size)
    return rows._replace(position=rows.position + steps)


def _emitted(
    tokens: Tensor, logprobs: Tensor, raw_logprobs: Tensor, status: Tensor, num_accepted: Tensor
) -> VerifyOutput:
    """Results [B, k + 1] up to the token after the accepted ones."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    used = steps <= num_accepted[:, None]
    bits = [bit * ((status & bit != 0) & used).any(-1) for bit in _STATUS_BITS]
    return VerifyOutput(
        tokens.masked_fill(~used, -1),
        num_accepted.int(),
        logprobs.masked_fill(~used, torch.nan),
        raw_logprobs.masked_fill(~used, torch.nan),
        torch.stack(bits).sum(0).int(),
    )


def _coupled(
    shard: Shard, x: Tensor, drafts: Tensor, requests: RowParams, candidates: Candidates
) -> VerifyOutput:
    """What plain decoding draws at each position, as far as the drafts agree with it."""
    shape = (drafts.shape[0], drafts.shape[1] + 1)
    rows = _at_positions(requests, shape[1])
    drawn, _ = draw_rows(shard, x, rows, rng.STREAMS["sample"], candidates)
    tokens, logprobs, raw_logprobs, status = (
        t.view(shape)
        for t in (drawn.token_ids, drawn.logprobs, drawn.raw_logprobs, drawn.status)
    )
    agrees = (tokens[:, :-1] == drafts) & (drafts >= 0)
    num_accepted = agrees.int().cumprod(-1).sum(-1)
    return _emitted(tokens, logprobs, raw_logprobs, status, num_accepted)


def _rejection(
    shard: Shard, x: Tensor, draft_x: Tensor, drafts: Tensor, requests: RowParams,
    candidates: Candidates,
) -> VerifyOutput:  # fmt: skip
    """Drafts as far as they are accepted, then a residual or a bonus token."""
    batch_size, k = drafts.shape
    shape = (batch_size, k + 1)
    rows, draft_rows = _at_positions(requests, k + 1), _at_positions(requests, k)
    wanted = torch.cat([drafts, drafts.new_full((batch_size, 1), -1)], -1)
    target, summaries = draw_rows(
        shard, x, rows, rng.STREAMS["bonus"], candidates, wanted.flatten()
    )
    draft, draft_summaries = draw_rows(
        shard, draft_x, draft_rows, rng.STREAMS["draft"], candidates, drafts.flatten()
    )
    # A draft's row that breaks the promise of max_top_k spoils its position.
    broken = torch.nn.functional.pad(draft.undecided.view(batch_size, k), (0, 1)).flatten() != 0
    target = target._replace(
        token_ids=target.token_ids.masked_fill(broken, -1),
        logprobs=target.logprobs.masked_fill(broken, torch.nan),
        status=target.status.masked_fill(broken, reference.STATUS_BAD_PARAMS),
    )
    accept = shard.operator("shard_accept", x.device)
    num_accepted, steps = accept(
        target.wanted_logprobs.view(shape), target.status.view(shape),
        draft.wanted_logprobs.view(batch_size, k), drafts, requests.seed, requests.position,
    )  # fmt: skip
    residual = _residual(
        shard, x, draft_x, target, draft, summaries, draft_summaries, steps, requests, k
    )
    at = torch.arange(k + 1, device=x.device)
    tokens, logprobs = target.token_ids.view(shape), target.logprobs.view(shape)
    drawn = at == steps[:, None]
    tokens = torch.where(drawn, residual.token_ids[:, None], tokens)
    logprobs = torch.where(drawn, residual.logprobs[:, None], logprobs)
    accepted = at < num_accepted[:, None]
    tokens = torch.where(accepted, wanted, tokens)
    logprobs = torch.where(accepted, target.wanted_logprobs.view(shape), logprobs)
    plain = RowParams.make(tokens.numel(), device=x.device)
    raw, _ = draw_rows(shard, x, plain, rng.STREAMS["sample"], candidates, tokens.flatten())
    raw_logprobs = raw.wanted_logprobs.view(shape)
    return _emitted(tokens, logprobs, raw_logprobs, target.status.view(shape), num_accepted)


def _residual(
    shard: Shard, x: Tensor, draft_x: Tensor, target: Finished, draft: Finished,
    summaries: Tensor, draft_summaries: Tensor, steps: Tensor, requests: RowParams, k: int,
) -> Finished:  # fmt: skip
    """Draws from max(0, target - draft) at one step of each request; token -1 where it is -1."""
    own = shard.operator("shard_residual", x.device)(
        x, summaries, target.cut, target.kept_mass, draft_x, draft_summaries, draft.cut,
        draft.kept_mass, steps, *requests, shard.vocab_start,
    )  # fmt: skip
    step = steps.clamp(min=0)
    row = torch.arange(len(steps), device=x.device) * (k + 1) + step
    kept = torch.stack((target.cut, target.num_kept.long(), target.kept_mass), -1)[row]
    rows = requests._replace(position=requests.position + step)
    finish = shard.operator("shard_finish", x.device)
    at = summaries[:, row].contiguous()
    return Finished(*finish(at, shard.gather(own), None, *rows, kept, rng.STREAMS["residual"]))
