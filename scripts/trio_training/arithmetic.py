"""Plain arithmetic statements (for everybody's pretraining) and sums in words (for tuning only)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

OPERANDS = 10  # operands are 0 .. 9: models of this size do not learn to copy longer numbers
ADDITION_SHARE = 0.6

# Unordered operand pairs that no word problem used for tuning may hold. The plain statements of
# pretraining do hold them, so a model that answers them has carried its arithmetic over.
HELD_OUT_PAIRS = frozenset({(0, 7), (1, 9), (2, 5), (3, 4), (3, 8), (4, 6), (5, 9), (6, 8)})

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lily", "Ben", "Mia", "Leo", "Zoe")
OBJECTS = ("pens", "apples", "books", "coins", "cards", "eggs", "shells", "stamps", "balls", "cups")
ADDITIONS = (
    "{n} has {a} {o} and buys {b} more. How many {o} does {n} have now?",
    "There are {a} {o} on the table and {n} brings {b} more. How many {o} are there in total?",
    "{n} found {a} {o} in the morning and {b} {o} in the evening. How many {o} did {n} find?",
)
SUBTRACTIONS = (
    "{n} has {a} {o} and gives away {b}. How many {o} are left?",
    "{n} had {a} {o} but lost {b} of them. How many {o} does {n} have now?",
)
STATEMENTS = ("{a} {sign} {b} = {c}\n", "{a} {sign} {b} = {c}\n", "{a} {word} {b} is {c}.\n")

T = TypeVar("T")


def _below(rng: random.Random, bound: int) -> int:
    # Only `random()` is promised to give the same numbers in every Python version.
    return int(rng.random() * bound)


def _choice(rng: random.Random, options: Sequence[T]) -> T:
    return options[_below(rng, len(options))]


def _operands(rng: random.Random) -> tuple[int, int, bool]:
    a, b = _below(rng, OPERANDS), _below(rng, OPERANDS)
    addition = rng.random() < ADDITION_SHARE
    return (a, b, True) if addition else (max(a, b), min(a, b), False)


def is_held_out(a: int, b: int) -> bool:
    """Say whether a pair of operands, in either order, is kept out of the tuning data."""
    return (min(a, b), max(a, b)) in HELD_OUT_PAIRS


def statement(rng: random.Random) -> str:
    """Return one line such as `3 + 4 = 7` or `3 plus 4 is 7.`, of any pair of operands."""
    a, b, addition = _operands(rng)
    sign, word, c = ("+", "plus", a + b) if addition else ("-", "minus", a - b)
    return _choice(rng, STATEMENTS).format(a=a, b=b, c=c, sign=sign, word=word)


@dataclass(frozen=True)
class Problem:
    """A sum in words: what the model is given, what it should write, and the number that counts."""

    prompt: str
    answer: str
    value: int
    operands: tuple[int, int]


def problem(rng: random.Random, held_out: bool = False) -> Problem:
    """Return one word problem.

    Args:
        rng: source of randomness; equal states give equal problems.
        held_out: take the operands from `HELD_OUT_PAIRS` only, instead of never.
    """
    while True:
        a, b, addition = _operands(rng)
        if is_held_out(a, b) == held_out:
            break
    question = _choice(rng, ADDITIONS if addition else SUBTRACTIONS).format(
        n=_choice(rng, NAMES), o=_choice(rng, OBJECTS), a=a, b=b
    )
    sign, value = ("+", a + b) if addition else ("-", a - b)
    return Problem(
        prompt=f"Question: {question}\nAnswer:",
        answer=f" {a} {sign} {b} = {value}\n#### {value}",
        value=value,
        operands=(a, b),
    )


def problems(count: int, seed: int, held_out: bool = False) -> list[Problem]:
    """Return `count` word problems drawn with their own seed."""
    rng = random.Random(seed)
    return [problem(rng, held_out) for _ in range(count)]
