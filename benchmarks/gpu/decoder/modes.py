"""Ways to decode a trio that are timed side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import proxytune_kernels as ptk
from benchmarks.providers import DecoderProvider, NaiveLoop, Provider
from proxytune_kernels import Trio

NAIVE, BASE_ONLY, OURS = "naive", "base-only", "ours"
SHARED_PAIR, BATCHED_PAIR = "ours-shared-pair", "ours-batched-pair"
EAGER, ONE_STREAM = "ours-eager", "ours-one-stream"

SEPARATE, SHARED = "separate", "shared"
"""The pair's weights: two models of their own, or one and a LoRA adapter on it."""

DRAFTS = (1, 2, 4, 8)
_MAIN_DRAFTS = 4  # of the one speculative mode that runs at batches of several rows


@dataclass(frozen=True)
class Mode:
    """One way to decode.

    Args:
        name: as in the results.
        options: of :class:`proxytune_kernels.Decoder`; None for the loop a researcher writes.
        pair: which of the trios it decodes.
        one_stream: base and pair run one after the other, where others overlap them.
        drafts: of each round of speculation, always as many; 0 without it.
        any_batch: it is timed at batches of several rows too.
    """

    name: str
    options: Mapping[str, Any] | None = field(default_factory=dict)
    pair: str = SEPARATE
    one_stream: bool = False
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
        if self.one_stream:
            # No option of the decoder: it is here to be compared. Nothing is captured yet.
            provider.decoder._runner._side = None
        return provider


def speculative(drafts: int) -> str:
    """The name of the mode that drafts so many tokens a round."""
    return f"ours-speculative-{drafts}"


MODES = {
    mode.name: mode
    for mode in (
        Mode(NAIVE, None),
        Mode(BASE_ONLY, {"roles": ("base",)}),
        Mode(OURS, {"pair": "separate"}),
        Mode(SHARED_PAIR, {"pair": "shared"}, pair=SHARED),
        Mode(EAGER, {"pair": "separate", "graphs": False}, any_batch=False),
        Mode(ONE_STREAM, {"pair": "separate"}, one_stream=True, any_batch=False),
        *(
            Mode(
                speculative(drafts),
                {"pair": "separate"},
                drafts=drafts,
                any_batch=drafts == _MAIN_DRAFTS,
            )
            for drafts in DRAFTS
        ),
        # Last: it holds the pair's weights once more, and may not fit.
        Mode(BATCHED_PAIR, {"pair": "batched"}, any_batch=False),
    )
}
"""By name, in the order of the table."""


def modes(batch_size: int) -> list[Mode]:
    """Those that are timed at a batch size."""
    return [mode for mode in MODES.values() if batch_size == 1 or mode.any_batch]
