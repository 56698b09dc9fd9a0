"""Ways to decode a trio that are timed side by side, and what their step times say.

With random weights a draft is accepted by chance alone, so what is measured of speculation is the
time of a round of k drafts. How many tokens it emits depends on the acceptance, which is a property
of real models and their text. With each draft accepted with probability a, independently, a round
emits the accepted drafts and one token more:

    E(a, k) = 1 + a + ... + a^k = (1 - a^(k + 1)) / (1 - a)

Source: Leviathan et al. 2023, arXiv 2211.17192, equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, NamedTuple

import proxytune_kernels as ptk
from benchmarks.gpu.decoder.random_models import SEPARATE, SHARED, step_bytes
from benchmarks.harness.decoding import DecoderProvider, Generation, NaiveLoop, Provider
from benchmarks.harness.measure import ratios, summary
from proxytune_kernels import Trio

NAIVE, BASE_ONLY, OURS = "naive", "base-only", "ours"
SHARED_PAIR, BATCHED_PAIR = "ours-shared-pair", "ours-batched-pair"
EAGER, ONE_STREAM = "ours-eager", "ours-one-stream"
DRAFTS = (1, 2, 4, 8)
_MAIN_DRAFTS = 4  # of the one speculative mode that runs at batches of several rows
_BISECTIONS = 60  # 2^-60 of [0, 1] is less than an ulp


@dataclass(frozen=True)
class Mode:
    """One way to decode.

    Args:
        name: as in the results.
        options: of :class:`proxytune_kernels.Decoder`; None for the loop a researcher writes.
        pair: which of the trios it decodes.
        drafts: of each round of speculation, always as many; 0 without it.
        any_batch: it is timed at batches of several rows too.
    """

    name: str
    options: Mapping[str, Any] | None = field(default_factory=lambda: {"pair": "separate"})
    pair: str = SEPARATE
    drafts: int = 0
    any_batch: bool = True

    def make(self, trios: Mapping[str, Trio], max_batch_size: int, max_seq_len: int) -> Provider:
        """Make what decodes, with room for so many rows of so many tokens."""
        trio = trios[self.pair]
        if self.options is None:
            return NaiveLoop(trio)
        options = dict(self.options)
        if self.drafts:
            # Not adaptive: with drafts that are never accepted it would turn itself off.
            options["speculation"] = ptk.Speculation(max_drafts=self.drafts, adaptive=False)
        provider = DecoderProvider(
            self.name, trio, max_batch_size=max_batch_size, max_seq_len=max_seq_len, **options
        )
        if self.name == ONE_STREAM:
            # Base and pair one after the other: no option of the decoder, here to be compared.
            # Nothing is captured yet.
            provider.decoder._runner._side = None
        return provider


def speculative(drafts: int) -> str:
    """The name of the mode that drafts so many tokens a round."""
    return f"ours-speculative-{drafts}"


_MODES = (
    Mode(NAIVE, None),
    Mode(BASE_ONLY, {"roles": ("base",)}),
    Mode(OURS),
    Mode(SHARED_PAIR, {"pair": "shared"}, pair=SHARED),
    Mode(EAGER, {"pair": "separate", "graphs": False}, any_batch=False),
    Mode(ONE_STREAM, any_batch=False),
    *(Mode(speculative(k), drafts=k, any_batch=k == _MAIN_DRAFTS) for k in DRAFTS),
    # Last: it holds the pair's weights once more, and may not fit.
    Mode(BATCHED_PAIR, {"pair": "batched"}, any_batch=False),
)
MODES = {mode.name: mode for mode in _MODES}
"""By name, in the order of the table."""


class ModeTimes(NamedTuple):
    """One mode's measurements: in each repeat, what every row's caller got and when."""

    mode: Mode
    provider: Provider
    generations: Sequence[Generation]

    def steps(self) -> list[list[float]]:
        """Seconds of each step, or round, by repeat."""
        found = [intervals(generation, self.mode.drafts) for generation in self.generations]
        if not all(found):
            rows = len(self.generations[0].seconds)
            raise ValueError(f"{self.mode.name}: no whole step in {rows} rows")
        return found

    def step_bytes(self) -> int | None:
        """Bytes of weights that a plain step reads; a round reads some of them several times."""
        models = self.provider.trio.models
        return None if self.mode.drafts else step_bytes([models[r] for r in self.provider.roles])


def intervals(generation: Generation, drafts: int) -> list[float]:
    """Seconds between what a row's caller got and what it got next, all rows after each other.

    A plain step gives a token, a round of speculation one to ``drafts + 1`` at once. Rounds that
    had to end the text are left out: they may draft less.
    """
    return [
        times[i] - times[i - 1]
        for times in generation.seconds
        for i in range(1, len(times))
        if times[i] != times[i - 1] and len(times) - i > drafts
    ]


def records(
    timed: Sequence[ModeTimes], batch_size: int, max_tokens: int, copy_rate: float
) -> list[dict[str, Any]]:
    """A line of results for each mode, measured in the same repeats; ratios are paired by repeat.

    Args:
        timed: the modes.
        batch_size: rows of each.
        max_tokens: output tokens of each row.
        copy_rate: bytes per second, read and written, of a device-to-device copy.
    """
    all_steps = {t.mode.name: t.steps() for t in timed}
    medians = {name: [median(s) for s in steps] for name, steps in all_steps.items()}

    def over(name: str, other: str) -> dict[str, float] | None:
        """Steps of one over another's; None where one was not measured."""
        if name not in medians or other not in medians:
            return None
        return ratios(medians[name], medians[other])

    lines = []
    for t in timed:
        name, drafts, steps = t.mode.name, t.mode.drafts, medians[t.mode.name]
        read = t.step_bytes()
        floor = None if read is None else read / copy_rate
        totals = [max(times[-1] for times in g.seconds) for g in t.generations]
        line = {
            "mode": name,
            "drafts": drafts,
            "batch_size": batch_size,
            "repeats": len(steps),
            "set_up_seconds": t.provider.set_up_seconds,
            "step_ms": summary(steps, 1e3),
            "mean_step_ms": summary(map(fmean, all_steps[name]), 1e3),
            "tokens_per_second": summary(batch_size * max_tokens / s for s in totals),
            "step_bytes": read,
            "floor_ms": None if floor is None else floor * 1e3,
            "step_over_floor": None if floor is None else ratios(steps, [floor] * len(steps)),
            "step_over_base_only": over(name, BASE_ONLY),
            "naive_over_step": over(NAIVE, name),
            "step_over_ours": over(name, OURS),
            "break_even": None,
            "counted": {
                key: sum(g.counts[key] for g in t.generations) for key in t.generations[0].counts
            },
        }
        if isinstance(t.provider, DecoderProvider):
            line["decoder"] = t.provider.decoder.info()
        if drafts:
            # Faster than plain steps of ours, and than the base alone, where they were measured.
            line["break_even"] = {
                other: break_even(median(steps), median(medians[other]), drafts)
                for other in (OURS, BASE_ONLY)
                if other in medians
            }
        lines.append(line)
    return lines


def tokens_per_round(acceptance: float, drafts: int) -> float:
    """Expected tokens of a round of drafts, each accepted with a probability in [0, 1]."""
    # Horner's rule; the quotient above is 0 / 0 at acceptance 1.
    total = 1.0
    for _ in range(drafts):
        total = 1.0 + acceptance * total
    return total


def break_even(round_seconds: float, step_seconds: float, drafts: int) -> float | str:
    """The smallest acceptance at which rounds give as many tokens a second as plain steps.

    "never" where not even ``drafts + 1`` tokens a round make up for its time.
    """
    needed = round_seconds / step_seconds
    if needed > drafts + 1:
        return "never"
    if needed <= 1.0:
        return 0.0
    low, high = 0.0, 1.0
    # Tokens grow with the acceptance: [low, high] always holds the answer.
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if tokens_per_round(middle, drafts) >= needed:
            high = middle
        else:
            low = middle
    return high
