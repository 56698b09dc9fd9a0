"""What recurrent layers carry from token to token: a state for each row.

It is of all tokens of its row, and no length takes some of them back. So drafts, which may be
refused, are not for members with such layers, a prompt is not copied from a request that runs,
prompts of different lengths run apart (padding would enter the state), and a step puts back the
states of rows that do not run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

RECURRENT_TYPES = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Of layers, as configurations of transformers name them."""


def is_recurrent(model: Any) -> bool:
    """Whether a model's layers carry a state that can't be rolled back."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return False
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    return bool(getattr(model, "_is_stateful", False) or RECURRENT_TYPES & {*types})


class StateKey(NamedTuple):
    """Which state it is: what of, of which layer, and its number there."""

    kind: str
    layer: int
    number: int


class SlotStates:
    """The states of ``rows`` rows, [rows, ...] each; a state's memory is taken as it is written."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._held: dict[StateKey, Tensor] = {}

    def of(self, key: StateKey, rows: slice | Tensor) -> Tensor | None:
        """The state of some rows, for a slice in place; None where there is none yet."""
        held = self._held.get(key)
        return None if held is None else held[_there(rows, held)]

    def write(self, key: StateKey, rows: slice | Tensor, state: Tensor) -> None:
        """Set the state of some rows to ``state``, [B, ...]."""
        if key not in self._held:
            self._held[key] = state.new_zeros((self._rows, *state.shape[1:]))
        held = self._held[key]
        held[_there(rows, held)] = state

    def keep(self, rows: slice, running: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What :meth:`put_back` wants, taken before a step of these rows.

        Args:
            rows: those of the step, B of them.
            running: int64 [B], 0 for those whose states must stay.
        """
        idle = running == 0
        if idle.device.type == "cpu" and not idle.any():
            return []
        return [
            (idle.to(x.device).view(-1, *[1] * (x.dim() - 1)), x[rows].clone())
            for x in self._held.values()
        ]

    def put_back(self, rows: slice, kept: list[tuple[Tensor, Tensor]]) -> None:
        """Undo a step for the rows that do not run."""
        for state, (idle, old) in zip(self._held.values(), kept, strict=False):
            state[rows] = torch.where(idle, old, state[rows])

    def move(self, source: slice, target: slice) -> None:
        """Copy the states of rows to others."""
        for state in self._held.values():
            state[target] = state[source]

    def clear(self, rows: slice) -> None:
        """Make the states of rows those before any token."""
        for state in self._held.values():
            state[rows].zero_()

    def nbytes(self) -> int:
        """Bytes taken."""
        return sum(state.nbytes for state in self._held.values())


def _there(rows: slice | Tensor, held: Tensor) -> slice | Tensor:
    """Rows, as indices beside what they are of: a model may be spread over devices."""
    return rows if isinstance(rows, slice) else rows.to(held.device)
