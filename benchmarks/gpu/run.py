"""The run: stages in order within a budget, results saved as they come."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

import proxytune_kernels as ptk
from benchmarks.gpu import contract, flashinfer_peer, report, tools
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import CUDA, FLASHINFER, OURS, TRANSFORMERS, Unit
from benchmarks.gpu.contract import Outcome
from benchmarks.gpu.device import Device
from benchmarks.gpu.shards import check_shards
from benchmarks.gpu.targets import verdicts
from benchmarks.gpu.units import DeviceLost, UnitRunner
from benchmarks.report import console, make_progress, write_json_lines

STAGES = ("build", "contract", "check", "time", "profile", "sanitize")
DEFAULT_STAGES = STAGES[:4]

COPY_BYTES = 5 * 2**28
"""Of the buffer whose copy is the yardstick: 1.25 GiB, many times L2."""

# Seconds kept back for later stages while earlier ones run.
_RESERVED = {"profile": 90.0, "sanitize": 180.0}
_REPORT_SECONDS = 10.0
_CONTRACT_SHARE = 0.5  # of what is left, where times are to be taken after it
_FLASHINFER_SHARE = 0.45  # of the budget, beside the contract suite


@dataclass(frozen=True)
class Options:
    """What to do."""

    stages: tuple[str, ...]
    units: tuple[Unit, ...]
    workers: int
    """Processes of the contract suite."""
    output: Path
    plot: bool = True


@dataclass
class Journal:
    """All that came of a run so far; saved as it comes, as a run may be cut short."""

    output: Path
    device: Mapping[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Add lines of results; the first replace what an earlier run left there."""
        write_json_lines(self.output, "gpu", records, self.device, append=bool(self.records))
        self.records += records

    def note(self, sentence: str, *, failed: bool = False) -> None:
        """Say what was not done, and why; a failure makes the exit code 1."""
        say(sentence)
        self.failed |= failed
        self.add([{"op": "note", "text": sentence, "failed": failed}])

    def outcome(self, stage: str, outcome: Outcome) -> None:
        """Say and keep how a stage went."""
        say(outcome.sentence)
        self.failed |= outcome.failed
        record = {"op": stage, "text": outcome.sentence, "failed": outcome.failed, **outcome.fields}
        self.add([record])


def say(sentence: str) -> None:
    """Print as it is: no markup, no wrapping."""
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def run(device: Device, options: Options, budget: Budget) -> int:
    """Run the stages; returns the exit code: 0, or 1 where ours failed or was wrong."""
    journal = Journal(options.output, device.describe())
    stages = options.stages
    measures = "check" in stages or "time" in stages
    wanted = {name for unit in options.units for name in unit.providers} if measures else set()
    unavailable = _unavailable(wanted, device)
    own = {OURS: device.backend}
    if (no_cuda := ptk.backends()[device.cuda_backend]) is None:
        own[CUDA] = device.cuda_backend
    elif CUDA not in wanted:
        journal.note(f"{CUDA}: not tested: {no_cuda}")
    build = None
    if FLASHINFER in wanted and FLASHINFER not in unavailable:
        build = flashinfer_peer.Build(_FLASHINFER_SHARE * budget.left())
    later = _REPORT_SECONDS + sum(_RESERVED[stage] for stage in _RESERVED if stage in stages)
    if "build" in stages:
        journal.outcome("build", contract.build_extension(budget.left(later)))
    if "contract" in stages:
        limit = budget.left(later) * (_CONTRACT_SHARE if measures else 1.0)
        log = options.output.with_suffix(".contract.log")
        named = " or ".join(dict.fromkeys(own.values()))
        outcome = contract.run_contract(named, options.workers, limit, log)
        journal.outcome("contract", outcome)
    if build is not None and (reason := build.wait()) is not None:
        unavailable[FLASHINFER] = reason
    for name, reason in unavailable.items():
        journal.note(f"{name}: not measured: {reason}")
    if "check" in stages:
        _check_shards(device, journal)
    if measures:
        _measure(device, options, budget, later, unavailable, journal)
    if "profile" in stages:
        limit = budget.left(_RESERVED["sanitize"] if "sanitize" in stages else 0.0)
        journal.outcome("profile", tools.profile(limit, tuple(own)))
    if "sanitize" in stages:
        journal.outcome("sanitize", tools.sanitize(budget.left(_REPORT_SECONDS)))
    _report(options, journal)
    return int(journal.failed)


