"""Timing side by side: interleaved repeats, medians, ratios of what was measured back to back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

SHOT_SECONDS = 0.0003
"""A short call loops until about this long: reading the clock is then under a thousandth of it, and
most shots still fall between two interruptions of a busy machine."""

MAX_SHOTS = 16
"""Shots per sample; a sample is their median. Calls longer than a shot have fewer."""


@dataclass(frozen=True)
class Summary:
    """Median and spread of repeated measurements."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """Summarise at least one value.

        Raises:
            ValueError: no values.
        """
        array = np.asarray(list(values), dtype=np.float64)
        if array.size == 0:
            raise ValueError("values must hold at least one measurement, got none")
        p10, median, p90 = np.percentile(array, (10, 50, 90))
        return cls(float(median), float(p10), float(p90), int(array.size))


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Summary:
    """Summary of ``numerators[i] / denominators[i]``, both measured in repeat i.

    What slows the machine for a while slows both halves of a pair, and falls out of their ratio;
    it does not fall out of the ratio of two medians.

    Raises:
        ValueError: another number of numerators than of denominators, or none.
    """
    return Summary.of(a / b for a, b in zip(numerators, denominators, strict=True))


def _seconds(call: Callable[[], object], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


@dataclass(frozen=True)
class Timer:
    """Times one call: the median of ``shots``, each the mean of ``loops`` calls."""

    call: Callable[[], object]
    loops: int
    shots: int

    @classmethod
    def calibrated(cls, call: Callable[[], object], warm_up_seconds: float = 0.05) -> Timer:
        """Warm a call up, and choose loops and shots by its fastest run.

        Runs it at least twice: the first run may compile, allocate or page in.
        """
        call()
        end = time.perf_counter() + warm_up_seconds
        fastest = _seconds(call, 1)
        while time.perf_counter() < end:
            fastest = min(fastest, _seconds(call, 1))
        loops = max(1, round(SHOT_SECONDS / fastest))
        shots = max(1, min(MAX_SHOTS, round(MAX_SHOTS * SHOT_SECONDS / (loops * fastest))))
        return cls(call, loops, shots)

    def sample(self) -> float:
        """Seconds per call."""
        return median(_seconds(self.call, self.loops) for _ in range(self.shots))


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int
) -> Iterator[tuple[str, float]]:
    """Time every call in turn, ``repeats`` times over: A B C A B C.

    Args:
        calls: what to time, by name.
        repeats: samples of each, at least 1.

    Yields:
        Name and seconds per call, as each sample ends. Warm-up happens before the first.
    """
    timers = {name: Timer.calibrated(call) for name, call in calls.items()}
    for _ in range(repeats):
        for name, timer in timers.items():
            yield name, timer.sample()


def collect(samples: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """Gather samples by name, in order."""
    gathered: dict[str, list[float]] = {}
    for name, seconds in samples:
        gathered.setdefault(name, []).append(seconds)
    return gathered
