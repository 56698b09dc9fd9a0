"""Times one case of decoding: every provider and the bare forwards, interleaved."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.measure import Summary, paired_ratios
from benchmarks.providers import Generation, Prompts, Provider, bare_forwards
from proxytune_kernels import Trio

_MS = 1e3
COMPARED = ("naive", "base-only", "ours", "ours-shared-pair")
"""Providers that the speeds of the others are taken over, where they ran too."""


@dataclass(frozen=True)
class Case:
    """One shape of the work: rows, and tokens of prompt and output of each.

    ``prompt_length`` is None where prompts have lengths of their own.
    """

    batch_size: int
    prompt_length: int | None
    output_length: int

    def __str__(self) -> str:
        prompt = "own" if self.prompt_length is None else self.prompt_length
        return f"B={self.batch_size} ({prompt}, {self.output_length})"


@dataclass(frozen=True)
class Work:
    """A case, and its prompts: one batch for each repeat, over and over."""

    case: Case
    batches: Sequence[Prompts]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and output."""
        prompt = max(len(prompt) for batch in self.batches for prompt in batch)
        return prompt + self.case.output_length


@dataclass
class ProviderTimes:
    """What one provider took, repeat by repeat; seconds."""

    set_up: float = 0.0
    warm_up: float = 0.0
    totals: list[float] = field(default_factory=list)
    first_tokens: list[list[float]] = field(default_factory=list)
    arrivals: list[list[float]] = field(default_factory=list)
    token_means: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, generation: Generation) -> None:
        """Add a repeat.

        Its time to each row's first token; the times between arrivals, where tokens that come
        together are one arrival; and the mean time of a row's token after the first.
        """
        rows = generation.seconds
        self.totals.append(max(row[-1] for row in rows))
        self.first_tokens.append([row[0] for row in rows])
        self.arrivals.append([b - a for row in rows for a, b in pairwise(row) if b > a])
        self.token_means.append(fmean((row[-1] - row[0]) / (len(row) - 1) for row in rows))
        self.counts.update(generation.counts)

    def steps(self) -> list[float]:
        """Per repeat, the median time between a row's arrivals."""
        return [Summary.of(arrivals).median for arrivals in self.arrivals]

    def acceptance(self) -> float | None:
        """Share of the drafts that were kept; None without drafts."""
        drafted = self.counts["drafted"]
        return self.counts["accepted"] / drafted if drafted else None

    def tokens_per_base_forward(self) -> float | None:
        """Tokens that a row gets from a forward of the base; None where nobody counted."""
        forwards = self.counts["useful_slot_steps"]
        return self.counts["emitted"] / forwards if forwards else None


@dataclass
class CaseTimes:
    """A case's measurements."""

    case: Case
    providers: dict[str, ProviderTimes]
    forwards: list[dict[str, list[float]]]
    """Per repeat, role -> seconds of each bare one-token forward."""

    def forward_sums(self) -> list[float]:
        """Per repeat, the roles' median bare forwards summed, seconds."""
        return [sum(Summary.of(s).median for s in roles.values()) for roles in self.forwards]

    def mean_sums(self) -> list[float]:
        """Per repeat, the roles' mean bare forwards summed, seconds."""
        return [sum(fmean(s) for s in roles.values()) for roles in self.forwards]

    def record(self, name: str) -> dict[str, Any]:
        """Plain values of one provider, for a line of results. Ratios are paired by repeat."""
        times = self.providers[name]
        others = {o: self.providers[o] for o in COMPARED if o in self.providers and o != name}
        tokens = self.case.batch_size * self.case.output_length
        forwards = {
            role: _MS
            * Summary.of(Summary.of(repeat[role]).median for repeat in self.forwards).median
            for role in self.forwards[0]
        }
        return {
            "provider": name,
            **asdict(self.case),
            "repeats": len(times.totals),
            "set_up_seconds": times.set_up,
            "warm_up_seconds": times.warm_up,
            "tokens_per_second": asdict(Summary.of(tokens / s for s in times.totals)),
            "first_token_ms": asdict(Summary.of(s * _MS for r in times.first_tokens for s in r)),
            "arrival_ms": percentiles([s * _MS for repeat in times.arrivals for s in repeat]),
            "token_ms": asdict(Summary.of(s * _MS for s in times.token_means)),
            "bare_forwards_ms": {**forwards, "sum": sum(forwards.values())},
            "step_over_forwards": asdict(paired_ratios(times.steps(), self.forward_sums())),
            "token_over_forwards": asdict(paired_ratios(times.token_means, self.mean_sums())),
            "speed_over": {
                o: asdict(paired_ratios(other.totals, times.totals)) for o, other in others.items()
            },
            "token_speed_over": {
                o: asdict(paired_ratios(other.token_means, times.token_means))
                for o, other in others.items()
            },
            "acceptance": times.acceptance(),
            "tokens_per_base_forward": times.tokens_per_base_forward(),
            "counts": dict(times.counts),
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th and 95th percentile of the values, and how many there are."""
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "count": len(values)}


def time_case(
    trio: Trio,
    providers: Sequence[Provider],
    work: Work,
    repeats: int,
    tick: Callable[[str], object],
) -> CaseTimes:
    """Warm every provider up on the case, then time all of them in turn, ``repeats`` times over.

    Args:
        trio: the models, for the bare forwards.
        providers: what to time.
        work: output_length at least 2, so that there is a step to time. In one repeat all have the
            same batch of prompts.
        repeats: at least 1.
        tick: called with the name of what ran, after each run; once per provider and once for the
            bare forwards, in the warm-up and in every repeat.
    """
    case, first = work.case, work.batches[0]
    steps = case.output_length - 1
    result = CaseTimes(case, {p.name: ProviderTimes(p.set_up_seconds) for p in providers}, [])
    for provider in providers:
        start = time.perf_counter()
        provider.generate(first, case.output_length)
        result.providers[provider.name].warm_up = time.perf_counter() - start
        tick(provider.name)
    bare_forwards(trio.models, first, steps)
    tick("bare forwards")
    for repeat in range(repeats):
        prompts = work.batches[repeat % len(work.batches)]
        for provider in providers:
            result.providers[provider.name].add(provider.generate(prompts, case.output_length))
            tick(provider.name)
        result.forwards.append(bare_forwards(trio.models, prompts, steps))
        tick("bare forwards")
    return result
