"""The operators on Triton: what writes the results of checked arguments, by launching kernels."""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.heads import Head
from proxytune_kernels.kernels import interpreted
from proxytune_kernels.ops.backends.backend import Implementation, from_writer
from proxytune_kernels.params import Edits, RowParams
from proxytune_kernels.reference import TopLogprobs, VerifyOutput

if interpreted():
    from proxytune_kernels.kernels import interpreter

    interpreter.correct()

from proxytune_kernels.kernels.attention import launch_decode_attention
from proxytune_kernels.kernels.attribution import launch_attribution
from proxytune_kernels.kernels.combine import launch_combine
from proxytune_kernels.kernels.common import inputs, packed
from proxytune_kernels.kernels.edits import edited
from proxytune_kernels.kernels.lora import launch_add_lora
from proxytune_kernels.kernels.sample import launch_sample
from proxytune_kernels.kernels.sample_hidden import launch_sample_hidden
from proxytune_kernels.kernels.score import launch_score
from proxytune_kernels.kernels.top_logprobs import launch_top_logprobs
from proxytune_kernels.kernels.verify import launch_coupled, launch_rejection
from proxytune_kernels.kernels.workspace import Outputs
from proxytune_kernels.ops.backends.triton_shards import SHARD_IMPLEMENTATIONS

Out = tuple[Tensor, ...]


def _aligned(tensors: Iterable[Tensor | None]) -> bool:
    return not any(t.data_ptr() % 16 for t in tensors if t is not None)


def _at_16_bytes(write: Implementation) -> Implementation:
    """Has parameters read, and results written, at multiples of 16 bytes: elsewhere in copies."""

    def run(*arguments: Any) -> None:
        *given, out = arguments
        for i, a in enumerate(given):
            if isinstance(a, RowParams) and not _aligned(a):
                given[i] = RowParams(*map(packed, a))
        if _aligned(out):
            return write(*given, out)
        copies = tuple(None if result is None else torch.empty_like(result) for result in out)
        write(*given, copies)
        for result, copy in zip(out, copies, strict=True):
            if result is not None:
                result.copy_(copy)

    return run


def _sample(
    base: Tensor, expert: Any, anti: Any, params: RowParams, bias: Any, allowed_mask: Any,
    edits: Edits | None, vocab_size: int, noise_stream: int, top_logprobs: int, attributed: Any,
    out: Out,
) -> None:  # fmt: skip
    *results, top_token_ids, top, attribution = out
    drawn = Outputs(*results)
    logits = edited(inputs(base, expert, anti, bias, allowed_mask), edits, vocab_size)
    tiles, workspace = launch_sample(logits, params, drawn, vocab_size, 1, noise_stream)
    if top_logprobs:
        likeliest = TopLogprobs(top_token_ids, top)
        launch_top_logprobs(logits, params, tiles, workspace, drawn, likeliest, vocab_size)
    if attributed is not None:
        ids = packed(attributed)
        launch_attribution(logits, params, workspace, drawn, ids, attribution, vocab_size)


def _sample_hidden(
    base: Head, expert: Head | None, anti: Head | None, params: RowParams, bias: Any,
    allowed_mask: Any, vocab_size: int, noise_stream: int, top_logprobs: int, out: Out,
) -> None:  # fmt: skip
    *results, top_token_ids, top, _ = out
    drawn = Outputs(*results)
    logits, tiles, workspace = launch_sample_hidden(
        (base, expert, anti), (bias, allowed_mask), params, drawn, vocab_size, noise_stream
    )
    if top_logprobs:
        likeliest = TopLogprobs(top_token_ids, top)
        launch_top_logprobs(logits, params, tiles, workspace, drawn, likeliest, vocab_size)


def _combine(
    base: Tensor, expert: Any, anti: Any, alpha: Tensor, bias: Any, allowed_mask: Any,
    edits: Edits | None, vocab_size: int, out: Out,
) -> None:  # fmt: skip
    logits = edited(inputs(base, expert, anti, bias, allowed_mask), edits, vocab_size)
    launch_combine(logits, packed(alpha), out[0], vocab_size)


def _score(
    base: Tensor, expert: Any, anti: Any, token_ids: Tensor, alpha: Tensor, vocab_size: int,
    out: Out,
) -> None:  # fmt: skip
    logits = inputs(base, expert, anti)
    launch_score(logits, packed(token_ids), packed(alpha), out[0], vocab_size)


def _verify(
    base: Tensor, expert: Any, anti: Any, draft_token_ids: Tensor, draft_logits: Any,
    params: RowParams, bias: Any, allowed_mask: Any, edits: Edits | None, vocab_size: int,
    mode: str, out: Out,
) -> None:  # fmt: skip
    logits = edited(inputs(base, expert, anti, bias, allowed_mask), edits, vocab_size)
    ids, verified = packed(draft_token_ids), VerifyOutput(*out)
    if mode == "coupled":
        launch_coupled(logits, ids, params, verified, vocab_size)
    else:
        launch_rejection(logits, ids, draft_logits, params, verified, vocab_size)


def _on_device(run: Implementation) -> Implementation:
    """Launches go to the current device: make it the tensors'."""

    @wraps(run)
    def guarded(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.device.type != "cuda":
            return run(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return run(first, *args, **kwargs)

    return guarded


@_on_device
def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, out: Tensor, *given: Any
) -> None:
    """Writes ``proxytune::decode_attention`` of checked arguments into ``out``."""
    launch_decode_attention(query, keys, values, seq_lens, out, *given)


@_on_device
def add_lora(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *given: Any) -> None:
    """Carries out ``proxytune::add_lora`` of checked arguments."""
    launch_add_lora(y, x, lora_A, lora_B, *given)


IMPLEMENTATIONS = {
    name: _on_device(run)
    for implementations in (
        from_writer("sample", _at_16_bytes(_sample)),
        from_writer("sample_hidden", _at_16_bytes(_sample_hidden)),
        from_writer("combine", _combine),
        from_writer("score", _at_16_bytes(_score)),
        from_writer("verify", _at_16_bytes(_verify)),
        SHARD_IMPLEMENTATIONS,
    )
    for name, run in implementations.items()
}
"""Every operator, and the twins, by name."""
