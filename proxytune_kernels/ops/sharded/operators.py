"""``sample`` and ``verify`` over the ranks' parts of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from proxytune_kernels import reference, rng
from proxytune_kernels.ops import checks, operators
from proxytune_kernels.ops.operators import Params
from proxytune_kernels.ops.sharded.candidates import (
    MAX_CANDIDATES,
    Candidates,
    candidates_for,
    draw_rows,
)
from proxytune_kernels.ops.sharded.shard import Shard
from proxytune_kernels.ops.table import Finished
from proxytune_kernels.params import RowParams
from proxytune_kernels.reference import SampleOutput, VerifyOutput

_STATUS_BITS = (1, 2, 4, 8)

NUM_CANDIDATES = 128
"""Candidates that a rank sends where the host does not know how many are enough: 1 KiB a row."""


def sample(
    base: Tensor,
    expert: Tensor | None = None,
    anti: Tensor | None = None,
    params: Params = None,
    *,
    shard: Shard,
    alpha: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    filter_order: str | Tensor | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    edits: None = None,
    noise_stream: str = "sample",
    max_top_k: int | None = None,
    num_candidates: int = NUM_CANDIDATES,
) -> SampleOutput:
    """Draw one token per row from logits that are spread over ranks; a collective.

    Every rank gives its part of the logits, and the same parameters; every rank gets the token, the
    size of the kept set and the status that :func:`proxytune_kernels.sample` would give for the
    whole rows, bit for bit, and on the CPU and reference backends its logprobs too.

    Args:
        base, expert, anti: this rank's logits [B, n_role], ``n_role >= shard.size``: column i is
            token ``shard.vocab_start + i``; otherwise as in :func:`proxytune_kernels.sample`.
        params, alpha and the other single ones: as there, the same on every rank.
        shard: this rank's part, from :meth:`Shard.agree`.
        bias: fp32 [B, shard.size].
        allowed_mask: int32 [B, ceil(shard.size / 32)]; bit 0 of word 0 is this rank's first token.
        edits: refused; for these, give as base what :func:`proxytune_kernels.combine` makes of this
            rank's part, with ids less ``shard.vocab_start``.
        noise_stream: as there.
        max_top_k: a promise about all rows: that none has top_p or top_k, unless its top_k is in
            [1, max_top_k]; 0: none has either. Then nothing is read back from the device. A row
            that breaks it, and would need more candidates, has token -1 and status 8. None:
            parameters on the host are looked at; where they leave it open, or are on a device, one
            number is read back.
        num_candidates: likeliest tokens that each rank sends where top_p or parameters on a device
            leave open how many are needed, at most 4,096. Rows that need more take longer.

    Returns:
        :class:`SampleOutput`, without ``top``; the same on every rank.

    Raises:
        ValueError, TypeError: names the argument, what it got and what it wanted.

    Example: see docs/sharded.md, which is its source.
    """
    op = "sharded.sample"
    rows = _prepared(
        op, shard, base, expert, anti, bias, allowed_mask, edits, params,
        alpha, temperature, top_k, top_p, min_p, filter_order, seed, position,
    )  # fmt: skip
    _check_candidates(op, max_top_k, num_candidates)
    checks.noise_stream(op, noise_stream)
    x = _combined(shard, base, expert, anti, rows.alpha, bias, allowed_mask)
    if shard.backend == "reference":
        return reference.sample(_whole_rows(shard, x), rows, noise_stream)
    given = params if params is not None else rows
    candidates = candidates_for(given, rows, shard.vocab_size, max_top_k, num_candidates)
    drawn, _ = draw_rows(shard, x, rows, noise_stream, candidates)
    return SampleOutput(*(getattr(drawn, name) for name in SampleOutput._fields[:-2]))


def _prepared(
    op: str, shard: Any, base: Any, expert: Any, anti: Any, bias: Any, allowed_mask: Any,
    edits: Any, params: Any, *singles: Any, dims: int = 2,
) -> RowParams:  # fmt: skip
    """Check the arguments; the parameters as tensors, one value per request."""
    if edits is not None:
        raise checks.no_edits(
            op, "combine does: give its x of the rank's part as base, its ids less vocab_start"
        )
    if not isinstance(shard, Shard):
        raise TypeError(f"{op}: shard must be a Shard, got {type(shard).__name__}")
    # An empty part's logits may have no column.
    width = checks.logits(op, base, expert, anti, dims, None) if shard.size else 0
    if width < shard.size:
        raise ValueError(
            f"{op}: base, expert and anti must have the shard's {shard.size} columns or more, "
            f"got {width}"
        )
    rows = operators.rows_of(op, base, params, *singles)
    checks.row_params(op, rows, base.shape[0], base.device)
    read = {"base": base, "expert": expert, "anti": anti, "params": rows, "bias": bias}
    checks.no_gradient(op, read)
    if shard.size:
        checks.constraints(op, base, bias, allowed_mask, None, shard.size)
    return rows


def _check_candidates(op: str, max_top_k: Any, num_candidates: Any) -> None:
    """Check how many candidates are exchanged."""
    for name, value, least in (("max_top_k", max_top_k, 0), ("num_candidates", num_candidates, 1)):
        if value is None and name == "max_top_k":
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= MAX_CANDIDATES:
            raise ValueError(
                f"{op}: {name} must be an integer in [{least}, {MAX_CANDIDATES}], got {value!r}"
            )


def _combined(
    shard: Shard, base: Tensor, expert: Tensor | None, anti: Tensor | None, alpha: Tensor,
    bias: Tensor | None = None, allowed_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """This rank's part of x: fp32 [B, n] of [B, n_role] or [B, T, n_role] logits, T rows each."""
    n, positions = shard.size, base.shape[1] if base.dim() == 3 else 1
    count = base.shape[0] * positions
    if n == 0:
        return base.new_empty((count, 0), dtype=torch.float32)
    roles = [None if t is None else t[..., :n].reshape(count, n) for t in (base, expert, anti)]
    flat_bias = None if bias is None else bias.reshape(count, n)
    flat_mask = None if allowed_mask is None else allowed_mask.reshape(count, -1)
    assert roles[0] is not None
    return operators.combine(
        roles[0], roles[1], roles[2], alpha.repeat_interleave(positions), bias=flat_bias,
        allowed_mask=flat_mask, backend=shard.backend,
    )  # fmt: skip