def _check_shards(device: Device, journal: Journal) -> None:
    """Draw from parts of the vocabulary; what goes wrong must not end the run."""
    try:
        journal.outcome("shards", check_shards(device))
    except Exception as error:
        journal.note(f"sharded draws: {type(error).__name__}: {error}", failed=True)


def _unavailable(wanted: set[str], device: Device) -> dict[str, str]:
    """Providers that can't run here, with the reason, as far as is known at once."""
    reasons = {}
    if CUDA in wanted and (reason := ptk.backends()[device.cuda_backend]) is not None:
        reasons[CUDA] = reason
    if TRANSFORMERS in wanted and importlib.util.find_spec("transformers") is None:
        reasons[TRANSFORMERS] = "transformers is not installed (pip install transformers)"
    if FLASHINFER in wanted and (reason := flashinfer_peer.missing()) is not None:
        reasons[FLASHINFER] = reason
    return reasons


def _measure(
    device: Device,
    options: Options,
    budget: Budget,
    later: float,
    unavailable: Mapping[str, str],
    journal: Journal,
) -> None:
    """Check and time the units that fit in the budget, in their order."""
    copy_rate = measure_copy(device, journal)
    runner = UnitRunner(
        device,
        unavailable,
        copy_rate,
        check="check" in options.stages,
        time="time" in options.stages,
    )
    dropped = []
    with make_progress() as progress:
        task = progress.add_task("", total=len(options.units))
        for unit in options.units:
            progress.update(task, description=str(unit.case), advance=1)
            kind = "compiled" if unit.compiles else "plain"
            if not budget.fits(kind, later):
                dropped.append(str(unit))
                continue
            start = budget.now()
            try:
                result = runner.run(unit)
            except DeviceLost as error:
                journal.note(f"{error}; nothing more is measured", failed=True)
                break
            budget.spent(kind, budget.now() - start)
            journal.add(result.records)
            for note in result.notes:
                journal.note(note)
            journal.failed |= result.failed
    if dropped:
        journal.note(
            f"Not measured for lack of time, {len(dropped)} of {len(options.units)}, least "
            f"important last: {'; '.join(dropped)}"
        )


def measure_copy(device: Device, journal: Journal) -> float:
    """The yardstick: median bytes per second of a copy; all samples go to the journal."""
    rates = copy_rates(device)
    journal.add([{"op": "copy", "bytes": 2 * COPY_BYTES, "bytes_per_second": rates}])
    return median(rates)


def copy_rates(device: Device) -> list[float]:
    """Bytes per second of a device-to-device copy, read and written, ten samples."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    return [2 * COPY_BYTES / device.seconds(copy, 4) for _ in range(10)]


def _report(options: Options, journal: Journal) -> None:
    """Table, Markdown, pictures, and the verdicts last."""
    judged = verdicts(journal.records, str(journal.device["device_name"]))
    journal.add([{"op": "target", **asdict(verdict)} for verdict in judged])
    written = [options.output]
    timed = [r for r in journal.records if "provider" in r]
    if timed:
        [copy] = [r for r in journal.records if r["op"] == "copy"]
        copy_rate = median(copy["bytes_per_second"])
        report.print_times(timed, journal.device, copy_rate)
        page = options.output.with_suffix(".md")
        page.write_text(report.markdown(timed, journal.device, copy_rate, judged))
        written += [page, *_plots(options, journal, timed)]
    for verdict in judged:
        say(str(verdict))
    for path in written:
        say(f"Wrote {path}")


def _plots(options: Options, journal: Journal, timed: Sequence[dict[str, Any]]) -> list[Path]:
    if not options.plot:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        journal.note("No pictures: matplotlib is not installed (pip install matplotlib).")
        return []
    from benchmarks.gpu import plots

    title = f"sample, bf16, {report.where(journal.device)}"
    stem = options.output.with_suffix("")
    times, bandwidth = (stem.with_name(f"{stem.name}-{n}.png") for n in ("times", "bandwidth"))
    plots.plot_times(timed, times, title)
    plots.plot_bandwidth(timed, bandwidth, title)
    return [times, bandwidth]
