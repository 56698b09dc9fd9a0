"""Step times of several modes, in turns, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from benchmarks.gpu.decoder.break_even import break_even
from benchmarks.gpu.decoder.modes import BASE_ONLY, NAIVE, OURS, Mode
from benchmarks.gpu.decoder.random_models import step_bytes
from benchmarks.measure import Summary, paired_ratios
from benchmarks.providers import DecoderProvider, Generation, Prompts, Provider

_MS = 1e3

Record = dict[str, Any]


def intervals(generation: Generation, drafts: int) -> list[float]:
    """Seconds between what a row's caller got and what it got next, all rows after each other.

    A plain step gives a token, a round of speculation one to ``drafts + 1`` at once. Rounds that
    had to end the text are left out: they may draft less.
    """
    found = []
    for times in generation.seconds:
        for i in range(1, len(times)):
            if times[i] != times[i - 1] and len(times) - i > drafts:
                found.append(times[i] - times[i - 1])
    return found


@dataclass
class ModeTimes:
    """One mode's measurements, repeat by repeat."""

    mode: Mode
    provider: Provider
    models: Sequence[Any]
    """What a step runs."""
    steps: list[float] = field(default_factory=list)
    """Median seconds between two events of a row: a step, or a round."""
    means: list[float] = field(default_factory=list)
    """Their mean."""
    totals: list[float] = field(default_factory=list)
    """Seconds from the call to the last token."""

    def add(self, generation: Generation) -> None:
        """Take in one repeat.

        Raises:
            ValueError: there is no step in it.
        """
        seconds = intervals(generation, self.mode.drafts)
        if not seconds:
            raise ValueError(f"{self.mode.name}: no whole step in {len(generation.seconds)} rows")
        self.steps.append(median(seconds))
        self.means.append(fmean(seconds))
        self.totals.append(max(times[-1] for times in generation.seconds))

    def read_bytes(self) -> int | None:
        """Bytes of weights that a plain step reads; a round reads some of them several times."""
        return None if self.mode.drafts else step_bytes(self.models)


def time_modes(
    timed: Sequence[ModeTimes], prompts: Prompts, max_tokens: int, repeats: int
) -> dict[str, Mapping[str, int]]:
    """Run all modes in turn, ``repeats`` times over: A B C A B C. They have run before.

    Returns:
        What our decoders counted meanwhile, by mode.
    """
    before = {t.mode.name: _statistics(t.provider) for t in timed}
    for _ in range(repeats):
        for t in timed:
            t.add(t.provider.generate(prompts, max_tokens))
    return {
        t.mode.name: {
            key: value - before[t.mode.name][key] for key, value in _statistics(t.provider).items()
        }
        for t in timed
    }


def _statistics(provider: Provider) -> dict[str, int]:
    if not isinstance(provider, DecoderProvider):
        return {}
    return dict(provider.decoder.statistics())


def records(
    timed: Sequence[ModeTimes],
    batch_size: int,
    max_tokens: int,
    copy_rate: float,
) -> list[Record]:
    """A line of results for each mode; ratios are paired by repeat.

    Args:
        timed: modes measured in the same repeats.
        batch_size: rows of each.
        max_tokens: output tokens of each row.
        copy_rate: bytes per second, read and written, of a device-to-device copy.
    """
    by_name = {t.mode.name: t for t in timed}
    tokens = batch_size * max_tokens
    lines = []
    for t in timed:
        read = t.read_bytes()
        floor = None if read is None else read / copy_rate
        lines.append(
            {
                "mode": t.mode.name,
                "drafts": t.mode.drafts,
                "batch_size": batch_size,
                "repeats": len(t.steps),
                "set_up_seconds": t.provider.set_up_seconds,
                "step_ms": asdict(Summary.of(s * _MS for s in t.steps)),
                "mean_step_ms": asdict(Summary.of(s * _MS for s in t.means)),
                "tokens_per_second": asdict(Summary.of(tokens / s for s in t.totals)),
                "step_bytes": read,
                "floor_ms": None if floor is None else floor * _MS,
                "step_over_floor": None
                if floor is None
                else asdict(paired_ratios(t.steps, [floor] * len(t.steps))),
                "step_over_base_only": _over(t, by_name.get(BASE_ONLY)),
                "naive_over_step": _over(by_name.get(NAIVE), t),
                "step_over_ours": _over(t, by_name.get(OURS)),
                "break_even": _break_even(t, by_name),
            }
        )
    return lines


def _over(t: ModeTimes | None, other: ModeTimes | None) -> dict[str, float] | None:
    """Step of one over another's, paired by repeat; None where one was not measured."""
    if t is None or other is None:
        return None
    return asdict(paired_ratios(t.steps, other.steps))


def _break_even(t: ModeTimes, by_name: Mapping[str, ModeTimes]) -> dict[str, float | None] | None:
    """Acceptance from which rounds are faster than plain steps of ours, and than the base alone.

    A name is missing where that was not measured, and None where no acceptance is enough.
    """
    if not t.mode.drafts:
        return None
    took = Summary.of(t.steps).median
    return {
        name: break_even(took, Summary.of(by_name[name].steps).median, t.mode.drafts)
        for name in (OURS, BASE_ONLY)
        if name in by_name
    }
