"""Do two ways to decode give the same tokens, and where not, is it a tie within rounding?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache

from benchmarks.harness.decoding import NaiveLoop, Prompts, Provider, combined
from benchmarks.harness.measure import no_tick
from benchmarks.harness.report import progress_bar, say
from benchmarks.harness.trios import make_prompts
from proxytune_kernels import Trio, rng

CHECKED_ROWS, CHECKED_PROMPT, CHECKED_TOKENS = 4, 12, 16
"""Prompts of :func:`check_greedy`, their length, and the tokens that are decoded of each."""


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


def greedy_mismatches(
    providers: Sequence[Provider],
    trio: Trio,
    prompts: Prompts,
    max_tokens: int,
    tick: Callable[[str], object] = no_tick,
) -> list[Mismatch]:
    """Hold every provider's greedy tokens to a naive loop's over the same roles.

    Prompts are token ids of one length. Gives the first mismatch of each prompt of each provider;
    what follows one is not compared, as the texts differ from there on.
    """
    found = []
    expected: dict[tuple[str, ...], list[list[int]]] = {}
    for provider in providers:
        tick(provider.name)
        naive = NaiveLoop(trio, provider.roles)
        if provider.roles not in expected:
            expected[provider.roles] = naive.generate(prompts, max_tokens, greedy=True).token_ids
        got = provider.generate(prompts, max_tokens, greedy=True).token_ids
        for row, (want, have) in enumerate(zip(expected[provider.roles], got, strict=True)):
            if want != have:
                if len(want) != len(have):
                    raise RuntimeError(
                        f"{provider.name} gave {len(have)} tokens of prompt {row}, not {len(want)}"
                    )
                computed = ComputedTwice(naive, prompts[row], want)
                found.append(first_mismatch(provider.name, row, computed, have))
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


class ComputedTwice:
    """Combined logits along a text, by two computations that are equal in exact arithmetic.

    The naive loop's own over prompt and generated tokens: the whole text in one forward, and token
    by token over a cache. How far the two lie apart shows how far any two such computations may.
    """

    def __init__(self, naive: NaiveLoop, prompt: Sequence[int], generated: Sequence[int]) -> None:
        self._naive = naive
        self._prompt = list(prompt)
        self.generated = list(generated)

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        """Role -> logits fp32 [n, V], of whose row i generated[i] was drawn; in one forward."""
        return self._of_roles(self._in_one_forward)

    @cached_property
    def stepped(self) -> dict[str, Tensor]:
        """The same token by token."""
        return self._of_roles(self._step_by_step)

    def gap(
        self, position: int, other: int, temperature: float = 0.0, seed: int = 0
    ) -> tuple[float, float]:
        """By how much the token at a position leads another, and the gap that rounding explains.

        Let d be the largest difference of a combined logit between the two computations (or, where
        they happen to coincide, one ulp of a role's largest logit): with logits as they are, two
        tokens can swap if their gap is at most 2 d, at a temperature T if it is at most 2 d / T.

        ``seed`` is the noise's, where the temperature is above 0.
        """
        stepped = {role: x[position] for role, x in self.stepped.items()}
        whole = {role: x[position] for role, x in self.whole.items()}
        seen = float((combined(whole) - combined(stepped)).abs().max())
        models = self._naive.models
        ulps = [torch.finfo(models[r].dtype).eps * float(x.abs().max()) for r, x in stepped.items()]
        rounding = 2 * max(seen, *ulps)
        tokens = torch.tensor([self.generated[position], other])
        scores = combined(stepped).cpu()[tokens].double()
        if temperature:
            at = torch.tensor([seed]), torch.tensor([position])
            noise = rng.gumbel(*at, tokens, rng.STREAMS["sample"])[0]
            scores, rounding = scores / temperature + noise, rounding / temperature
        return float(scores[0] - scores[1]), rounding

    @torch.inference_mode()
    def _of_roles(self, compute: Any) -> dict[str, Tensor]:
        return {role: compute(model) for role, model in self._naive.models.items()}

    def _in_one_forward(self, model: Any) -> Tensor:
        text = [*self._prompt, *self.generated[:-1]]
        ids = torch.tensor([text], device=self._naive.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
        return logits[len(self._prompt) - 1 :, : self._naive.vocab_size].float()

    def _step_by_step(self, model: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        new, rows = self._prompt, []
        for token_id in self.generated:
            ids = torch.tensor([new], device=self._naive.device)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            rows.append(output.logits[0, -1, : self._naive.vocab_size].float())
            new = [token_id]
        return torch.stack(rows)


def first_mismatch(
    name: str,
    row: int,
    computed: ComputedTwice,
    have: Sequence[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> Mismatch:
    """The first place where tokens leave those of a text; both differ before the shorter ends."""
    want = computed.generated
    position = next(i for i, (a, b) in enumerate(zip(want, have, strict=False)) if a != b)
    gap, rounding = computed.gap(position, have[position], temperature, seed)
    return Mismatch(name, row, position, want[position], have[position], gap, rounding)
