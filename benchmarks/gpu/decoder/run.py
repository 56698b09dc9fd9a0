"""The decoder's run: is it right, then trio by trio and batch by batch, results as they come."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import proxytune_kernels as ptk
from benchmarks.gpu.decoder import report, trace
from benchmarks.gpu.decoder.modes import MODES, NAIVE, OURS, Mode, ModeTimes, records
from benchmarks.gpu.decoder.random_models import (
    SEPARATE,
    TrioShape,
    build_trios,
    weights_record,
    with_shared_pair,
)
from benchmarks.gpu.device import Device
from benchmarks.gpu.session import Budget, DeviceLost, Journal, Outcome, Record, release, say
from benchmarks.harness.agreement import Mismatch, greedy_mismatches
from benchmarks.harness.decoding import DecoderProvider, Generation, Provider
from benchmarks.harness.measure import in_turns
from benchmarks.harness.trios import make_prompts, quiet_loading
from proxytune_kernels import Trio

Trios = Mapping[str, Trio]
Texts = list[list[int]]

_PROMPT, _TOKENS = 32, 33
"""Short, so that the keys and values are under 1% of the weights at batch 1."""
_MAX_SEQ_LEN = 80  # more than either needs
_REPEATS = 5
_CHECKED_ROWS, _CHECKED_PROMPT, _CHECKED_TOKENS = 4, 12, 32
_DECODING = "decoding"  # the budget's name for a trio at a batch size
_REPORT_SECONDS = 10.0
_NEXT_TRIO_SECONDS = 90.0  # kept back for each trio that is still to come


def run(
    device: Device,
    shapes: Sequence[TrioShape],
    batch_sizes: Sequence[int],
    output: Path,
    budget: Budget,
    *,
    plot: bool,
) -> int:
    """Check, build, time, profile; the exit code is 0, or 1 where ours failed or was wrong."""
    journal = Journal(output, device.describe())
    try:
        right = _check_all(journal)
        journal.add([device.copy_record()])
        for i, shape in enumerate(shapes):
            later = _REPORT_SECONDS + _NEXT_TRIO_SECONDS * (len(shapes) - i - 1)
            needed = shape.planned_bytes()
            if needed > device.memory_bytes:
                journal.note(
                    f"{shape.name}: not run: the weights take {needed / 1e9:,.1f} GB, the device "
                    f"has {device.memory_bytes / 1e9:,.1f} GB"
                )
            elif not budget.fits(_DECODING, later):
                journal.note(f"{shape.name}: not run for lack of time")
            else:
                with journal.guarded(shape.name):
                    _measure_trio(shape, batch_sizes, right, journal, budget, later)
                release()
    except DeviceLost as error:
        journal.note(f"{error}; nothing more is measured", failed=True)
    _conclude(journal, plot=plot)
    return int(journal.failed)


def _check_all(journal: Journal) -> list[Mode]:
    """Modes that are right on the shipped trio: what is not is not timed."""
    right = [MODES[NAIVE]]
    quiet_loading()
    with journal.guarded("checks"):
        trios = {
            dtype: with_shared_pair(ptk.load_trio("shipped", dtype=dtype, device="cuda"))
            for dtype in ("bfloat16", "float32", "float64")
        }
        plain = cache(partial(sampled, MODES[OURS], trios["float64"]))
        for mode in MODES.values():
            if mode.name != NAIVE:
                with journal.guarded(mode.name):
                    outcome = check(mode, trios, plain)
                    journal.outcome("check", outcome)
                    right += [] if outcome.failed else [mode]
    release()
    return right


def check(mode: Mode, trios: Mapping[str, Trios], plain: Callable[[], Texts]) -> Outcome:
    """Whether a mode decodes the tokens that it has to.

    Greedy tokens against the naive loop's, in fp32, where a difference must be a tie within
    rounding. Sampled tokens of speculation against plain decoding's, in fp64, where rounding can't
    explain a difference. What is timed is in bf16, where attention may run by another kernel: there
    differences are reported, as two computations are too few to tell how far a third may lie.

    Args:
        mode: which.
        trios: the shipped trio with both pairs, by dtype.
        plain: gives the tokens that plain decoding samples in fp64.
    """
    found = _greedy(mode, trios["float32"])
    wrong = [str(m) for m in found if not m.within_rounding]
    done = f"greedy tokens are the naive loop's, {len(found)} ties"
    if mode.drafts:
        pairs = enumerate(zip(plain(), sampled(mode, trios["float64"]), strict=True))
        wrong += [
            f"prompt {row}: {have} where plain decoding has {want}"
            for row, (want, have) in pairs
            if want != have
        ]
        done += "; sampled tokens are plain decoding's (fp64)"
    half = _greedy(mode, trios["bfloat16"])
    done += f"; in bf16 those of {_CHECKED_ROWS - len(half)} of {_CHECKED_ROWS} texts"
    if beyond := sum(not m.within_rounding for m in half):
        done += f", and {beyond} leave them by more than the naive loop's own rounding"
    sentence = "\n".join((f"{mode.name}: wrong:", *wrong)) if wrong else f"{mode.name}: {done}."
    fields = {"mode": mode.name, "ties": len(found), "bf16": [str(m) for m in half]}
    return Outcome(sentence, bool(wrong), fields)


def _greedy(mode: Mode, trios: Trios) -> list[Mismatch]:
    """Where a mode's greedy tokens first leave the naive loop's, for each text that does."""
    trio = trios[mode.pair]
    provider = mode.make(trios, _CHECKED_ROWS, _CHECKED_PROMPT + _CHECKED_TOKENS)
    prompts = make_prompts(trio, _CHECKED_ROWS, _CHECKED_PROMPT)
    return greedy_mismatches([provider], trio, prompts, _CHECKED_TOKENS)


def sampled(mode: Mode, trios: Trios) -> Texts:
    """Tokens of a mode at the timed runs' parameters, a seed for each row."""
    provider = mode.make(trios, _CHECKED_ROWS, _CHECKED_PROMPT + _CHECKED_TOKENS)
    prompts = make_prompts(trios[mode.pair], _CHECKED_ROWS, _CHECKED_PROMPT)
    return provider.generate(prompts, _CHECKED_TOKENS).token_ids


