"""Before anything is timed: do the providers decode the same greedy tokens?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.providers import NaiveLoop, Prompts, Provider, combined
from proxytune_kernels import Trio


@dataclass(frozen=True)
class Mismatch:
    """Where a provider's greedy tokens first leave the naive loop's, for one prompt.

    ``gap`` is the naive loop's combined logit of its token less that of the provider's;
    ``rounding`` the largest gap that rounding explains (see :func:`_logits_with_rounding`).
    """

    provider: str
    prompt: int
    position: int
    expected: int
    got: int
    gap: float
    rounding: float

    @property
    def within_rounding(self) -> bool:
        """Whether the two tokens are a tie as far as the dtype can tell."""
        return self.gap <= self.rounding

    def __str__(self) -> str:
        verdict = "a tie within" if self.within_rounding else "more than"
        return (
            f"{self.provider}: prompt {self.prompt}, position {self.position}: token {self.got} "
            f"where naive has {self.expected}; logit gap {self.gap:.3g}, {verdict} rounding "
            f"({self.rounding:.3g})"
        )


def greedy_mismatches(
    providers: Sequence[Provider], trio: Trio, prompts: Prompts, max_tokens: int
) -> list[Mismatch]:
    """Compare every provider's greedy tokens with a naive loop over the same roles.

    Args:
        providers: of any roles; base-only is held to the base's own greedy tokens.
        trio: the models they decode.
        prompts: token ids, all of one length.
        max_tokens: tokens to decode of each.

    Returns:
        The first mismatch of each prompt of each provider. What follows one is not compared: the
        texts differ from there on.
    """
    found = []
    expected: dict[tuple[str, ...], list[list[int]]] = {}
    for provider in providers:
        naive = NaiveLoop(trio, provider.roles)
        if provider.roles not in expected:
            expected[provider.roles] = naive.generate(prompts, max_tokens, greedy=True).token_ids
        got = provider.generate(prompts, max_tokens, greedy=True).token_ids
        for row, (want, have) in enumerate(zip(expected[provider.roles], got, strict=True)):
            if want != have:
                found.append(_first_mismatch(provider.name, naive, prompts[row], row, want, have))
    return found


def _first_mismatch(
    name: str,
    naive: NaiveLoop,
    prompt: Sequence[int],
    row: int,
    want: Sequence[int],
    have: Sequence[int],
) -> Mismatch:
    if len(want) != len(have):
        raise RuntimeError(f"{name} gave {len(have)} tokens of prompt {row}, not {len(want)}")
    position = next(i for i, (a, b) in enumerate(zip(want, have, strict=True)) if a != b)
    logits, rounding = _logits_with_rounding(naive, prompt, want[:position])
    gap = float(logits[want[position]] - logits[have[position]])
    return Mismatch(name, row, position, want[position], have[position], gap, rounding)


@torch.inference_mode()
def _logits_with_rounding(
    naive: NaiveLoop, prompt: Sequence[int], generated: Sequence[int]
) -> tuple[Tensor, float]:
    """Combined logits [V] after the generated tokens, and the gap that rounding explains there.

    Two providers are two computations that are equal in exact arithmetic. How far such lie apart is
    seen in two of the naive loop's: the whole text in one forward, and token by token over a cache.
    Let d be the largest difference of a combined logit between those (or, where they happen to
    coincide, one ulp of the largest logit): two tokens can swap if their gap is at most 2 d.
    """
    whole, stepped, largest, eps = {}, {}, 0.0, 0.0
    for role, model in naive.models.items():
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([[*prompt, *generated]], device=naive.device)
        whole[role] = (
            model(input_ids=ids, use_cache=False).logits[0, -1, : naive.vocab_size].float()
        )
        output = model(input_ids=ids[:, : len(prompt)], past_key_values=cache, use_cache=True)
        for i in range(len(prompt), ids.shape[1]):
            output = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        stepped[role] = output.logits[0, -1, : naive.vocab_size].float()
        largest = max(largest, float(stepped[role].abs().max()))
        eps = max(eps, torch.finfo(output.logits.dtype).eps)
    logits = combined(stepped)
    seen = float((combined(whole) - logits).abs().max())
    return logits, 2 * max(seen, eps * largest)