def _whole_rows(shard: Shard, x: Tensor) -> Tensor:
    """All ranks' parts of x side by side, [B, V]: what the reference draws from."""
    widest = max(shard.sizes)
    told = shard.gather(pad(x, (0, widest - x.shape[-1])))
    order = sorted(range(shard.world_size), key=lambda rank: shard.starts[rank])
    return torch.cat([told[rank, :, : shard.sizes[rank]] for rank in order], -1)


def verify(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    draft_token_ids: Tensor,
    params: Params = None,
    *,
    shard: Shard,
    alpha: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    filter_order: str | Tensor | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    mode: str = "coupled",
    draft_logits: Tensor | None = None,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    edits: None = None,
    max_top_k: int | None = None,
    num_candidates: int = NUM_CANDIDATES,
) -> VerifyOutput:
    """Check k drafted tokens per row where the logits are spread over ranks; a collective.

    Every rank gets what :func:`proxytune_kernels.verify` would give for the whole rows, as
    :func:`sample` does.

    Args:
        base, expert, anti: this rank's logits [B, k + 1, n_role], as in :func:`sample`.
        draft_token_ids: int64 [B, k], ids in the whole vocabulary, the same on every rank; -1 from
            where a row has no more drafts.
        params, alpha and the other single ones: as in :func:`sample`; ``position`` is that of the
            first drafted token.
        shard: this rank's part, from :meth:`Shard.agree`.
        mode: "coupled" or "rejection", as in :func:`proxytune_kernels.verify`.
        draft_logits: [B, k, n_draft], this rank's part of what the drafter drew from; rejection
            only.
        bias, allowed_mask: as in :func:`sample`, with a dimension k + 1 after the first.
        edits: refused, as there.
        max_top_k, num_candidates: as in :func:`sample`.

    Returns:
        :class:`VerifyOutput`; the same on every rank.

    Raises:
        As :func:`sample`.

    Source: docs/sharded.md; docs/contracts.md, Speculative verification.
    """
    op = "sharded.verify"
    requests = _prepared(
        op, shard, base, expert, anti, bias, allowed_mask, edits, params,
        alpha, temperature, top_k, top_p, min_p, filter_order, seed, position, dims=3,
    )  # fmt: skip
    _check_candidates(op, max_top_k, num_candidates)
    checks.drafts(op, base, draft_token_ids, draft_logits, mode, shard.size)
    x = _combined(shard, base, expert, anti, requests.alpha, bias, allowed_mask)
    draft_x = None
    if draft_logits is not None:
        draft_x = _combined(shard, draft_logits, None, None, requests.alpha)
    if shard.backend == "reference":
        size = shard.vocab_size
        whole = _whole_rows(shard, x).view(*base.shape[:2], size)
        whole_draft = None
        if draft_x is not None:
            whole_draft = _whole_rows(shard, draft_x).view(*draft_token_ids.shape, size)
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


