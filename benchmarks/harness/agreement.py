"""Do two ways to decode give the same tokens, and where not, is it a tie within rounding?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import typer

from benchmarks.harness.decoding import NaiveLoop, Prompts, Provider, combined
from benchmarks.harness.measure import no_tick
from benchmarks.harness.report import progress_bar, say
from benchmarks.harness.trios import make_prompts
from proxytune_kernels import Trio, rng

CHECKED_ROWS, CHECKED_PROMPT, CHECKED_TOKENS = 4, 12, 16
"""Prompts of :func:`check_greedy`, their length, and the tokens that are decoded of each."""
CHECKED_LENGTH = CHECKED_PROMPT + CHECKED_TOKENS


@dataclass(frozen=True)
class Mismatch:
    """Where tokens first leave those expected, for one prompt.

    ``gap`` is the expected token's score less the other's; ``rounding`` the largest gap, of either
    sign, that rounding explains. Greedy scores are combined logits; sampled ones are divided by the
    temperature, with the token's keyed noise added.
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
        return abs(self.gap) <= self.rounding

    def __str__(self) -> str:
        verdict = "a tie within" if self.within_rounding else "more than"
        return (
            f"{self.provider}: prompt {self.prompt}, position {self.position}: token {self.got} "
            f"in place of {self.expected}; score gap {self.gap:.3g}, {verdict} rounding "
            f"({self.rounding:.3g})"
        )


def find_mismatches(
    name: str,
    naive: NaiveLoop,
    prompts: Prompts,
    expected: Sequence[Sequence[int]],
    got: Sequence[Sequence[int]],
    temperature: float = 0.0,
) -> list[Mismatch]:
    """The first mismatch of each prompt; what follows is not compared, as the texts differ there.

    ``naive`` is of the models that were decoded. Row i was drawn with seed i, where the temperature
    is above 0.
    """
    found = []
    for row, (want, have) in enumerate(zip(expected, got, strict=True)):
        if len(want) != len(have):
            raise RuntimeError(f"{name} gave {len(have)} tokens of prompt {row}, not {len(want)}")
        if want != have:
            at = next(i for i, (a, b) in enumerate(zip(want, have, strict=True)) if a != b)
            gap, rounding = lead(naive, prompts[row], want, at, have[at], temperature, row)
            found.append(Mismatch(name, row, at, want[at], have[at], gap, rounding))
    return found


def greedy_mismatches(
    providers: Sequence[Provider],
    trio: Trio,
    prompts: Prompts,
    max_tokens: int,
    tick: Callable[[str], object] = no_tick,
) -> list[Mismatch]:
    """Hold every provider's greedy tokens to a naive loop's over the same roles.

    Prompts are token ids of one length.
    """
    found = []
    for provider in providers:
        tick(provider.name)
        naive = NaiveLoop(trio, provider.roles)
        expected, got = (
            p.generate(prompts, max_tokens, greedy=True).token_ids for p in (naive, provider)
        )
        found += find_mismatches(provider.name, naive, prompts, expected, got)
    return found


def check_greedy(providers: Sequence[Provider]) -> list[Mismatch]:
    """Compare greedy tokens before anything is timed; returns the ties within rounding.

    Each provider is held to a naive loop over the models that it decodes.

    Raises:
        typer.Exit: code 1, a provider decodes other tokens; each mismatch is printed.
    """
    mismatches = []
    with progress_bar(len(providers), "greedy tokens") as tick:
        for trio in {id(p.trio): p.trio for p in providers}.values():
            own = [provider for provider in providers if provider.trio is trio]
            prompts = make_prompts(trio, CHECKED_ROWS, CHECKED_PROMPT)
            mismatches += greedy_mismatches(
                own, trio, prompts, CHECKED_TOKENS, lambda name: tick(f"greedy tokens: {name}")
            )
    for mismatch in mismatches:
        say(str(mismatch), "yellow" if mismatch.within_rounding else "red")
    if not all(mismatch.within_rounding for mismatch in mismatches):
        say("Greedy tokens disagree: nothing is timed.", "red")
        raise typer.Exit(1)
    ties = f"; {len(mismatches)} ties within rounding" if mismatches else ""
    say(
        f"Greedy tokens agree: {CHECKED_ROWS} prompts x {CHECKED_TOKENS} tokens, "
        f"{', '.join(p.name for p in providers)}{ties}."
    )
    return mismatches


def lead(
    naive: NaiveLoop,
    prompt: Sequence[int],
    text: Sequence[int],
    position: int,
    other: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[float, float]:
    """By how much a text's token at a position leads another, and the gap that rounding explains.

    The naive loop computes the logits twice: in one forward, and token by token over a cache. Let d
    be the largest difference of a combined logit between the two (or, where they happen to
    coincide, one ulp of a role's largest logit): with logits as they are, two tokens can swap if
    their gap is at most 2 d, at a temperature T if it is at most 2 d / T.

    ``seed`` is the noise's, where the temperature is above 0.
    """
    parts = [list(prompt), *([token] for token in text[:position])]
    together = torch.tensor([[*prompt, *text[:position]]], device=naive.device)
    whole = naive.logits(together, naive.caches())
    caches = naive.caches()
    for part in parts:
        stepped = naive.logits(torch.tensor([part], device=naive.device), caches)
    seen = float((combined(whole) - combined(stepped)).abs().max())
    eps = {role: torch.finfo(model.dtype).eps for role, model in naive.models.items()}
    rounding = 2 * max(seen, *(eps[role] * float(x.abs().max()) for role, x in stepped.items()))
    tokens = torch.tensor([text[position], other])
    scores = combined(stepped)[0].cpu()[tokens].double()
    if temperature:
        at = torch.tensor([seed]), torch.tensor([position])
        noise = rng.gumbel(*at, tokens, rng.STREAMS["sample"])[0]
        scores, rounding = scores / temperature + noise, rounding / temperature
    return float(scores[0] - scores[1]), rounding
