"""Times one case of decoding: every provider and the bare forwards, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.measure import Summary, paired_ratios
from benchmarks.prompts import make_prompts
from benchmarks.providers import Generation, Provider, bare_forwards
from proxytune_kernels import Trio

_MS = 1e3


@dataclass(frozen=True)
class Case:
    """One shape of the work: rows, and tokens of prompt and output of each."""

    batch_size: int
    prompt_length: int
    output_length: int

    def __str__(self) -> str:
        return f"B={self.batch_size} ({self.prompt_length}, {self.output_length})"


@dataclass
class ProviderTimes:
    """What one provider took, repeat by repeat; seconds."""

    set_up: float = 0.0
    warm_up: float = 0.0
    totals: list[float] = field(default_factory=list)
    first_tokens: list[list[float]] = field(default_factory=list)
    intervals: list[list[float]] = field(default_factory=list)

    def add(self, generation: Generation) -> None:
        """Add a repeat: the time to each row's first token, and between its tokens."""
        self.totals.append(max(row[-1] for row in generation.seconds))
        self.first_tokens.append([row[0] for row in generation.seconds])
        self.intervals.append([b - a for row in generation.seconds for a, b in pairwise(row)])

    def steps(self) -> list[float]:
        """Per repeat, the median time between a row's tokens."""
        return [Summary.of(intervals).median for intervals in self.intervals]

    def mean_steps(self) -> list[float]:
        """Per repeat, the mean time between a row's tokens."""
        return [fmean(intervals) for intervals in self.intervals]


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
        times, naive = self.providers[name], self.providers.get("naive")
        tokens = self.case.batch_size * self.case.output_length
        intervals = [s * _MS for repeat in times.intervals for s in repeat]
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
            "output_token_ms": percentiles(intervals),
            "bare_forwards_ms": {**forwards, "sum": sum(forwards.values())},
            "step_over_forwards": asdict(paired_ratios(times.steps(), self.forward_sums())),
            "mean_step_over_forwards": asdict(paired_ratios(times.mean_steps(), self.mean_sums())),
            "speed_over_naive": None if naive is None
            else asdict(paired_ratios(naive.totals, times.totals)),
            "step_speed_over_naive": None if naive is None
            else asdict(paired_ratios(naive.steps(), times.steps())),
        }  # fmt: skip


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th and 95th percentile of the values, and how many there are."""
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "count": len(values)}


def time_case(
    trio: Trio,
    providers: Sequence[Provider],
    case: Case,
    repeats: int,
    tick: Callable[[str], object],
) -> CaseTimes:
    """Warm every provider up on the case, then time all of them in turn, ``repeats`` times over.

    Args:
        trio: the models, for the bare forwards.
        providers: what to time.
        case: the shape; output_length at least 2, so that there is a step to time.
        repeats: at least 1.
        tick: called with the name of what ran, after each run; once per provider and once for the
            bare forwards, in the warm-up and in every repeat.
    """
    prompts = make_prompts(trio, case.batch_size, case.prompt_length)
    steps = case.output_length - 1
    result = CaseTimes(case, {p.name: ProviderTimes(p.set_up_seconds) for p in providers}, [])
    for provider in providers:
        start = time.perf_counter()
        provider.generate(prompts, case.output_length)
        result.providers[provider.name].warm_up = time.perf_counter() - start
        tick(provider.name)
    bare_forwards(trio.models, prompts, steps)
    tick("bare forwards")
    for _ in range(repeats):
        for provider in providers:
            result.providers[provider.name].add(provider.generate(prompts, case.output_length))
            tick(provider.name)
        result.forwards.append(bare_forwards(trio.models, prompts, steps))
        tick("bare forwards")
    return result
