"""The run: is it right, then trio by trio and batch by batch, results saved as they come."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.decoder import checks, profiling, report, trace
from benchmarks.gpu.decoder.build import build_trios, planned_bytes, weights_record
from benchmarks.gpu.decoder.modes import MODES, NAIVE, OURS, SEPARATE, Mode, modes
from benchmarks.gpu.decoder.shapes import TrioShape
from benchmarks.gpu.decoder.steps import ModeTimes, records, time_modes
from benchmarks.gpu.decoder.targets import verdicts
from benchmarks.gpu.decoder.trace import Idle, Trace
from benchmarks.gpu.device import Device, first_line
from benchmarks.gpu.report import where
from benchmarks.gpu.run import Journal, measure_copy, say
from benchmarks.gpu.units import DeviceLost
from benchmarks.prompts import make_prompts
from benchmarks.providers import DecoderProvider, Prompts
from proxytune_kernels import Trio

_PROMPT, _TOKENS = 32, 33
"""Short, so that the keys and values are under 1% of the weights at batch 1."""
_MAX_SEQ_LEN = 80  # more than either needs
_REPEATS = 5
_DECODING = "decoding"  # the budget's name for a trio at a batch size
_REPORT_SECONDS = 10.0
_NEXT_TRIO_SECONDS = 90.0  # kept back for each trio that is still to come


@dataclass(frozen=True)
class Options:
    """What to do."""

    trios: tuple[TrioShape, ...]
    batch_sizes: tuple[int, ...]
    output: Path
    plot: bool = True


def run(device: Device, options: Options, budget: Budget) -> int:
    """Check, build, time, profile; the exit code is 0, or 1 where ours failed or was wrong."""
    session = _Session(device, options, budget)
    try:
        session.check()
        session.measure()
    except DeviceLost as error:
        session.journal.note(f"{error}; nothing more is measured", failed=True)
    session.report()
    return int(session.journal.failed)


class _Session:
    """One run's state: what it writes to, and what time is left."""

    def __init__(self, device: Device, options: Options, budget: Budget) -> None:
        self.journal = Journal(options.output, device.describe())
        self._device, self._options, self._budget = device, options, budget
        self._pictures: list[Path] = []
        self._copy_rate = 0.0
        self._right: set[str] = set()

    def check(self) -> None:
        """Hold every mode to the naive loop on the shipped trio; what is not right is not timed."""
        self._right.add(NAIVE)
        with self._guarded("checks"):
            found = checks.Checks(self._device.torch_device)
            for mode in MODES.values():
                if mode.name != NAIVE:
                    self._check_mode(found, mode)
        self._release()

    def _check_mode(self, found: checks.Checks, mode: Mode) -> None:
        with self._guarded(mode.name):
            outcome = found.check(mode)
            self.journal.outcome("check", outcome)
            if not outcome.failed:
                self._right.add(mode.name)

    def measure(self) -> None:
        """Build and time the trios that fit in memory and in time, in their order."""
        self._copy_rate = measure_copy(self._device, self.journal)
        for i, shape in enumerate(self._options.trios):
            later = _REPORT_SECONDS + _NEXT_TRIO_SECONDS * (len(self._options.trios) - i - 1)
            needed = planned_bytes(shape)
            if needed > self._device.memory_bytes:
                self.journal.note(
                    f"{shape.name}: not run: the weights take {needed / 1e9:,.1f} GB, the device "
                    f"has {self._device.memory_bytes / 1e9:,.1f} GB"
                )
            elif not self._budget.fits(_DECODING, later):
                self.journal.note(f"{shape.name}: not run for lack of time")
            else:
                with self._guarded(shape.name):
                    self._measure_trio(shape, later)
                self._release()

    def _measure_trio(self, shape: TrioShape, later: float) -> None:
        trios = build_trios(shape, self._device.torch_device)
        weights = weights_record(shape, trios)
        self.journal.add([weights])
        say(report.weights_line(weights))
        for batch_size in self._options.batch_sizes:
            what = f"{shape.name}, batch {batch_size}"
            if not self._budget.fits(_DECODING, later):
                self.journal.note(f"{what}: not run for lack of time")
                continue
            start = self._budget.now()
            with self._guarded(what):
                self._measure_batch(shape, trios, batch_size, what)
            self._release()
            self._budget.spent(_DECODING, self._budget.now() - start)

    def _measure_batch(
        self, shape: TrioShape, trios: Mapping[str, Trio], batch_size: int, what: str
    ) -> None:
        prompts = make_prompts(trios[SEPARATE], batch_size, _PROMPT)
        timed: list[ModeTimes] = []
        for mode in modes(batch_size):
            if mode.name in self._right:
                with self._guarded(f"{what}: {mode.name}"):
                    timed.append(_prepare(mode, trios, prompts))
        say(f"{what}: timing {len(timed)} modes")
        counted = time_modes(timed, prompts, _TOKENS, _REPEATS)
        lines = records(timed, batch_size, _TOKENS, self._copy_rate)
        shared: dict[str, Any] = {"op": "decode", "trio": shape.name, "title": shape.title}
        shared |= {"prompt_length": _PROMPT, "output_length": _TOKENS}
        for line, t in zip(lines, timed, strict=True):
            decoder = t.provider.decoder if isinstance(t.provider, DecoderProvider) else None
            line["decoder"] = None if decoder is None else decoder.info()
            line["counted"] = counted[t.mode.name]
        self.journal.add([{**shared, **line} for line in lines])
        if batch_size == 1:
            self._profile(shape, timed)

    def _profile(self, shape: TrioShape, timed: Sequence[ModeTimes]) -> None:
        """Profile plain steps of ours, and run some with synchronisation forbidden."""
        provider = next((t.provider for t in timed if t.mode.name == OURS), None)
        if not isinstance(provider, DecoderProvider):
            return
        with self._guarded(f"{shape.name}: synchronisation"):
            record = profiling.synchronisation_record(provider, _PROMPT)
            self.journal.add([{"trio": shape.name, **record}])
        with self._guarded(f"{shape.name}: profile"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            found, idle = profiling.profile(provider, _PROMPT, path, self._device.synchronize)
            self.journal.add([{"trio": shape.name, **profiling.trace_record(found, idle)}])
            if self._can_plot():
                self._plot_trace(shape, found, idle)

    def _can_plot(self) -> bool:
        return self._options.plot and importlib.util.find_spec("matplotlib") is not None

    def _plot_trace(self, shape: TrioShape, found: Trace, idle: Idle) -> None:
        from benchmarks.gpu.decoder import plots

        path = self._beside(f"trace-{shape.name}.png")
        window = trace.middle(found, profiling.STEPS, profiling.SHOWN)
        title = (
            f"{shape.title}: {profiling.SHOWN} steps at batch 1, no kernel in {idle.share:.1%} of "
            f"the time\n{self._where()}"
        )
        plots.plot_trace(found, window, path, title)
        self._pictures.append(path)

    def report(self) -> None:
        """Table, Markdown, pictures, and the verdicts last."""
        journal = self.journal
        judged = verdicts(journal.records)
        journal.add([{"op": "target", **asdict(verdict)} for verdict in judged])
        written = [self._options.output]
        timed = [r for r in journal.records if r["op"] == "decode"]
        if timed:
            report.print_modes(timed, journal.device, self._copy_rate)
            page = self._options.output.with_suffix(".md")
            weights = [r for r in journal.records if r["op"] == "weights"]
            text = report.markdown(weights, timed, journal.device, self._copy_rate, judged)
            page.write_text(text)
            written += [page, *self._plot_steps(timed)]
        for verdict in judged:
            say(str(verdict))
        for path in (*written, *self._pictures):
            say(f"Wrote {path}")

    def _plot_steps(self, timed: Sequence[Mapping[str, Any]]) -> list[Path]:
        if self._options.plot and not self._can_plot():
            self.journal.note("No pictures: matplotlib is not installed (pip install matplotlib).")
        if not self._can_plot() or all(r["batch_size"] > 1 for r in timed):
            return []
        from benchmarks.gpu.decoder import plots

        path = self._beside("steps.png")
        plots.plot_steps(timed, path, self._where())
        return [path]

    def _where(self) -> str:
        return where(self.journal.device)

    def _beside(self, name: str) -> Path:
        stem = self._options.output.with_suffix("")
        return stem.with_name(f"{stem.name}-{name}")

    def _release(self) -> None:
        gc.collect()
        self._device.release()

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Turn what goes wrong into a sentence; too little memory is no failure.

        Raises:
            DeviceLost: nothing can run on the device any more.
        """
        lost = None
        try:
            yield
        except DeviceLost:
            raise
        except torch.OutOfMemoryError:
            self.journal.note(f"{what}: not run, the device's memory does not suffice")
        except Exception as error:
            self.journal.note(f"{what}: failed: {first_line(error)}", failed=True)
            try:
                self._device.synchronize()
            except Exception as after:
                lost = first_line(after)
        else:
            return
        # Only now: while it was handled, the error held on to all that its frames had made.
        if lost is not None:
            raise DeviceLost(f"{what}: the device is lost: {lost}")
        self._release()


def _prepare(mode: Mode, trios: Mapping[str, Trio], prompts: Prompts) -> ModeTimes:
    """A mode that has run once: what is compiled or captured is there."""
    provider = mode.make(trios, len(prompts), _MAX_SEQ_LEN)
    provider.generate(prompts, _TOKENS)
    models = trios[mode.pair].models
    return ModeTimes(mode, provider, [models[role] for role in provider.roles])