def _emitted(drawn: Finished, num_accepted: Tensor) -> VerifyOutput:
    """Results [B, k + 1] up to the token after the accepted ones."""
    status = drawn.status
    used = torch.arange(status.shape[1], device=status.device) <= num_accepted[:, None]
    bits = [bit * ((status & bit != 0) & used).any(-1) for bit in _STATUS_BITS]
    return VerifyOutput(
        drawn.token_ids.masked_fill(~used, -1),
        num_accepted.int(),
        drawn.logprobs.masked_fill(~used, torch.nan),
        drawn.raw_logprobs.masked_fill(~used, torch.nan),
        torch.stack(bits).sum(0).int(),
    )


def _by_position(drawn: Finished, positions: int) -> Finished:
    return Finished(*(column.view(-1, positions) for column in drawn))


def _coupled(
    shard: Shard, x: Tensor, drafts: Tensor, requests: RowParams, candidates: Candidates
) -> VerifyOutput:
    """What plain decoding draws at each position, as far as the drafts agree with it."""
    positions = drafts.shape[1] + 1
    rows = _at_positions(requests, positions)
    drawn = _by_position(draw_rows(shard, x, rows, "sample", candidates)[0], positions)
    agrees = (drawn.token_ids[:, :-1] == drafts) & (drafts >= 0)
    return _emitted(drawn, agrees.int().cumprod(-1).sum(-1))


def _rejection(
    shard: Shard, x: Tensor, draft_x: Tensor, drafts: Tensor, requests: RowParams,
    candidates: Candidates,
) -> VerifyOutput:  # fmt: skip
    """Drafts as far as they are accepted, then a residual or a bonus token."""
    batch_size, k = drafts.shape
    rows, draft_rows = _at_positions(requests, k + 1), _at_positions(requests, k)
    wanted = pad(drafts, (0, 1), value=-1)
    # A request without drafts gets what plain decoding draws.
    undrafted = wanted[:, 0] < 0
    target, summaries = draw_rows(
        shard, x, rows, "bonus", candidates, wanted.flatten(), plain=undrafted
    )
    draft, draft_summaries = draw_rows(
        shard, draft_x, draft_rows, "draft", candidates, drafts.flatten()
    )
    # A draft's row that breaks the promise of max_top_k spoils its position.
    broken = pad(draft.undecided.view(batch_size, k), (0, 1)).flatten() != 0
    target = target._replace(
        token_ids=target.token_ids.masked_fill(broken, -1),
        logprobs=target.logprobs.masked_fill(broken, torch.nan),
        raw_logprobs=target.raw_logprobs.masked_fill(broken, torch.nan),
        status=target.status.masked_fill(broken, reference.STATUS_BAD_PARAMS),
    )
    grid = _by_position(target, k + 1)
    accept = shard.operator("shard_accept", x.device)
    num_accepted, steps = accept(
        grid.wanted_logprobs, grid.status, draft.wanted_logprobs.view(batch_size, k), drafts,
        requests.seed, requests.position,
    )  # fmt: skip
    residual = _residual(
        shard, x, draft_x, target, draft, summaries, draft_summaries, steps, requests, k
    )
    at = torch.arange(k + 1, device=x.device)
    recovered, accepted = at == steps[:, None], at < num_accepted[:, None]
    columns = {
        "token_ids": (residual.token_ids, wanted),
        "logprobs": (residual.logprobs, grid.wanted_logprobs),
        "raw_logprobs": (residual.raw_logprobs, grid.wanted_raw_logprobs),
    }
    emitted = {
        name: torch.where(
            accepted, own, torch.where(recovered, drawn[:, None], getattr(grid, name))
        )
        for name, (drawn, own) in columns.items()
    }
    return _emitted(grid._replace(**emitted), num_accepted)


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
    kept = (target.cut, target.num_kept.long(), target.kept_mass, target.raw_mass)
    kept_rows = torch.stack(kept, -1)[row]
    rows = requests._replace(position=requests.position + step)
    finish = shard.operator("shard_finish", x.device)
    at = summaries[:, row].contiguous()
    return Finished(*finish(at, shard.gather(own), None, *rows, kept_rows, rng.STREAMS["residual"]))
