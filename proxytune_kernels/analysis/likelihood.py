"""Log-likelihoods of given answers: at any strength, from one forward of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels import ops
from proxytune_kernels.decoder.model import Forward, input_device


@torch.inference_mode()
def answer_logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits [1, T, V] before each of the T tokens of an answer, of a causal LM of transformers.

    One forward over prompt and answer, with no other text beside it: what comes out does not depend
    on a batch.
    """
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=input_device(model))
    return Forward(model)(ids, keep=len(answer))


def all_answer_logits(
    models: Mapping[str, Any], prompts: Mapping[str, Sequence[int]], answer: Sequence[int]
) -> dict[str, Tensor]:
    """Role -> the same, all on one device; each role may have a prompt of its own."""
    found = {role: answer_logits(model, prompts[role], answer) for role, model in models.items()}
    device = next(iter(found.values())).device
    return {role: logits.to(device) for role, logits in found.items()}


def answer_logprobs(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    answer: Sequence[int],
    alpha: float,
    *,
    vocab_size: int,
    backend: str | None = None,
) -> Tensor:
    """Raw logprobs fp32 [T] of an answer's tokens under the combined logits, each [1, T, V].

    Without expert and anti they are those of one model alone.

    Raises:
        ValueError: a token that is past the shared vocabulary, which is never produced.
    """
    outside = [token_id for token_id in answer if token_id >= vocab_size]
    if outside:
        raise ValueError(
            f"an answer must have token ids below {vocab_size}, which all roles share, got "
            f"{outside[0]}"
        )
    ids = torch.tensor([list(answer)], device=base.device)
    found = ops.score(base, expert, anti, ids, alpha, vocab_size=vocab_size, backend=backend)
    return found[0]
