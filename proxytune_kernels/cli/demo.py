"""``proxytune demo``: the shipped trio on its task, base alone and proxy-tuned side by side."""

from __future__ import annotations

import re

import typer

from proxytune_kernels.cli.options import TrioOptions, open_decoder
from proxytune_kernels.cli.output import CliRequest, side_by_side
from proxytune_kernels.params import SamplingParams

# Sums in words, with their answers. The first two pairs of numbers are in nothing that the expert
# was tuned on (docs/trio.md).
PROBLEMS = (
    ("Tom has 3 pens and buys 4 more. How many pens does Tom have now?", 7),
    ("Leo had 9 coins but lost 5 of them. How many coins does Leo have now?", 4),
    ("Eva found 6 cups in the morning and 2 cups in the evening. How many cups did Eva find?", 8),
    ("Mia has 7 books and gives away 1. How many books are left?", 6),
)
MAX_TOKENS = 32
_ANSWER = re.compile(r"####\s*(\d+)")


def demo() -> None:
    """Continue four prompts with the shipped trio, the base alone beside the proxy-tuned."""
    trio = TrioOptions("shipped", dtype="float32").open()
    base = open_decoder(trio, len(PROBLEMS), roles=("base",))
    tuned = open_decoder(trio, len(PROBLEMS))
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    requests = [CliRequest(f"Question: {text}\nAnswer:", params) for text, _ in PROBLEMS]
    texts = side_by_side(base, tuned, requests)
    right = [
        sum(
            _is_right(pair[column], answer)
            for pair, (_, answer) in zip(texts, PROBLEMS, strict=True)
        )
        for column in (0, 1)
    ]
    typer.echo(
        f"Greedy decoding of {len(PROBLEMS)} sums in words: the base alone answers {right[0]}, "
        f"steered by the small pair (no weight of it touched) {right[1]}. "
        "Next: `proxytune generate --help`, `proxytune info --trio shipped`."
    )


def _is_right(text: str, answer: int) -> bool:
    """Whether the first number after ``####`` is the answer."""
    match = _ANSWER.search(text)
    return match is not None and int(match[1]) == answer
