"""``sample`` over the ranks' parts of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from proxytune_kernels import reference, rng
from proxytune_kernels.ops import checks, operators
from proxytune_kernels.ops.sharded.rows import MAX_CANDIDATES, candidates_for, draw_rows
from proxytune_kernels.ops.sharded.shard import Shard
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.reference import SampleOutput

NUM_CANDIDATES = 128
"""Candidates that a rank sends where the host does not know how many are enough: 1 KiB a row."""


def sample(
    base: Tensor,
    expert: Tensor | None = None,
    anti: Tensor | None = None,
    params: RowParams | SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    shard: Shard,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    stream: str = "sample",
    max_top_k: int | None = None,
    num_candidates: int = NUM_CANDIDATES,
    **values: Any,
) -> SampleOutput:
    """Draw one token per row from logits that are spread over ranks; a collective.

    Every rank gives its part of the logits, and the same parameters; every rank gets the token, the
    size of the kept set and the status that :func:`proxytune_kernels.sample` would give for the
    whole rows, bit for bit, and on the CPU and reference backends its logprobs too.

    Args:
        base, expert, anti: this rank's logits [B, n_role], ``n_role >= shard.size``: column i is
            token ``shard.vocab_start + i``; otherwise as in :func:`proxytune_kernels.sample`.
        params: as there, the same on every rank.
        shard: this rank's part, from :meth:`Shard.agree`.
        bias: fp32 [B, shard.size].
        allowed_mask: int32 [B, ceil(shard.size / 32)]; bit 0 of word 0 is this rank's first token.
        stream: as there.
        max_top_k: a promise about all rows: that none has top_p or top_k, unless its top_k is in
            [1, max_top_k]; 0: none has either. Then nothing is read back from the device. A row
            that breaks it, and would need more candidates, has token -1 and status 8. None:
            parameters on the host are looked at; where they leave it open, or are on a device, one
            number is read back.
        num_candidates: likeliest tokens that each rank sends where top_p or parameters on a device
            leave open how many are needed, at most 4,096. Rows that need more take longer.
        values: in place of ``params``, as there.

    Returns:
        :class:`SampleOutput`, without ``top``; the same on every rank.

    Raises:
        ValueError, TypeError: names the argument, what it got and what it wanted.

    Example: see docs/sharded.md, which is its source.
    """
    op = "sharded.sample"
    rows = prepare(op, base, expert, anti, params, values, shard, bias, allowed_mask, 2)
    check_candidates(op, max_top_k, num_candidates)
    if stream not in rng.STREAMS:
        raise ValueError(f"{op}: stream must be one of {list(rng.STREAMS)}, got {stream!r}")
    x = combine(shard, base, expert, anti, rows.alpha, bias, allowed_mask)
    if shard.backend == "reference":
        return reference.sample(whole_rows(shard, x), rows, stream)
    given = params if params is not None else rows
    candidates = candidates_for(given, rows, shard.vocab_size, max_top_k, num_candidates)
    out, _ = draw_rows(shard, x, rows, rng.STREAMS[stream], candidates)
    return SampleOutput(*out[:5])


def prepare(
    op: str, base: Any, expert: Any, anti: Any, params: Any, values: dict[str, Any], shard: Any,
    bias: Any, allowed_mask: Any, dims: int,
) -> RowParams:  # fmt: skip
    """Check the arguments; the parameters as tensors, one value per request."""
    if not isinstance(shard, Shard):
        raise TypeError(f"{op}: shard must be a Shard, got {type(shard).__name__}")
    # An empty part's logits may have no column.
    width = checks.logits(op, base, expert, anti, dims, None) if shard.size else 0
    if width < shard.size:
        raise ValueError(
            f"{op}: base, expert and anti must have the shard's {shard.size} columns or more, "
            f"got {width}"
        )
    checks.params(op, params, values)
    listed = isinstance(params, Sequence) and not isinstance(params, RowParams)
    if listed and len(params) != base.shape[0]:
        raise ValueError(
            f"{op}: params must have one entry per row ({base.shape[0]}), got {len(params)}"
        )
    rows = operators._row_params(base, params, values)
    checks.row_params(op, rows, base)
    if shard.size:
        checks.constraints(op, base, bias, allowed_mask, shard.size)
    return rows


def check_candidates(op: str, max_top_k: Any, num_candidates: Any) -> None:
    """Check how many candidates are exchanged."""
    for name, value, least in (("max_top_k", max_top_k, 0), ("num_candidates", num_candidates, 1)):
        if value is None and name == "max_top_k":
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= MAX_CANDIDATES:
            raise ValueError(
                f"{op}: {name} must be an integer in [{least}, {MAX_CANDIDATES}], got {value!r}"
            )


def combine(
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


def whole_rows(shard: Shard, x: Tensor) -> Tensor:
    """All ranks' parts of x side by side, [B, V]: what the reference draws from."""
    widest = max(shard.sizes)
    told = shard.gather(pad(x, (0, widest - x.shape[-1])))
    order = sorted(range(shard.world_size), key=lambda rank: shard.starts[rank])
    return torch.cat([told[rank, :, : shard.sizes[rank]] for rank in order], -1)
