"""Scores from one alpha to the next: curves, the alpha they suggest, and trade-offs of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from proxytune_kernels.analysis.intervals import Interval, bootstrap
from proxytune_kernels.analysis.likelihood import all_answer_logits, answer_logprobs
from proxytune_kernels.analysis.scorers import Likelihood
from proxytune_kernels.decoder import Decoder
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio


class Point(NamedTuple):
    """What one strength is worth."""

    alpha: float
    score: Interval
    behind: Interval
    """How far the score is behind the best one's, prompt by prompt."""


@dataclass(frozen=True)
class Curve:
    """The scores of one scorer.

    Args:
        name: the scorer's.
        alphas: strengths, each once, the lowest first.
        scores: [A, N], one for each alpha and prompt; higher is better.
    """

    name: str
    alphas: tuple[float, ...]
    scores: np.ndarray

    @cached_property
    def best(self) -> float:
        """The alpha of the highest mean, the lowest of several."""
        return self.alphas[self._best]

    @property
    def _best(self) -> int:
        return int(np.argmax(self.scores.mean(1)))

    @cached_property
    def points(self) -> list[Point]:
        """Each alpha's score, and how far it is behind the best one's.

        Prompts are drawn together for both, so that an interval is one of the difference.
        """
        best = self.scores[self._best]
        return [
            Point(alpha, bootstrap(own), bootstrap(best, own, statistic=_difference))
            for alpha, own in zip(self.alphas, self.scores, strict=True)
        ]

    @cached_property
    def suggested(self) -> float:
        """The lowest alpha whose interval of the difference from the best one holds 0.

        So the weakest steering that these prompts can't tell from the best. The interval of each
        alpha is its own: with many of them one may hold 0 by chance.
        """
        return next(
            point.alpha
            for point in self.points
            if point.alpha == self.best or point.behind.low <= 0
        )


def _difference(best: np.ndarray, own: np.ndarray, axis: int = -1) -> np.ndarray:
    difference: np.ndarray = (best - own).mean(axis)
    return difference


def undominated(one: Curve, other: Curve) -> list[float]:
    """The alphas to choose among where two scores count: none is as good in both and better in one.

    The curves have the same alphas.
    """
    pairs = list(zip(one.scores.mean(1), other.scores.mean(1), strict=True))
    return [
        alpha
        for alpha, (a, b) in zip(one.alphas, pairs, strict=True)
        if not any(x >= a and y >= b and (x > a or y > b) for x, y in pairs)
    ]


def generate_texts(
    decoder: Decoder,
    prompts: Sequence[Any],
    alphas: Sequence[float],
    params: SamplingParams,
    advance: Callable[[], None] = lambda: None,
) -> list[list[str]]:
    """The output of each prompt at each strength [A][N], all in one run of the decoder.

    Args:
        decoder: of a whole trio.
        prompts: as :meth:`Decoder.generate` takes them.
        alphas: strengths.
        params: of all; with a seed, one prompt has the same noise at each strength.
        advance: is told of each output.
    """
    each = [(i, a) for i in range(len(prompts)) for a in range(len(alphas))]
    texts = [[""] * len(prompts) for _ in alphas]
    events = decoder.stream(
        [prompts[i] for i, _ in each], [replace(params, alpha=alphas[a]) for _, a in each]
    )
    for event in events:
        if event.output is not None:
            i, a = each[event.index]
            texts[a][i] = event.output.text
            advance()
    return texts


def likelihoods(
    trio: Trio, prompt: Any, texts: Sequence[str], alphas: Sequence[float]
) -> list[list[Likelihood]]:
    """How likely given texts are behind a prompt at each strength [A][texts].

    Each text is one forward of each role, whatever the number of strengths.

    Raises:
        ValueError, TypeError: the prompt or a text can't be scored.
    """
    prompts = trio.tokenize(prompt)
    found: list[list[Likelihood]] = [[] for _ in alphas]
    for text in texts:
        ids = trio.tokenizer.encode(text, add_special_tokens=False)
        logits = all_answer_logits(trio.models, prompts, ids)
        three = (logits["base"], logits.get("expert"), logits.get("anti"))
        for own, alpha in zip(found, alphas, strict=True):
            logprobs = answer_logprobs(*three, ids, alpha, vocab_size=trio.vocab_size)
            own.append(Likelihood(math.fsum(logprobs.tolist()), len(ids)))
    return found


def prompt_of(row: Mapping[str, Any]) -> Any:
    """The prompt of a row: its ``prompt``, or its ``messages`` before the assistant's last.

    Raises:
        ValueError: it has neither.
    """
    if "prompt" in row:
        return row["prompt"]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a row must have prompt or messages, got {', '.join(map(repr, row))}")
    last = messages[-1]
    answered = isinstance(last, Mapping) and last.get("role") == "assistant"
    return messages[:-1] if answered else messages
