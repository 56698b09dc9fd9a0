"""Which rows have ended, by transformers' stopping criteria."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria


@dataclass(frozen=True)
class Criteria:
    """Stopping criteria, those of transformers that need no tensor apart.

    Args:
        max_length: tokens of prompt (padding included) and output at most; None is no bound.
        eos_token_ids: tokens that end a row.
        others: criteria to call as transformers does, on token ids [B, L] and no scores.
        pads: whether rows that have ended go on with padding: a criterion has end-of-sequence
            tokens.
    """

    max_length: int | None
    eos_token_ids: frozenset[int]
    others: tuple[Any, ...]
    pads: bool

    @classmethod
    def read(cls, criteria: Iterable[Any]) -> Criteria:
        """Sort the criteria of a :class:`transformers.StoppingCriteriaList`."""
        max_length: int | None = None
        eos: frozenset[int] = frozenset()
        others: list[Any] = []
        pads = False
        for criterion in criteria:
            pads |= hasattr(criterion, "eos_token_id")
            if type(criterion) is EosTokenCriteria:
                eos |= frozenset(criterion.eos_token_id.tolist())
            elif type(criterion) is MaxLengthCriteria and _is_silent(criterion):
                max_length = min(max_length or criterion.max_length, criterion.max_length)
            else:
                others.append(criterion)
        return cls(max_length, eos, tuple(others), pads)

    def called(self, input_ids: Tensor) -> list[bool]:
        """Which rows of token ids [B, L] one of the others ends."""
        ended = [False] * input_ids.shape[0]
        for criterion in self.others:
            done = criterion(input_ids, None)
            each = done.tolist() if isinstance(done, Tensor) else [done] * len(ended)
            ended = [a or bool(b) for a, b in zip(ended, each, strict=True)]
        return ended


def _is_silent(criterion: Any) -> bool:
    """Whether the criterion has no warning to give of a text longer than the model's context."""
    context = criterion.max_position_embeddings
    return context is None or criterion.max_length <= context


class Stops:
    """Which rows of a batch that moves in step have ended.

    Length and end-of-sequence tokens are looked up on the host, where the loop has the tokens
    anyway; any other criterion is called as transformers calls it.

    Args:
        criteria: of a :class:`transformers.StoppingCriteriaList`.
        pad_token_id: a tensor [], what follows in a row that has ended.
        rows: B.
    """

    def __init__(self, criteria: Iterable[Any], pad_token_id: Tensor | None, rows: int) -> None:
        self._criteria = Criteria.read(criteria)
        self._pad = pad_token_id if self._criteria.pads else None
        self._ended = [False] * rows

    def padded(self, token_ids: Tensor) -> Tensor:
        """The tokens int64 [B], with padding in the rows that have ended."""
        if self._pad is None or not any(self._ended):
            return token_ids
        ended = torch.tensor(self._ended, device=token_ids.device)
        return torch.where(ended, self._pad.to(token_ids.device), token_ids)

    def finished(self, input_ids: Tensor, token_ids: list[int]) -> bool:
        """Take the last column of ``input_ids`` [B, L], also on the host; whether all rows end."""
        criteria = self._criteria
        long = criteria.max_length is not None and input_ids.shape[1] >= criteria.max_length
        now = [long or token_id in criteria.eos_token_ids for token_id in token_ids]
        if criteria.others:
            now = [a or b for a, b in zip(now, criteria.called(input_ids), strict=True)]
        self._ended = [a or b for a, b in zip(self._ended, now, strict=True)]
        return all(self._ended)
