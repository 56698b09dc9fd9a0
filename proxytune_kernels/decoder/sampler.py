"""Draws the slots' next tokens: each slot's sampling parameters, in place, and one op per step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proxytune_kernels import ops
from proxytune_kernels.backends import resolve
from proxytune_kernels.decoder.request import Request
from proxytune_kernels.params import RowParams


class SlotSampler:
    """Sampling parameters, position and last token of each slot.

    Args:
        max_batch_size: number of slots.
        vocab_size: width of the shared vocabulary.
        backend: of :func:`proxytune_kernels.sample`; None is the fastest usable one.
        device: where the logits are.
    """

    def __init__(
        self, max_batch_size: int, vocab_size: int, backend: str | None, device: torch.device
    ) -> None:
        self.device = device
        self.token_ids = torch.zeros((max_batch_size, 1), dtype=torch.int64, device=device)
        self._vocab_size = vocab_size
        self.backend = resolve(backend, self.token_ids, "sample", vocab_size)
        self._row_params = RowParams.make(max_batch_size, device=device)

    def start(self, request: Request) -> None:
        """Set a slot's parameters to its new request's, at position 0."""
        one = RowParams.from_sampling_params([request.params], device=self.device)
        for column, value in zip(self._row_params, one, strict=True):
            column[request.slot] = value[0]

    def move(self, source: int, target: int) -> None:
        """Move what a slot holds to another."""
        for column in (*self._row_params, self.token_ids):
            column[target] = column[source]

    def draw(
        self, requests: Sequence[Request], logits: Sequence[Tensor]
    ) -> list[tuple[int, float, float, int]]:
        """Draw the next token of each request, and move its slot on by one position.

        Args:
            requests: B requests with slots; all of them, by slot, in a decoding step.
            logits: per role [B, V_role], in the same order.

        Returns:
            Per request: token id, logprob, raw logprob and status.
        """
        rows = self._rows(requests)
        base, expert, anti = logits if len(logits) > 1 else (logits[0], None, None)
        drawn = ops.sample(
            base,
            expert,
            anti,
            self._row_params.rows(rows),
            allowed_mask=self._allowed_mask(requests),
            vocab_size=self._vocab_size,
            backend=self.backend,
        )
        self._row_params.position[rows] += 1
        self.token_ids[rows, 0] = drawn.token_ids
        columns = (drawn.token_ids, drawn.logprobs, drawn.raw_logprobs, drawn.status)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _rows(self, requests: Sequence[Request]) -> slice | Tensor:
        slots = [request.slot for request in requests]
        if slots == list(range(len(slots))):
            return slice(0, len(slots))
        return torch.tensor(slots, device=self.device)

    def _allowed_mask(self, requests: Sequence[Request]) -> Tensor | None:
        """Packed mask that keeps requests short of min_tokens from stopping; None for no such."""
        if not any(request.needs_mask for request in requests):
            return None
        words = -(-self._vocab_size // 32)
        mask = torch.full((len(requests), words), -1, dtype=torch.int32)
        for row, request in zip(mask, requests, strict=True):
            if request.needs_mask and request.rules.allowed_mask is not None:
                row.copy_(request.rules.allowed_mask)
        return mask.to(self.device)
