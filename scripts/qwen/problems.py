"""Arithmetic word problems in two steps, with worked answers that end in `#### N` (as in GSM8K)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = "Tom Ann Sam Eva Max Lily Ben Mia Leo Zoe Omar Nina Carl Ruth Ivan Dora".split()
THINGS = "pens apples books coins cards eggs shells stamps balls cups tickets cookies".split()
TRAINING_SEED = 1234
HELD_OUT_SEED = 4242


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution, and the number that answers it."""

    question: str
    solution: str
    answer: int

    @property
    def prompt(self) -> str:
        """What a model is given."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def completion(self) -> str:
        """What it should go on with, before the end-of-sequence token."""
        return f" {self.solution}\n#### {self.answer}"


def draw(rng: random.Random) -> Problem:
    """Draw one problem of the four kinds."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    kind = rng.choice((_give_away, _together, _sell, _share))
    return kind(rng, name, other, thing)


def training(count: int) -> list[Problem]:
    """The first `count` training problems."""
    rng = random.Random(TRAINING_SEED)
    return [draw(rng) for _ in range(count)]


def held_out(count: int, trained_on: Sequence[Problem], seed: int = HELD_OUT_SEED) -> list[Problem]:
    """`count` problems from another seed, none of whose questions is among `trained_on`."""
    rng = random.Random(seed)
    seen = {problem.question for problem in trained_on}
    fresh: list[Problem] = []
    while len(fresh) < count:
        problem = draw(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            fresh.append(problem)
    return fresh


def _give_away(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    boxes, each = rng.randint(11, 49), rng.randint(3, 19)
    bought = boxes * each
    given = rng.randint(5, min(200, bought - 1))
    left = bought - given
    return Problem(
        f"{name} buys {boxes} boxes of {thing} with {each} {thing} in each box, "
        f"then gives away {given} {thing}. How many {thing} does {name} have left?",
        f"{boxes} * {each} = {bought}. {bought} - {given} = {left}.",
        left,
    )


def _together(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    first, more = rng.randint(20, 480), rng.randint(11, 290)
    second = first + more
    total = first + second
    return Problem(
        f"{name} has {first} {thing}. {other} has {more} more {thing} than {name}. "
        f"How many {thing} do they have together?",
        f"{first} + {more} = {second}. {first} + {second} = {total}.",
        total,
    )


def _sell(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    daily, days, last = rng.randint(12, 95), rng.randint(3, 12), rng.randint(10, 150)
    before = daily * days
    total = before + last
    return Problem(
        f"A shop sells {daily} {thing} every day for {days} days and {last} {thing} "
        f"on the last day. How many {thing} does it sell in total?",
        f"{daily} * {days} = {before}. {before} + {last} = {total}.",
        total,
    )


def _share(rng: random.Random, name: str, other: str, thing: str) -> Problem:
    friends, each, had = rng.randint(3, 15), rng.randint(4, 45), rng.randint(3, 80)
    shared = friends * each
    total = each + had
    return Problem(
        f"{name} shares {shared} {thing} equally among {friends} friends. {other}, one of the "
        f"friends, already had {had} {thing}. How many {thing} does {other} have now?",
        f"{shared} / {friends} = {each}. {each} + {had} = {total}.",
        total,
    )
