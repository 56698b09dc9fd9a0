"""The options that say how a trio is decoded."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from proxytune_kernels.cli.errors import USAGE, expected
from proxytune_kernels.decoder import Speculation


class Speculate(StrEnum):
    """What drafts."""

    EXPERT = "expert"
    PROMPT_LOOKUP = "prompt-lookup"


class Pair(StrEnum):
    """How expert and anti-expert run."""

    SHARED = "shared"
    BATCHED = "batched"
    SEPARATE = "separate"


SpeculateOption = Annotated[
    Speculate | None,
    typer.Option(
        "--speculate",
        help="Draft tokens and verify them, where that is faster; seeded tokens stay the same.",
    ),
]
MaxDrafts = Annotated[int, typer.Option(help="With --speculate: drafts of a round at most.")]
PairOption = Annotated[
    Pair | None,
    typer.Option(
        "--pair", help="How expert and anti-expert run.", show_default="what is known to be fastest"
    ),
]
PackWeights = Annotated[
    bool,
    typer.Option("--pack-weights", help="On a CPU: bf16 weights once more, in a faster layout."),
]
PrefillChunk = Annotated[
    int, typer.Option(help="Prompt tokens run between two steps of the others, at most.")
]


def speculation(drafter: Speculate | None, max_drafts: int) -> Speculation | None:
    """How to draft; leaves with the reason where the options make no sense."""
    if drafter is None:
        return None
    with expected(ValueError, code=USAGE):
        return Speculation(drafter=drafter.value.replace("-", "_"), max_drafts=max_drafts)
