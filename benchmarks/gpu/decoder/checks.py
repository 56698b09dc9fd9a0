"""Is it right on this device? Before anything is timed, on the shipped trio.

Greedy tokens of every mode against the naive loop's, in fp32, where a difference must be a tie
within rounding. Sampled tokens of speculation against plain decoding's, in fp64, where rounding
can't explain a difference. What is timed is in bf16, where attention may run by another kernel:
there differences are reported, as two computations are too few to tell how far a third may lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from transformers.utils.logging import disable_progress_bar

import proxytune_kernels as ptk
from benchmarks.agreement import Mismatch, greedy_mismatches
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
        self._half = shipped_trios(device, "bfloat16")
        self._single = shipped_trios(device, "float32")
        self._double = shipped_trios(device, "float64")

    def check(self, mode: Mode) -> Outcome:
        """Whether a mode decodes the tokens that it has to."""
        found = _greedy(mode, self._single)
        wrong = [str(m) for m in found if not m.within_rounding]
        done = f"greedy tokens are the naive loop's, {len(found)} ties"
        if mode.drafts:
            wrong += self._coupled(mode)
            done += "; sampled tokens are plain decoding's (fp64)"
        half = _greedy(mode, self._half)
        done += f"; in bf16 those of {_ROWS - len(half)} of {_ROWS} texts"
        beyond = sum(not m.within_rounding for m in half)
        if beyond:
            done += f", and {beyond} leave them by more than the naive loop's own rounding"
        sentence = "\n".join((f"{mode.name}: wrong:", *wrong)) if wrong else f"{mode.name}: {done}."
        fields = {"mode": mode.name, "ties": len(found), "bf16": [str(m) for m in half]}
        return Outcome(sentence, bool(wrong), fields)

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


def _greedy(mode: Mode, trios: Mapping[str, Trio]) -> list[Mismatch]:
    """Where a mode's greedy tokens first leave the naive loop's, for each text that does."""
    trio = trios[mode.pair]
    provider = mode.make(trios, _ROWS, _PROMPT + _TOKENS)
    return greedy_mismatches([provider], trio, make_prompts(trio, _ROWS, _PROMPT), _TOKENS)


def _sampled(mode: Mode, trios: Mapping[str, Trio]) -> list[list[int]]:
    """Tokens of a mode at the timed runs' parameters, a seed for each row."""
    prompts = make_prompts(trios[mode.pair], _ROWS, _PROMPT)
    return mode.make(trios, _ROWS, _PROMPT + _TOKENS).generate(prompts, _TOKENS).token_ids
