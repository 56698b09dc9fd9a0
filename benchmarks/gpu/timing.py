"""Timing on a device: graphs of many calls, cold and warm, interleaved repeats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.cases import Inputs
from benchmarks.gpu.device import CannotCapture, Device, Run
from benchmarks.gpu.providers import Prepared
from benchmarks.measure import Summary

COLD, WARM, SINGLE = "cold", "warm", "single"
"""Cold: input sets take turns, none is in L2 when its turn comes. Warm: one set that fits in L2.
Single: as warm, one call to a graph, so that each call pays for a graph's launch."""

_RUN_SECONDS = 4e-3
"""A graph holds as many calls as take this long launched one by one: what passes between two
replays is then spread over many calls."""
_SAMPLE_SECONDS = 2e-3
"""Between two events, at least: a thousand times their resolution, which is 0.5 us."""
_MOST_WARM_CALLS = 64
_UNIT_SECONDS = 0.5
_REPEATS = (5, 25)
"""Fewest and most samples of each; between them what fits in _UNIT_SECONDS."""
_US = 1e6


@dataclass(frozen=True)
class Timed:
    """One provider in one mode, ready to run."""

    provider: str
    mode: str
    run: Run
    calls: int
    """Calls in one run."""
    input_sets: int
    not_captured: str | None
    """Why the calls are not in a graph but launched one by one; None: they are in one."""
    config: Mapping[str, Any]
    """How the provider is set up."""

    def record(self) -> dict[str, Any]:
        """Fields of a line of results."""
        return {
            "provider": self.provider,
            "mode": self.mode,
            "graph": self.not_captured is None,
            "not_captured": self.not_captured,
            "calls_per_run": self.calls,
            "input_sets": self.input_sets,
            "config": dict(self.config),
        }


def modes(batch_size: int, set_bytes: int, l2_bytes: int) -> tuple[str, ...]:
    """Modes that mean something: warm needs a set that fits in L2, single is for batch 1."""
    if set_bytes > l2_bytes:
        return (COLD,)
    return (COLD, WARM, SINGLE) if batch_size == 1 else (COLD, WARM)


def calls_in_run(seconds_per_call: float, input_sets: int, mode: str) -> int:
    """Calls of one graph: every input set equally often.

    Args:
        seconds_per_call: launched one by one.
        input_sets: that take turns.
        mode: a single call is one; warm calls have an upper bound.
    """
    if mode == SINGLE:
        return 1
    wanted = math.ceil(_RUN_SECONDS / seconds_per_call)
    if mode == WARM:
        return min(_MOST_WARM_CALLS, wanted)
    return input_sets * math.ceil(wanted / input_sets)


def repeats(seconds_of_all: float) -> int:
    """Samples of each, when one sample of all together takes so long."""
    fewest, most = _REPEATS
    return max(fewest, min(most, int(_UNIT_SECONDS / seconds_of_all)))


def prepare(
    device: Device,
    provider: str,
    prepared: Prepared,
    sets: Sequence[Inputs],
    mode: str,
    *,
    may_launch: bool,
) -> Timed:
    """Warm a provider up and capture it.

    Args:
        device: what runs it.
        provider: its name.
        prepared: does the work on one set of inputs.
        sets: go through in turn; only the first unless cold.
        mode: of :data:`COLD`, :data:`WARM`, :data:`SINGLE`.
        may_launch: whether calls that can't be captured are launched one by one.

    Raises:
        CannotCapture: they can't be, and ``may_launch`` is false.
    """
    used = sets if mode == COLD else sets[:1]
    calls = [partial(prepared.call, inputs) for inputs in used]
    calls[0]()
    seconds = device.seconds(calls[0], 2)
    count = calls_in_run(seconds, len(used), mode)
    turns = [calls[i % len(calls)] for i in range(count)]
    not_captured = None
    try:
        run = device.capture(turns)
    except CannotCapture as error:
        if not may_launch:
            raise
        not_captured = str(error)

        def run() -> None:
            for turn in turns:
                turn()

    return Timed(provider, mode, run, count, len(used), not_captured, prepared.config)


def time_all(device: Device, timed: Sequence[Timed]) -> list[list[float]]:
    """Seconds per call of each, sample by sample, in turns: A B C A B C.

    A warm run follows one that is not timed: what ran before it has filled L2 with something else.
    """
    replays, total = [], 0.0
    for t in timed:
        t.run()
        seconds = device.seconds(t.run, 1)
        count = max(1, math.ceil(_SAMPLE_SECONDS / seconds))
        replays.append(count)
        total += seconds * (count + (t.mode != COLD))
    samples: list[list[float]] = [[] for _ in timed]
    for _ in range(repeats(total)):
        for own, t, count in zip(samples, timed, replays, strict=True):
            if t.mode != COLD:
                t.run()
            own.append(device.seconds(t.run, count) / t.calls)
    return samples


def microseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median, lowest, 10th and 90th percentile and count of samples, in microseconds."""
    values = [s * _US for s in seconds]
    return {**asdict(Summary.of(values)), "min": min(values)}


def rates(
    median_seconds: float, logits_bytes: int, copy_bytes_per_second: float
) -> Mapping[str, float]:
    """Bandwidth counting each logit once, and its share of a device-to-device copy's."""
    bytes_per_second = logits_bytes / median_seconds
    return {
        "gigabytes_per_second": bytes_per_second / 1e9,
        "share_of_copy": bytes_per_second / copy_bytes_per_second,
    }
