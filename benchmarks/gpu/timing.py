"""Timing on a device: graphs of many calls, cold and warm, interleaved repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from benchmarks.gpu.cases import BACKENDS, Case, Inputs
from benchmarks.gpu.device import CannotCapture, Device, Run
from benchmarks.gpu.peers import Prepared
from benchmarks.harness.measure import ratios, summary

_RUN_SECONDS = 4e-3
"""A graph holds as many calls as take this long launched one by one: what passes between two
replays is then spread over many calls."""
_SAMPLE_SECONDS = 2e-3
"""Between two events, at least: a thousand times their resolution, which is 0.5 us."""
_MOST_WARM_CALLS = 64
_UNIT_SECONDS = 0.5
_REPEATS = (5, 25)
"""Fewest and most samples of each; between them what fits in _UNIT_SECONDS."""


@dataclass(frozen=True)
class Timed:
    """One provider in one mode, ready to run."""

    provider: str
    mode: str
    run: Run
    calls: int
    """Calls in one run."""
    fields: dict[str, Any]
    """More of a line of results."""


def modes(case: Case, l2_bytes: int) -> tuple[str, ...]:
    """How a case is timed.

    ``cold``: input sets take turns, none is in L2 when its turn comes. ``warm``: one set that fits
    in L2. ``single``, for batch 1: as warm, one call to a graph, so that each call pays for a
    graph's launch.
    """
    if case.logits_bytes > l2_bytes:
        return ("cold",)
    return ("cold", "warm", "single") if case.batch_size == 1 else ("cold", "warm")


def calls_in_run(seconds_per_call: float, input_sets: int, mode: str) -> int:
    """Calls of one graph, given a call's seconds launched alone: every input set equally often."""
    if mode == "single":
        return 1
    wanted = math.ceil(_RUN_SECONDS / seconds_per_call)
    if mode == "warm":
        return min(_MOST_WARM_CALLS, wanted)
    return input_sets * math.ceil(wanted / input_sets)


def repeats(seconds_of_all: float) -> int:
    """Samples of each, when one sample of all together takes so long."""
    fewest, most = _REPEATS
    return max(fewest, min(most, int(_UNIT_SECONDS / seconds_of_all)))


def prepare(
    device: Device, name: str, prepared: Prepared, sets: Sequence[Inputs], mode: str
) -> Timed:
    """Warm a provider up and capture its calls; a peer's that can't be are launched one by one."""
    used = sets if mode == "cold" else sets[:1]
    calls = [partial(prepared.call, inputs) for inputs in used]
    calls[0]()
    count = calls_in_run(device.seconds(calls[0], 2), len(used), mode)
    turns = [calls[i % len(calls)] for i in range(count)]
    not_captured = None
    try:
        run = device.capture(turns)
    except CannotCapture as error:
        if name in BACKENDS:
            raise
        not_captured = str(error)

        def run() -> None:
            for turn in turns:
                turn()

    fields: dict[str, Any] = {"graph": not_captured is None, "not_captured": not_captured}
    fields |= {"input_sets": len(used), "config": dict(prepared.config)}
    return Timed(name, mode, run, count, fields)


def time_all(device: Device, timed: Sequence[Timed]) -> list[list[float]]:
    """Seconds per call of each, sample by sample, in turns: A B C A B C.

    A warm run follows one that is not timed: what ran before it has filled L2 with something else.
    """
    replays, total = [], 0.0
    for t in timed:
        t.run()
        seconds = device.seconds(t.run, 1)
        replays.append(max(1, math.ceil(_SAMPLE_SECONDS / seconds)))
        total += seconds * (replays[-1] + (t.mode != "cold"))
    samples: list[list[float]] = [[] for _ in timed]
    for _ in range(repeats(total)):
        for own, t, count in zip(samples, timed, replays, strict=True):
            if t.mode != "cold":
                t.run()
            own.append(device.seconds(t.run, count) / t.calls)
    return samples


def records(
    case: Case,
    timed: Sequence[Timed],
    samples: Sequence[Sequence[float]],
    copy_rate: float,
    *,
    checked: bool,
) -> list[dict[str, Any]]:
    """A line of results for each; ratios are within a repeat, bandwidth counts each logit once."""
    own = {t.mode: s for t, s in zip(timed, samples, strict=True) if t.provider == "ours"}
    lines = []
    for t, seconds in zip(timed, samples, strict=True):
        rate = case.logits_bytes / median(seconds)
        line = {
            **case.record(),
            **t.fields,
            "provider": t.provider,
            "mode": t.mode,
            "calls_per_run": t.calls,
            "checked": checked,
            "microseconds": {**summary(seconds, 1e6), "min": 1e6 * min(seconds)},
            "gigabytes_per_second": rate / 1e9,
            "share_of_copy": rate / copy_rate,
            "time_over_ours": ratios(seconds, own[t.mode]) if t.mode in own else None,
        }
        lines.append(line)
    return lines