def _measure_trio(
    shape: TrioShape,
    batch_sizes: Sequence[int],
    right: Sequence[Mode],
    journal: Journal,
    budget: Budget,
    later: float,
) -> None:
    trios = build_trios(shape, "cuda")
    weights = weights_record(shape, trios)
    journal.add([weights])
    say(report.weights_line(weights))
    for batch_size in batch_sizes:
        what = f"{shape.name}, batch {batch_size}"
        if not budget.fits(_DECODING, later):
            journal.note(f"{what}: not run for lack of time")
            continue
        modes = [mode for mode in right if batch_size == 1 or mode.any_batch]
        with budget.spending(_DECODING), journal.guarded(what):
            timed = time_modes(modes, trios, batch_size, journal, what)
            shared: Record = {"op": "decode", "trio": shape.name, "title": shape.title}
            shared = {**shared, "prompt_length": _PROMPT, "output_length": _TOKENS}
            lines = records(timed, batch_size, _TOKENS, journal.copy_rate)
            journal.add([{**shared, **line} for line in lines])
            for t in timed:
                if t.mode.name == OURS and batch_size == 1:
                    assert isinstance(t.provider, DecoderProvider)
                    _profile(shape, t.provider, journal)
        release()


def time_modes(
    modes: Sequence[Mode], trios: Trios, batch_size: int, journal: Journal, what: str
) -> list[ModeTimes]:
    """Run all modes in turn; each has run before: what is compiled or captured is there."""
    prompts = make_prompts(trios[SEPARATE], batch_size, _PROMPT)
    providers = {}
    for mode in modes:
        with journal.guarded(f"{what}: {mode.name}"):
            provider = mode.make(trios, batch_size, _MAX_SEQ_LEN)
            provider.generate(prompts, _TOKENS)
            providers[mode.name] = provider
    say(f"{what}: timing {len(providers)} modes")

    def generate(provider: Provider, repeat: int) -> Generation:
        return provider.generate(prompts, _TOKENS)

    calls = {name: partial(generate, provider) for name, provider in providers.items()}
    found = in_turns(calls, _REPEATS)
    return [ModeTimes(MODES[name], provider, found[name]) for name, provider in providers.items()]


def _profile(shape: TrioShape, provider: DecoderProvider, journal: Journal) -> None:
    """Profile plain steps of ours, and run some with synchronisation forbidden."""
    with journal.guarded(f"{shape.name}: synchronisation"):
        record = trace.synchronisation_record(provider, _PROMPT)
        journal.add([{"trio": shape.name, **record}])
        said = record["raised"] or "no synchronisation with the host"
        say(f"{shape.name}: graphs: {record['graphs']}; in plain steps: {said}")
    with journal.guarded(f"{shape.name}: profile"), tempfile.TemporaryDirectory() as folder:
        record = trace.profile(provider, _PROMPT, Path(folder) / "trace.json")
        journal.add([{"trio": shape.name, **record}])
        say(f"{shape.name}: no kernel runs in {record['idle_share']:.1%} of the time")


def _conclude(journal: Journal, *, plot: bool) -> None:
    """Table, Markdown and picture."""
    timed = [r for r in journal.records if r["op"] == "decode"]
    page = draw = None
    if timed:
        weights = [r for r in journal.records if r["op"] == "weights"]
        report.print_modes(timed, journal.copy_rate, journal.where)
        page = report.markdown(weights, timed, journal.copy_rate, journal.where)
        if plot and any(r["batch_size"] == 1 for r in timed):
            draw = partial(report.draw, timed, title=journal.where)
    journal.conclude(page, draw)
