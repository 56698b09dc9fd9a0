"""Timing side by side: all in turns, medians, ratios of what was measured back to back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

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
        """Summarise at least one value."""
        array = np.asarray(list(values), dtype=np.float64)
        if array.size == 0:
            raise ValueError("values must hold at least one measurement, got none")
        p10, median, p90 = np.percentile(array, (10, 50, 90))
        return cls(float(median), float(p10), float(p90), int(array.size))


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Summary:
    """Summary of ``numerators[i] / denominators[i]``, both measured in repeat i.

    What slows the machine for a while slows both halves of a pair, and falls out of their ratio;
    it does not fall out of the ratio of two medians.
    """
    return Summary.of(a / b for a, b in zip(numerators, denominators, strict=True))


def summary(values: Iterable[float], scale: float = 1.0) -> dict[str, Any]:
    """:class:`Summary` of the values times ``scale``, for a line of results."""
    return asdict(Summary.of(scale * value for value in values))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """:func:`paired_ratios` for a line of results."""
    return asdict(paired_ratios(numerators, denominators))


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


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of the processor, which other programs move less."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def by(cls, call: Callable[[], T]) -> tuple[T, Spent]:
        """What a call gives, and what it took."""
        clock, processor = time.perf_counter(), time.process_time()
        value = call()
        return value, cls(time.perf_counter() - clock, time.process_time() - processor)


def _seconds(call: Callable[[], object], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


@dataclass(frozen=True)
class Timer:
    """Times one short call: the median of ``shots``, each the mean of ``loops`` calls."""

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


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    tick: Callable[[str], object] = no_tick,
) -> dict[str, list[float]]:
    """Seconds per call of short calls, in turn: name -> ``repeats`` samples of a :class:`Timer`.

    All are warmed up before the first sample.
    """
    timers = {name: Timer.calibrated(call) for name, call in calls.items()}
    samples = {name: (lambda _, timer=timer: timer.sample()) for name, timer in timers.items()}
    return in_turns(samples, repeats, tick)
