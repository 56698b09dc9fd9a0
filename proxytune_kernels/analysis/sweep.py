"""Scores from one alpha to the next: curves, the alpha they suggest, and trade-offs of two."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from proxytune_kernels.analysis.intervals import Interval, bootstrap
from proxytune_kernels.analysis.likelihood import all_answer_logits, answer_logprobs
from proxytune_kernels.analysis.scorers import Likelihood, Row, Scorer, TextScorer
from proxytune_kernels.decoder import Decoder
from proxytune_kernels.decoder.arguments import check_pair_alphas
from proxytune_kernels.ops import combine
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.roles import PAIR, kind_of

T = TypeVar("T")
Advance = Callable[[], None]


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
        scores: [A][N], one for each alpha and prompt; higher is better.
    """

    name: str
    alphas: tuple[float, ...]
    scores: Sequence[Sequence[float]]

    @cached_property
    def best(self) -> float:
        """The alpha of the highest mean, the lowest of several."""
        return self.alphas[self._best]

    @property
    def _best(self) -> int:
        return int(np.argmax(np.mean(self.scores, axis=1)))

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
    means = (np.mean(curve.scores, axis=1) for curve in (one, other))
    pairs = list(zip(*means, strict=True))
    return [
        alpha
        for alpha, (a, b) in zip(one.alphas, pairs, strict=True)
        if not any(x >= a and y >= b and (x > a or y > b) for x, y in pairs)
    ]


def at_strength(params: SamplingParams, alpha: float, pair: int = 0) -> SamplingParams:
    """The same with another strength of one pair: 0 is the first, 1 the first of the further."""
    if pair == 0:
        return replace(params, alpha=alpha)
    further = list(params.pair_alphas)
    if pair > len(further):
        raise ValueError(f"pair must be at most {len(further)}, as pair_alphas has it, got {pair}")
    further[pair - 1] = alpha
    return replace(params, pair_alphas=further)


def generate_texts(
    decoder: Decoder,
    prompts: Sequence[Any],
    alphas: Sequence[float],
    params: SamplingParams,
    advance: Advance = lambda: None,
    pair: int = 0,
) -> list[list[str]]:
    """The output of each prompt at each strength [A][N], all in one run of the decoder.

    Args:
        decoder: of a whole trio.
        prompts: as :meth:`Decoder.generate` takes them.
        alphas: strengths.
        params: of all; with a seed, one prompt has the same noise at each strength.
        advance: is told of each output.
        pair: whose strengths they are; see :func:`at_strength`.
    """
    each = [(i, a) for i in range(len(prompts)) for a in range(len(alphas))]
    texts = [[""] * len(prompts) for _ in alphas]
    events = decoder.stream(
        [prompts[i] for i, _ in each], [at_strength(params, alphas[a], pair) for _, a in each]
    )
    for event in events:
        if event.output is not None:
            i, a = each[event.index]
            texts[a][i] = event.output.text
            advance()
    return texts


def likelihoods(
    trio: Trio, prompt: Any, texts: Sequence[str], alphas: Sequence[float],
    fixed: Sequence[float] = (), pair: int = 0,
) -> list[list[Likelihood]]:  # fmt: skip
    """How likely given texts are behind a prompt at each strength [A][texts].

    Each text is one forward of each role, whatever the number of strengths.

    Args:
        trio: the models.
        prompt: as the decoder takes it.
        texts: what is scored.
        alphas: strengths.
        fixed: of every pair, where there are further ones; that of ``pair`` is not read.
        pair: whose strengths ``alphas`` are; see :func:`at_strength`.

    Raises:
        ValueError, TypeError: the prompt or a text can't be scored.
    """
    contexts = trio.tokenize(prompt)
    prompts = {role: contexts[kind_of(role)] for role in trio.members}
    pairs = [PAIR, *trio.pairs]
    found: list[list[Likelihood]] = [[] for _ in alphas]
    for text in texts:
        ids = trio.tokenizer.encode(text, add_special_tokens=False)
        logits = all_answer_logits(trio.members, prompts, ids)
        base = logits["base"]
        for i, (roles, alpha) in enumerate(zip(pairs, fixed, strict=False)):
            if i != pair and alpha:
                ours, theirs = (logits[role][0] for role in roles)
                base = combine(base[0], ours, theirs, alpha, vocab_size=trio.vocab_size)[None]
        expert, anti = (logits.get(role) for role in pairs[pair])
        for own, alpha in zip(found, alphas, strict=True):
            logprobs = answer_logprobs(base, expert, anti, ids, alpha, vocab_size=trio.vocab_size)
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


class Sheet:
    """The rows of a file, and at each alpha what was generated for them and what it scored.

    Args:
        file: for messages.
        rows: line numbers and what they hold.
        alphas: strengths, the lowest first.
        trio: the models.
        params: of what is generated, and the strengths of the other pairs.
        pair: whose strengths ``alphas`` are; see :func:`at_strength`.

    Raises:
        ValueError: strengths of other pairs than the trio has.
    """

    def __init__(
        self, file: str, rows: Sequence[tuple[int, Row]], alphas: Sequence[float], trio: Trio,
        params: SamplingParams, pair: int = 0,
    ) -> None:  # fmt: skip
        check_pair_alphas(trio, params)
        self._file, self._rows, self._alphas, self._trio = file, rows, alphas, trio
        self._params, self._pair = params, pair
        self._texts: list[list[str]] = []
        self._curves: list[Curve] = []

    def generate(self, decoder: Decoder, advance: Advance = lambda: None) -> None:
        """Continue every prompt at every alpha; ``advance`` is told of each output."""
        prompts = [self._at(line, prompt_of, row) for line, row in self._rows]
        self._texts = generate_texts(
            decoder, prompts, self._alphas, self._params, advance, self._pair
        )

    def curve(self, scorer: Scorer, advance: Advance = lambda: None) -> Curve:
        """The scores of what was generated, or of the texts that the rows give.

        Raises:
            ValueError: names the line whose row can't be scored, and why.
        """
        scores = []
        for i, (line, row) in enumerate(self._rows):
            scores.append(self._at(line, self._scores, i, scorer, row))
            advance()
        by_alpha = list(map(list, zip(*scores, strict=True)))
        curve = Curve(scorer.name, tuple(self._alphas), by_alpha)
        self._curves.append(curve)
        return curve

    def _scores(self, i: int, scorer: Scorer, row: Row) -> list[float]:
        if isinstance(scorer, TextScorer):
            return [scorer(texts[i], row) for texts in self._texts]
        fixed = (*self._params.alphas, *self._params.pair_alphas)
        each = likelihoods(
            self._trio, prompt_of(row), scorer.texts(row), self._alphas, fixed, self._pair
        )
        return [scorer(own, row) for own in each]

    def _at(self, line: int, call: Callable[..., T], *arguments: Any) -> T:
        """What a call gives; what it raises says which line it was for."""
        try:
            return call(*arguments)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._file}, line {line}: {error}") from error

    def write(self, path: Path) -> None:
        """Write every row's text and scores, a line for each row and alpha."""
        with path.open("w", encoding="utf-8") as file:
            for i, (line, _) in enumerate(self._rows):
                for a, alpha in enumerate(self._alphas):
                    text = {"text": self._texts[a][i]} if self._texts else {}
                    scores = {curve.name: curve.scores[a][i] for curve in self._curves}
                    record = {"line": line, "alpha": alpha, **text, "scores": scores}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
