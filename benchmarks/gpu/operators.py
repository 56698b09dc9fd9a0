"""The operators timed: graphs of many calls, cold and warm, interleaved repeats; the table."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu.cases import BACKENDS, Case, Inputs, Unit, make_inputs
from benchmarks.gpu.device import CannotCapture, Device, Journal, Record, Run, release
from benchmarks.gpu.peers import Prepared, absent, prepare
from benchmarks.harness import report
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
    """One provider in one mode, ready to run: ``calls`` calls in a run."""

    provider: str
    mode: str
    run: Run
    calls: int
    not_captured: str | None = None


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


def capture(
    device: Device, name: str, prepared: Prepared, sets: Sequence[Inputs], mode: str
) -> Timed:
    """Warm a provider up and capture its calls; a peer's that can't be are launched one by one."""
    used = sets if mode == "cold" else sets[:1]
    calls = [partial(prepared.call, inputs) for inputs in used]
    calls[0]()
    count = calls_in_run(device.seconds(calls[0], 2), len(used), mode)
    turns = [calls[i % len(calls)] for i in range(count)]
    try:
        return Timed(name, mode, device.capture(turns), count)
    except CannotCapture as error:
        if name in BACKENDS:
            raise

        def run() -> None:
            for turn in turns:
                turn()

        return Timed(name, mode, run, count, str(error))


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
    fewest, most = _REPEATS
    samples: list[list[float]] = [[] for _ in timed]
    for _ in range(max(fewest, min(most, int(_UNIT_SECONDS / total)))):
        for own, t, count in zip(samples, timed, replays, strict=True):
            if t.mode != "cold":
                t.run()
            own.append(device.seconds(t.run, count) / t.calls)
    return samples


def records(
    case: Case, timed: Sequence[Timed], samples: Sequence[Sequence[float]], copy_rate: float
) -> list[dict[str, Any]]:
    """A line of results for each; ratios are within a repeat, bandwidth counts each logit once."""
    own = {t.mode: s for t, s in zip(timed, samples, strict=True) if t.provider == "ours"}
    lines = []
    for t, seconds in zip(timed, samples, strict=True):
        rate = case.logits_bytes / median(seconds)
        line = {
            **case.record(),
            "provider": t.provider,
            "mode": t.mode,
            "calls_per_run": t.calls,
            "graph": t.not_captured is None,
            "not_captured": t.not_captured,
            "microseconds": {**summary(seconds, 1e6), "min": 1e6 * min(seconds)},
            "gigabytes_per_second": rate / 1e9,
            "share_of_copy": rate / copy_rate,
            "time_over_ours": ratios(seconds, own[t.mode]) if t.mode in own else None,
        }
        lines.append(line)
    return lines


def run(device: Device, units: Sequence[Unit], output: Path, budget: float) -> int:
    """Check and time units in their order; the exit code is 1 where ours failed or was wrong."""
    journal, end = Journal(output, device.describe()), time.monotonic() + budget
    missing = absent()
    for name, reason in missing.items():
        journal.note(f"{name}: not measured: {reason}")
    journal.add([device.copy_record()])
    dropped = []
    with report.progress_bar(len(units)) as tick:
        for unit in units:
            tick(str(unit.case))
            if time.monotonic() > end:
                dropped.append(str(unit))
                continue
            names = [name for name in unit.providers if name not in missing]
            with journal.guarded(str(unit.case)):
                measure(device, unit.case, names, journal)
            release()
    if dropped:
        journal.note(
            f"Not measured for lack of time, {len(dropped)} of {len(units)}, least important "
            f"last: {'; '.join(dropped)}"
        )
    timed = [r for r in journal.records if "provider" in r]
    caption = (
        "us: median of a call of ours in graph replay, no input in L2 (warm: all of it). GB/s: the "
        "three roles' logits counted once (sample_hidden: the heads' weights). copy: that over the "
        f"{journal.copy_rate / 1e9:,.0f} GB/s, read and written, of a device-to-device copy in "
        "this run. The others: a provider's time over ours (CUDA: our CUDA C++ kernels, HF: "
        "transformers' warpers, FI: FlashInfer). *: not capturable, launched call by call. Host:"
    )
    report.print_records(
        f"The operators on {device}, bf16",
        caption,
        by_case(timed),
        COLUMNS,
        section=lambda r: "{op}, {kind}, V={vocab_size:,}".format_map(r["case"]),
    )
    return journal.conclude()


def measure(device: Device, case: Case, names: Sequence[str], journal: Journal) -> None:
    """Check each provider, then time those that are right in turns."""
    sets = make_inputs(case, case.sets_needed(device.l2_bytes))
    timed: list[Timed] = []
    for name in names:
        with journal.guarded(f"{case}: {name}", ours=name in BACKENDS):
            prepared = prepare(case, name, sets[0])
            prepared.check(sets[0])
            for mode in modes(case, device.l2_bytes):
                timed.append(capture(device, name, prepared, sets, mode))
    if timed:
        journal.add(records(case, timed, time_all(device, timed), journal.copy_rate))


_CASE = ("op", "kind", "filters", "vocab_size", "batch_size", "positions")
_HEADS = {
    "cuda": "CUDA", "eager": "eager", "torch.compile": "compile", "transformers": "HF",
    "flashinfer": "FI",
}  # fmt: skip
"""All but ours in Triton, and the heads of their columns."""


def _ratio(r: Record) -> str:
    """A provider's time over ours; a star is behind what was launched call by call."""
    if r["time_over_ours"] is None:
        return "-"
    return report.significant(r["time_over_ours"]["median"], "" if r["graph"] else "*")


def _size(r: Record) -> str:
    positions = f" x {r['positions']}" if r["positions"] > 1 else ""
    return f"B={r['batch_size']}{positions} {r['filters']}"


COLUMNS: tuple[report.Column, ...] = (
    ("case", "case", _size),
    ("us", "ours/cold/microseconds/median", report.significant),
    ("warm", "ours/warm/microseconds/median", report.significant),
    ("GB/s", "ours/cold/gigabytes_per_second", report.decimals(0)),
    ("copy", "ours/cold/share_of_copy", report.percent),
    *((head, f"{peer}/cold", _ratio) for peer, head in _HEADS.items()),
)


def by_case(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records by provider and mode, for each case in the order they were first timed."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in records:
        case = found.setdefault(tuple(r[key] for key in _CASE), {"case": r})
        # ours may be timed again beside others
        case.setdefault(r["provider"], {}).setdefault(r["mode"], r)
    return list(found.values())
