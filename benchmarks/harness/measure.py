"""Timing side by side: all in turns, medians, ratios of what was measured back to back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

SHOT_SECONDS = 0.0003
"""A short call loops until about this long: reading the clock is then under a thousandth of it, and
most shots still fall between two interruptions of a busy machine."""

MAX_SHOTS = 16
"""Shots per sample; a sample is their median. Calls longer than a shot have fewer."""


def summary(values: Iterable[float], scale: float = 1.0) -> dict[str, Any]:
    """Median and spread of at least one value, each times ``scale``."""
    array = scale * np.asarray(list(values), dtype=np.float64)
    if array.size == 0:
        raise ValueError("values must hold at least one measurement, got none")
    p10, p50, p90 = map(float, np.percentile(array, (10, 50, 90)))
    return {"median": p50, "p10": p10, "p90": p90, "count": array.size}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """Summary of ``numerators[i] / denominators[i]``, both measured in repeat i.

    What slows the machine for a while slows both halves of a pair, and falls out of their ratio;
    it does not fall out of the ratio of two medians.
    """
    return summary(a / b for a, b in zip(numerators, denominators, strict=True))


def speed_over(
    name: str, seconds: Mapping[str, Sequence[float]], others: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Ratios of what others that ran took to what this one took, by their names."""
    ran = [other for other in others if other in seconds and other != name]
    return {other: ratios(seconds[other], seconds[name]) for other in ran}


def no_tick(name: str) -> None:
    """Show no progress."""


def in_turns(
    calls: Mapping[str, Callable[[int], T]],
    repeats: int,
    tick: Callable[[str], object] = no_tick,
    *,
    warm_up: bool = False,
) -> dict[str, list[T]]:
    """Run every call in turn, ``repeats`` times over: A B C A B C.

    Each is given the number of the repeat; ``warm_up`` runs each once before, as repeat 0, and
    drops what it gives. ``tick`` is told the name after each run. Gives name -> values.
    """
    found: dict[str, list[T]] = {name: [] for name in calls}
    for repeat in [*([0] if warm_up else []), *range(repeats)]:
        for name, call in calls.items():
            found[name].append(call(repeat))
            tick(name)
    return {name: values[-repeats:] for name, values in found.items()}


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call gives, and the seconds it took."""
    start = time.perf_counter()
    value = call()
    return value, time.perf_counter() - start


def _seconds(call: Callable[[], object], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def calibrate(call: Callable[[], object], warm_up_seconds: float = 0.05) -> tuple[int, int]:
    """Warm a short call up, and choose the loops of a shot and the shots of a sample.

    Runs it at least twice: the first run may compile, allocate or page in.
    """
    call()
    end = time.perf_counter() + warm_up_seconds
    fastest = _seconds(call, 1)
    while time.perf_counter() < end:
        fastest = min(fastest, _seconds(call, 1))
    loops = max(1, round(SHOT_SECONDS / fastest))
    shots = max(1, min(MAX_SHOTS, round(MAX_SHOTS * SHOT_SECONDS / (loops * fastest))))
    return loops, shots


def sample_seconds(call: Callable[[], object], loops: int, shots: int) -> float:
    """Seconds of a short call: the median of the shots, each the mean of its loops."""
    return median(_seconds(call, loops) for _ in range(shots))


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    tick: Callable[[str], object] = no_tick,
) -> dict[str, list[float]]:
    """Seconds per call of short calls, in turn: name -> ``repeats`` samples.

    All are warmed up before the first sample.
    """
    sizes = {name: calibrate(call) for name, call in calls.items()}
    samples = {
        name: (lambda _, call=call, size=sizes[name]: sample_seconds(call, *size))
        for name, call in calls.items()
    }
    return in_turns(samples, repeats, tick)
