"""What tuning was worth: the loss of answers that were not trained on, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from proxytune_kernels.analysis.intervals import Interval, bootstrap
from proxytune_kernels.analysis.likelihood import (
    all_answer_logits,
    answer_logits,
    answer_logprobs,
)
from proxytune_kernels.trio import Trio
from proxytune_kernels.tuning.data import Example

ALPHAS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class HeldOut:
    """Losses of one distribution.

    Args:
        name: base, anti, expert, or the proxy with its alpha.
        sums: of each example, over its answer, in nats.
        tokens: of each answer.
    """

    name: str
    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def loss(self) -> Interval:
        """Nats per answer token, with an interval over examples."""
        return bootstrap(self.sums, self.tokens, statistic=_ratio)


def _ratio(sums: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    ratio: np.ndarray = sums.sum(axis) / tokens.sum(axis)
    return ratio


def expert_loss(model: Any, examples: Sequence[Example], vocab_size: int) -> float:
    """The loss of an expert in memory, in nats per answer token."""
    sums = []
    for example in examples:
        logits = answer_logits(model, example.prompts["expert"], example.answer)
        alone = (logits, None, None, example.answer, 0.0)
        sums.append(_sum(answer_logprobs(*alone, vocab_size=vocab_size)))
    return sum(sums) / sum(len(example.answer) for example in examples)


def _sum(logprobs: Tensor) -> float:
    return -math.fsum(logprobs.tolist())


def held_out_losses(
    trio: Trio,
    examples: Sequence[Example],
    alphas: Sequence[float] = ALPHAS,
    advance: Callable[[], None] = lambda: None,
) -> list[HeldOut]:
    """Losses of base, anti and expert alone, and of the proxy at some strengths.

    Args:
        trio: with all roles.
        examples: what is measured on.
        alphas: strengths; all share the forwards.
        advance: is told of each example.
    """
    sums: dict[str, list[float]] = {}
    for example in examples:
        logits = all_answer_logits(trio.models, example.prompts, example.answer)
        for name, logprobs in _each(logits, example.answer, alphas, trio.vocab_size):
            sums.setdefault(name, []).append(_sum(logprobs))
        advance()
    tokens = tuple(len(example.answer) for example in examples)
    return [HeldOut(name, tuple(own), tokens) for name, own in sums.items()]


def _each(
    logits: dict[str, Tensor], answer: Sequence[int], alphas: Sequence[float], vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    for role in ("base", "anti", "expert"):
        alone = (logits[role], None, None, answer, 0.0)
        yield role, answer_logprobs(*alone, vocab_size=vocab_size)
    trio = (logits["base"], logits["expert"], logits["anti"], answer)
    for alpha in alphas:
        yield f"proxy, alpha {alpha:g}", answer_logprobs(*trio, alpha, vocab_size=vocab_size)
