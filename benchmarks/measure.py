"""Timing side by side: interleaved repeats, medians, ratios of what was measured back to back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_SAMPLE_SECONDS = 0.005
"""A timed sample of a short call loops until it lasts about this long: the clock and the loop then
cost less than a thousandth of it."""


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


def calibrate_loops(call: Callable[[], object], warm_up_seconds: float = 0.05) -> int:
    """Warm a call up; how many of it make one sample of :data:`MIN_SAMPLE_SECONDS`.

    Runs it at least twice: the first call may compile, allocate or page in.
    """
    call()
    end = time.perf_counter() + warm_up_seconds
    fastest = _seconds(call, 1)
    while time.perf_counter() < end:
        fastest = min(fastest, _seconds(call, 1))
    return max(1, round(MIN_SAMPLE_SECONDS / fastest))


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int
) -> Iterator[tuple[str, float]]:
    """Time every call in turn, ``repeats`` times over: A B C A B C.

    Args:
        calls: what to time, by name. A call shorter than :data:`MIN_SAMPLE_SECONDS` is looped.
        repeats: samples of each, at least 1.

    Yields:
        Name and seconds per call, as each sample ends. Warm-up happens before the first.
    """
    loops = {name: calibrate_loops(call) for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            yield name, _seconds(call, loops[name])


def collect(samples: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """Gather samples by name, in order."""
    gathered: dict[str, list[float]] = {}
    for name, seconds in samples:
        gathered.setdefault(name, []).append(seconds)
    return gathered
