"""What an output is worth: scores of generated texts, and of given ones by their likelihood.

A scorer is named on the command line as ``regex:PATTERN``, ``MODULE:FUNCTION``, ``likelihood`` or
``choice``; :func:`scorer_of` makes it.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""What a line of a file of prompts holds: a prompt, and what its scorers read."""


class Likelihood(NamedTuple):
    """Of a given text: the sum of its tokens' raw logprobs, and how many they are."""

    logprob: float
    tokens: int


@dataclass(frozen=True)
class TextScorer:
    """Scores what is generated.

    Args:
        name: for tables.
        score: (text, row) -> score.
    """

    name: str
    score: Callable[[str, Row], float]

    def __call__(self, text: str, row: Row) -> float:
        """The score of a row's output.

        Raises:
            ValueError: it is no finite number, or making it fails.
        """
        return _number(self.name, self.score, text, row)


@dataclass(frozen=True)
class GivenScorer:
    """Scores texts that a row gives, by how likely they are.

    Args:
        name: for tables.
        texts: row -> its texts.
        score: (their likelihoods, row) -> score.
    """

    name: str
    texts: Callable[[Row], Sequence[str]]
    score: Callable[[Sequence[Likelihood], Row], float]

    def __call__(self, likelihoods: Sequence[Likelihood], row: Row) -> float:
        """The score of a row.

        Raises:
            ValueError: it is no finite number, or making it fails.
        """
        return _number(self.name, self.score, likelihoods, row)


Scorer = TextScorer | GivenScorer


def exact_match(pattern: str, key: str = "answer") -> TextScorer:
    r"""1 where the first match of a regular expression is the row's answer, else 0.

    Args:
        pattern: its first group, or all of it where it has none, is compared as text.
        key: of the answer in the row, a text or a number.

    Example:
        >>> exact_match(r"####\s*(-?\d+)")("3 + 4 = 7\n#### 7", {"answer": 7})
        1.0
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex must be a regular expression, got {pattern!r}: {error}") from error

    def score(text: str, row: Row) -> float:
        found = compiled.search(text)
        wanted = str(_value(row, key)).strip()
        return float(found is not None and (found[min(1, compiled.groups)] or "").strip() == wanted)

    return TextScorer(f"regex:{pattern}", score)


def likelihood(key: str = "completion") -> GivenScorer:
    """The mean logprob of a token of the row's completion, in nats."""
    return GivenScorer(
        "likelihood",
        lambda row: [_text(row, key)],
        lambda found, row: found[0].logprob / found[0].tokens,
    )


def choice(key: str = "answer") -> GivenScorer:
    """1 where the likeliest of the row's choices is its answer (an index or a choice), else 0."""

    def texts(row: Row) -> list[str]:
        given = _value(row, "choices")
        if not isinstance(given, list) or len(given) < 2:
            raise ValueError(f"choices must be a list of two texts or more, got {given!r:.80}")
        return [_text({"choices": each}, "choices") for each in given]

    def score(found: Sequence[Likelihood], row: Row) -> float:
        answer = _value(row, key)
        choices = texts(row)
        right = answer if isinstance(answer, int) else choices.index(answer)
        if not 0 <= right < len(choices):
            raise ValueError(f"{key} must be the index of one of {len(choices)}, got {answer}")
        return float(max(range(len(found)), key=lambda i: found[i].logprob) == right)

    return GivenScorer("choice", texts, score)


def scorer_of(text: str) -> Scorer:
    r"""The scorer that a text names.

    Args:
        text: ``regex:PATTERN`` (:func:`exact_match`), ``likelihood``, ``choice``, or
            ``MODULE:FUNCTION``, a function of a text and a row.

    Raises:
        ValueError: it names none.

    Example:
        >>> scorer_of(r"regex:(\d+)")("7", {"answer": "7"})
        1.0
    """
    kind, colon, rest = text.partition(":")
    if not colon and kind in ("likelihood", "choice"):
        return likelihood() if kind == "likelihood" else choice()
    if not (colon and rest):
        raise ValueError(
            f"a scorer must be regex:PATTERN, MODULE:FUNCTION, likelihood or choice, got {text!r}"
        )
    if kind == "regex":
        return exact_match(rest)
    try:
        function = getattr(importlib.import_module(kind), rest)
    # A module of the user's can raise anything.
    except Exception as error:
        raise ValueError(
            f"a scorer must be a function in a module that can be imported, got {text!r}: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"a scorer must be a function, got {text!r}, {type(function).__name__}")
    return TextScorer(text, function)


def _number(name: str, score: Callable[..., Any], *arguments: Any) -> float:
    try:
        found = score(*arguments)
        value = float(found)
    # A function of the user's can raise anything.
    except Exception as error:
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise ValueError(f"{name} must give a finite number, got {found!r:.80}")
    return value


def _value(row: Row, key: str) -> Any:
    if key not in row:
        raise ValueError(f"a row must have {key!r}, got {', '.join(map(repr, row))}")
    return row[key]


def _text(row: Row, key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a text that is not empty, got {value!r:.80}")
    return value
