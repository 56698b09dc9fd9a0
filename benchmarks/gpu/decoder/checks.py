"""Is it right on this device? Before anything is timed, on the shipped trio.

Greedy tokens of every mode against the naive loop's, in fp32, where a difference must be a tie
within rounding. Sampled tokens of speculation against plain decoding's, in fp64, where rounding
can't explain a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from transformers.utils.logging import disable_progress_bar

import proxytune_kernels as ptk
from benchmarks.agreement import greedy_mismatches
from benchmarks.gpu.contract import Outcome
from benchmarks.gpu.decoder.modes import MODES, OURS, SEPARATE, SHARED, Mode
from benchmarks.gpu.decoder.random_models import adapted_model
from benchmarks.prompts import make_prompts
from proxytune_kernels import Trio

_ROWS, _PROMPT, _TOKENS = 4, 12, 32
_ADAPTER_SEED = 3


def shipped_trios(device: str, dtype: str) -> dict[str, Trio]:
    """The shipped trio, and the same with a random adapter on the anti-expert as its expert."""
    disable_progress_bar()  # it would tear up ours
    trio = ptk.load_trio("shipped", dtype=dtype, device=device)
    expert = adapted_model(trio.anti, _ADAPTER_SEED)
    shared = Trio.from_models(trio.base, expert, trio.anti, dict(trio.tokenizers))
    return {SEPARATE: trio, SHARED: shared}


class Checks:
    """Holds modes to the naive loop and to plain decoding, on a device."""

    def __init__(self, device: str) -> None:
        self._single = shipped_trios(device, "float32")
        self._double = shipped_trios(device, "float64")

    def check(self, mode: Mode) -> Outcome:
        """Whether a mode decodes the tokens that it has to."""
        ties, wrong = self._greedy(mode)
        done = f"greedy tokens are the naive loop's, {len(ties)} ties"
        if mode.drafts:
            wrong += self._coupled(mode)
            done += "; sampled tokens are plain decoding's (fp64)"
        sentence = "\n".join((f"{mode.name}: wrong:", *wrong)) if wrong else f"{mode.name}: {done}."
        return Outcome(sentence, bool(wrong), {"mode": mode.name, "ties": ties})

    def _greedy(self, mode: Mode) -> tuple[list[str], list[str]]:
        """Differences that are ties within rounding, and those that are not."""
        trio = self._single[mode.pair]
        provider = mode.make(self._single, _ROWS, _PROMPT + _TOKENS)
        prompts = make_prompts(trio, _ROWS, _PROMPT)
        found = greedy_mismatches([provider], trio, prompts, _TOKENS)
        ties = [str(m) for m in found if m.within_rounding]
        return ties, [str(m) for m in found if not m.within_rounding]

    def _coupled(self, mode: Mode) -> list[str]:
        """Rows whose sampled tokens are not plain decoding's with the same seeds."""
        rows = zip(self._plain, _sampled(mode, self._double), strict=True)
        return [
            f"prompt {row}: {have} where plain decoding has {want}"
            for row, (want, have) in enumerate(rows)
            if want != have
        ]

    @cached_property
    def _plain(self) -> list[list[int]]:
        return _sampled(MODES[OURS], self._double)


def _sampled(mode: Mode, trios: Mapping[str, Trio]) -> list[list[int]]:
    """Tokens of a mode at the timed runs' parameters, a seed for each row."""
    prompts = make_prompts(trios[mode.pair], _ROWS, _PROMPT)
    return mode.make(trios, _ROWS, _PROMPT + _TOKENS).generate(prompts, _TOKENS).token_ids
