"""The contract in plain PyTorch (:mod:`proxytune_kernels.reference`): exact and slow, anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from proxytune_kernels import reference
from proxytune_kernels.heads import Head
from proxytune_kernels.ops.backends.backend import Backend, Implementation, from_function
from proxytune_kernels.params import Edits, RowParams
from proxytune_kernels.rng import STREAMS

_STREAM_NAMES = {number: name for name, number in STREAMS.items()}


class Reference(Backend):
    """Plain PyTorch."""

    name = "reference"

    @override
    def implementation(self, name: str, device: torch.device) -> Implementation:
        return _IMPLEMENTATIONS[name]


def combined(
    base: Tensor, expert: Tensor | None, anti: Tensor | None, alpha: Tensor, bias: Tensor | None,
    allowed_mask: Tensor | None, edits: Edits | None, vocab_size: int,
) -> Tensor:  # fmt: skip
    """Combined logits of [B, V] or [B, T, V] inputs, in the shape of base."""
    shape = (*base.shape[:-1], vocab_size)
    rows = [None if t is None else t[..., :vocab_size].reshape(-1, vocab_size)
            for t in (base, expert, anti, bias)]  # fmt: skip
    mask = None if allowed_mask is None else allowed_mask.reshape(-1, allowed_mask.shape[-1])
    if base.dim() == 3:
        alpha = alpha.repeat_interleave(base.shape[1])
        if edits is not None:
            penalties = edits.penalties.repeat_interleave(base.shape[1], 0)
            edits = Edits(edits.entries.flatten(0, 1), penalties)
    assert rows[0] is not None
    return reference.combine(rows[0], rows[1], rows[2], alpha, rows[3], mask, edits).reshape(shape)


def _sample_x(
    x: Tensor, params: RowParams, noise_stream: int, top_logprobs: int
) -> tuple[Tensor, ...]:
    *drawn, top, _ = reference.sample(x, params, _STREAM_NAMES[noise_stream], top_logprobs)
    none = x.new_empty((len(x), 0))
    return (*drawn, *(top or (none.long(), none)), none)


def _sample(
    base: Tensor, expert: Any, anti: Any, params: RowParams, bias: Any, allowed_mask: Any,
    edits: Edits | None, vocab_size: int, noise_stream: int, top_logprobs: int,
    attributed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    x = combined(base, expert, anti, params.alpha, bias, allowed_mask, edits, vocab_size)
    *results, none = _sample_x(x, params, noise_stream, top_logprobs)
    if attributed is None:
        return (*results, none)
    rows: Any = [None if t is None else t[:, :vocab_size].float() for t in (base, expert, anti)]
    token_ids = torch.where(attributed < 0, results[0], attributed).masked_fill(results[0] < 0, -1)
    return (*results, *reference.attribute(rows[0], rows[1], rows[2], params.alpha, x, token_ids))


def _sample_hidden(
    base: Head, expert: Head | None, anti: Head | None, params: RowParams, bias: Any,
    allowed_mask: Any, vocab_size: int, noise_stream: int, top_logprobs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    roles = [None if h is None else reference.logits(h, vocab_size) for h in (base, expert, anti)]
    assert roles[0] is not None
    x = reference.combine(roles[0], roles[1], roles[2], params.alpha, bias, allowed_mask)
    return _sample_x(x, params, noise_stream, top_logprobs)


def _combine(*arguments: Any) -> tuple[Tensor, ...]:
    return (combined(*arguments),)


def _score(
    base: Tensor, expert: Any, anti: Any, token_ids: Tensor, alpha: Tensor, vocab_size: int
) -> tuple[Tensor, ...]:
    x = combined(base, expert, anti, alpha, None, None, None, vocab_size)
    return (reference.score(x, token_ids),)


def _verify(
    base: Tensor, expert: Any, anti: Any, draft_token_ids: Tensor, draft_logits: Tensor | None,
    params: RowParams, bias: Any, allowed_mask: Any, edits: Edits | None, vocab_size: int,
    mode: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    x = combined(base, expert, anti, params.alpha, bias, allowed_mask, edits, vocab_size)
    draft_x = None if draft_logits is None else draft_logits[..., :vocab_size].float()
    return reference.verify(x, draft_token_ids, params, mode, draft_x)


_IMPLEMENTATIONS = {
    name: run
    for implementations in (
        from_function("sample", _sample),
        from_function("sample_hidden", _sample_hidden),
        from_function("combine", _combine),
        from_function("score", _score),
        from_function("verify", _verify),
    )
    for name, run in implementations.items()
}
