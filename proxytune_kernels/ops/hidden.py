"""``sample_hidden``: from final hidden states to the token, without [B, V] logits of the roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels import reference, rng
from proxytune_kernels.heads import Head
from proxytune_kernels.ops import (
    checks,
    cpu_heads,  # noqa: F401  (implements the operator on the CPU)
    head_checks,
)
from proxytune_kernels.ops.backends import resolve
from proxytune_kernels.ops.operators import _implementation, _into, _row_params
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.reference import SampleOutput, TopLogprobs

_OP = "sample_hidden"
_ABSENT = (None,) * len(Head._fields)


@torch.no_grad()
def sample_hidden(
    base: Head,
    expert: Head | None = None,
    anti: Head | None = None,
    params: RowParams | SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    vocab_size: int | None = None,
    stream: str = "sample",
    top_logprobs: int = 0,
    backend: str | None = None,
    out: SampleOutput | None = None,
    **values: Any,
) -> SampleOutput:
    """Draw one token per row from hidden states and lm_head weights: heads and ``sample`` in one.

    The heads' products are accumulated and combined in fp32; the roles' logits are never written.
    docs/heads.md says where this is faster than three heads and ``sample``, and where it is not.

    Args:
        base, expert, anti: :class:`proxytune_kernels.Head` of each role; ``hidden`` [B, H_role] and
            ``weight`` [V_role, H_role] are of one dtype, any row stride, last dimension
            contiguous. Without expert and anti: base alone.
        vocab_size: agreed width; weights past it are never read. The narrowest role's unless told.
        params, bias, allowed_mask, stream, top_logprobs, backend, out, values: as in
            :func:`proxytune_kernels.sample`.

    Returns:
        As :func:`proxytune_kernels.sample` of the combined logits x; x itself is right to the
        bound of docs/heads.md, and may differ from another backend's within it.

    Raises:
        As :func:`proxytune_kernels.sample`.

    Example:
        >>> hidden, weight = torch.randn(2, 64), torch.randn(1000, 64)
        >>> sample_hidden(Head(hidden, weight), top_p=0.9, seed=7).token_ids.shape
        torch.Size([2])

    Source: docs/heads.md; docs/contracts.md.
    """
    width = head_checks.heads(_OP, base, expert, anti, vocab_size)
    checks.top_logprobs(top_logprobs, _OP)
    checks.params(_OP, params, values)
    if stream not in rng.STREAMS:
        raise ValueError(f"{_OP}: stream must be one of {list(rng.STREAMS)}, got {stream!r}")
    rows = len(base.hidden)
    if isinstance(params, Sequence) and not isinstance(params, RowParams) and len(params) != rows:
        raise ValueError(f"{_OP}: params must have one entry per row ({rows}), got {len(params)}")
    row_params = _row_params(base.hidden, params, values)
    checks.sample_out(out, base.hidden, top_logprobs, _OP)
    resolved = resolve(backend, base.hidden, _OP, width)
    if resolved == "reference":
        checks.row_params(_OP, row_params, base.hidden)
        checks.constraints(_OP, base.hidden, bias, allowed_mask, width)
        logits = [None if h is None else reference.logits(h, width) for h in (base, expert, anti)]
        assert logits[0] is not None
        x = reference.combine(logits[0], logits[1], logits[2], row_params.alpha, bias, allowed_mask)
        return _into(out, reference.sample(x, row_params, stream, top_logprobs))
    heads = (*base, *(expert or _ABSENT), *(anti or _ABSENT))
    arguments = (*heads, *row_params, bias, allowed_mask, width, rng.STREAMS[stream], top_logprobs)
    if out is None:
        results = _implementation(resolved, base.hidden, _OP)(*arguments)
        drawn = SampleOutput(*results[:5])
        return drawn._replace(top=TopLogprobs(*results[5:])) if top_logprobs else drawn
    none = (rows, 0)
    top = (out.top if top_logprobs else None) or TopLogprobs(
        out.token_ids.new_empty(none), out.logprobs.new_empty(none)
    )
    _implementation(resolved, base.hidden, f"{_OP}_out")(
        *arguments, out_token_ids=out.token_ids, out_logprobs=out.logprobs,
        out_raw_logprobs=out.raw_logprobs, out_num_kept=out.num_kept, out_status=out.status,
        out_top_token_ids=top.token_ids, out_top_logprobs=top.logprobs,
    )  # fmt: skip
    return out
