"""Drafts that cost no forward: what followed the same tokens earlier in the text.

Source: Saxena 2023, prompt lookup decoding; Yang et al. 2023, arXiv 2304.04487.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_NGRAM, _MIN_NGRAM = 3, 2
"""Tokens that must be equal: three where there are such, at least two."""


class History:
    """The text of each slot so far, base's prompt and output, on the device.

    Args:
        max_batch_size: number of slots.
        capacity: tokens that a slot can hold, drafts included.
        device: where the drafts are wanted.
    """

    def __init__(self, max_batch_size: int, capacity: int, device: torch.device) -> None:
        self.token_ids = torch.full((max_batch_size, capacity), -1, device=device)
        self.lengths = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self._span = torch.arange(capacity, device=device)

    def start(self, slot: int, token_ids: list[int]) -> None:
        """Begin with a prompt and the first output token."""
        self.token_ids[slot] = -1
        self.token_ids[slot, : len(token_ids)] = torch.tensor(token_ids).to(self.token_ids.device)
        self.lengths[slot] = len(token_ids)

    def move(self, source: int, target: int) -> None:
        """Move what a slot holds to another."""
        self.token_ids[target] = self.token_ids[source]
        self.lengths[target] = self.lengths[source]

    def state(self) -> list[Tensor]:
        """What a step changes; a text past its length is never read."""
        return [self.lengths]

    def append(self, token_ids: Tensor, counts: Tensor) -> None:
        """Add the first ``counts`` [B] of the tokens [B, q] to the first B slots."""
        rows, width = token_ids.shape
        places = self.lengths[:rows, None] + self._span[:width]
        # A slot that nobody runs in stays put at the end.
        places = places.clamp(max=self._span.shape[0] - 1)
        self.token_ids[:rows].scatter_(1, places, token_ids)
        self.lengths[:rows] += counts

    def lookup(self, rows: int, width: int) -> Tensor:
        """Drafts int64 [B, width] for the first B slots, -1 where there are none.

        They are what followed the latest earlier occurrence of a row's last three tokens, or of
        its last two.
        """
        history, lengths = self.token_ids[:rows], self.lengths[:rows, None]
        matched = torch.zeros_like(history)
        unbroken = self._span < lengths - 1
        for back in range(_MAX_NGRAM):
            last = history.gather(1, (lengths - 1 - back).clamp(min=0))
            shifted = history.roll(back, 1)
            # Rolled tokens come from the end of the row: no n-gram begins before the text.
            unbroken = unbroken & (shifted == last) & (self._span >= back) & (lengths > back)
            matched += unbroken
        # The longest match, among those the latest.
        rank = matched * self._span.shape[0] + self._span
        end = rank.argmax(1, keepdim=True)
        places = end + 1 + self._span[:width]
        drafts = history.gather(1, places.clamp(max=self._span.shape[0] - 1))
        found = (matched.gather(1, end) >= _MIN_NGRAM) & (places < lengths)
        return torch.where(found, drafts, -1)
