"""The operators' run: stages in order within a budget, results saved as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import proxytune_kernels as ptk
from benchmarks.gpu import checks, report, stages, timing
from benchmarks.gpu.cases import BACKENDS, Case, Unit, fits, make_inputs, sets_needed
from benchmarks.gpu.device import Device
from benchmarks.gpu.peers import FlashInferBuild, Providers, flashinfer_missing
from benchmarks.gpu.session import Budget, DeviceLost, Journal, Outcome, release
from benchmarks.harness.report import progress_bar

STAGES = ("build", "contract", "check", "time", "profile", "sanitize")
DEFAULT_STAGES = STAGES[:4]

# Seconds kept back for later stages while earlier ones run.
_RESERVED = {"profile": 90.0, "sanitize": 180.0}
_REPORT_SECONDS = 10.0
_CONTRACT_SHARE = 0.5  # of what is left, where times are to be taken after it
_FLASHINFER_SHARE = 0.45  # of the budget, beside the contract suite
_PROBE_CALLS = 5  # by which the mode of torch.compile is chosen


@dataclass(frozen=True)
class Options:
    """What to do; ``workers`` are processes of the contract suite."""

    stages: Sequence[str]
    units: Sequence[Unit]
    workers: int
    output: Path
    plot: bool = True


def run(device: Device, options: Options, budget: Budget) -> int:
    """Run the stages; returns the exit code: 0, or 1 where ours failed or was wrong."""
    journal, chosen = Journal(options.output, device.describe()), options.stages
    measures = "check" in chosen or "time" in chosen
    wanted = {name for unit in options.units for name in unit.providers} if measures else set()
    absent = absent_providers()
    own = [name for name in BACKENDS if name not in absent]
    build = None
    if "flashinfer" in wanted - absent.keys():
        build = FlashInferBuild(_FLASHINFER_SHARE * budget.left())
    later = _REPORT_SECONDS + sum(_RESERVED[stage] for stage in _RESERVED if stage in chosen)
    if "build" in chosen:
        journal.outcome("build", stages.build_extension(budget.left(later)))
    if "contract" in chosen:
        limit = budget.left(later) * (_CONTRACT_SHARE if measures else 1.0)
        log, named = options.output.with_suffix(".contract.log"), [BACKENDS[name] for name in own]
        outcome = stages.run_contract(" or ".join(named), options.workers, limit, log)
        journal.outcome("contract", outcome)
    if build is not None and (reason := build.wait()) is not None:
        absent["flashinfer"] = reason
    for name, reason in absent.items():
        if name in wanted or name in BACKENDS:
            journal.note(f"{name}: not measured: {reason}")
    try:
        if "check" in chosen:
            with journal.guarded("sharded draws"):
                rows = checks.check_sharded("cuda", BACKENDS["ours"])
                sentence = f"Sharded draws: {rows} rows over NCCL are the whole row's."
                journal.outcome("shards", Outcome(sentence, fields={"rows": rows}))
        if measures:
            _measure(device, options, budget, later, absent, journal)
    except DeviceLost as error:
        journal.note(f"{error}; nothing more is measured", failed=True)
    if "profile" in chosen:
        limit = budget.left(_RESERVED["sanitize"] if "sanitize" in chosen else 0.0)
        journal.outcome("profile", stages.profile(limit, own))
    if "sanitize" in chosen:
        journal.outcome("sanitize", stages.sanitize(budget.left(_REPORT_SECONDS)))
    conclude(journal, plot=options.plot)
    return int(journal.failed)


def absent_providers() -> dict[str, str]:
    """Providers that can't run here, with the reason, as far as is known at once."""
    transformers = None if find_spec("transformers") else "transformers is not installed"
    reasons = {
        "cuda": ptk.backends()[BACKENDS["cuda"]],
        "transformers": transformers,
        "flashinfer": flashinfer_missing(),
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _measure(
    device: Device,
    options: Options,
    budget: Budget,
    later: float,
    absent: Mapping[str, str],
    journal: Journal,
) -> None:
    """Check and time the units that fit in the budget, in their order."""
    check, time = "check" in options.stages, "time" in options.stages
    journal.add([device.copy_record()])
    providers = Providers(lambda call: device.seconds(device.capture([call]), _PROBE_CALLS))

    def measure(case: Case, names: Sequence[str]) -> None:
        sets = make_inputs(case, sets_needed(case.logits_bytes, device.l2_bytes) if time else 1)
        timed: list[timing.Timed] = []
        for name in names:
            with journal.guarded(f"{case}: {name}", ours=name in BACKENDS):
                prepared = providers.prepare(case, name, sets[0])
                if check:
                    prepared.check(sets[0])
                for mode in timing.modes(case, device.l2_bytes) if time else ():
                    timed.append(timing.prepare(device, name, prepared, sets, mode))
        if timed:
            samples = timing.time_all(device, timed)
            journal.add(timing.records(case, timed, samples, journal.copy_rate, checked=check))

    dropped = []
    with progress_bar(len(options.units)) as tick:
        for unit in options.units:
            tick(str(unit.case))
            kind = "compiled" if unit.compiles else "plain"
            if not budget.fits(kind, later):
                dropped.append(str(unit))
            elif not fits(unit.case, device.l2_bytes, device.memory_bytes):
                journal.note(f"{unit.case}: not measured, its inputs need more memory")
            else:
                with budget.spending(kind), journal.guarded(str(unit.case)):
                    measure(unit.case, [name for name in unit.providers if name not in absent])
                release()
    if dropped:
        journal.note(
            f"Not measured for lack of time, {len(dropped)} of {len(options.units)}, least "
            f"important last: {'; '.join(dropped)}"
        )


def conclude(journal: Journal, *, plot: bool) -> None:
    """Table, Markdown and picture."""
    timed = [r for r in journal.records if "provider" in r]
    page = draw = None
    if timed:
        report.print_times(timed, journal.copy_rate, journal.where)
        page = report.markdown(timed, journal.copy_rate, journal.where)
        title = f"sample, bf16, V = 128,256, {journal.where}"
        draw = partial(report.draw, timed, title=title) if plot else None
    journal.conclude(page, draw)
