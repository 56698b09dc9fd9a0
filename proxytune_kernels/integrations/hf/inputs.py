"""What a call may say beside transformers' own arguments: alpha, and a prompt for each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.trio.roles import PAIR

PROMPT_ARGUMENTS = tuple(f"{role}_{name}" for role in PAIR for name in ("input_ids",
                         "attention_mask"))  # fmt: skip
OWN_ARGUMENTS = ("alpha", "prompt_length", *PROMPT_ARGUMENTS)
"""Keyword arguments of ``forward`` that no other model knows."""

Prompts = Mapping[str, tuple[Tensor, Tensor]]
"""Role -> token ids and mask, int64 [B, P], of the roles that have their own prompt."""


def checked_alpha(alpha: Any, rows: int) -> float | Tensor:
    """A number, or a tensor with one value per row.

    Args:
        alpha: a number, a tensor [], [1] or [B], or a sequence of B numbers.
        rows: B.

    Raises:
        ValueError, TypeError: says what it got and what it wanted.
    """
    wanted = f"alpha must be a number or one per row (a tensor [{rows}])"
    if isinstance(alpha, Real):
        return float(alpha)
    if isinstance(alpha, Sequence) and not isinstance(alpha, str):
        alpha = torch.tensor(alpha)
    if not isinstance(alpha, Tensor):
        raise TypeError(f"{wanted}, got {alpha!r:.80}")
    if alpha.numel() == 1:
        return alpha.reshape(1).expand(rows)
    if tuple(alpha.shape) != (rows,):
        raise ValueError(f"{wanted}, got a tensor {list(alpha.shape)}")
    return alpha


def prompts_of(arguments: Mapping[str, Any], rows: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The roles' own prompts among a call's arguments.

    Raises:
        ValueError: names the argument, what it got and what it wanted.
    """
    prompts = {}
    for role in PAIR:
        token_ids, mask = (
            arguments.get(f"{role}_input_ids"),
            arguments.get(f"{role}_attention_mask"),
        )
        if token_ids is None:
            if mask is not None:
                raise ValueError(f"{role}_attention_mask must come with {role}_input_ids, got None")
            continue
        if token_ids.dim() != 2 or token_ids.shape[0] != rows or not token_ids.shape[1]:
            raise ValueError(
                f"{role}_input_ids must be [B, P] for B = {rows} rows, got {list(token_ids.shape)}"
            )
        if mask is None:
            mask = torch.ones_like(token_ids)
        if mask.shape != token_ids.shape:
            raise ValueError(
                f"{role}_attention_mask must be {list(token_ids.shape)} as {role}_input_ids, "
                f"got {list(mask.shape)}"
            )
        prompts[role] = token_ids, mask.long()
    return prompts


def prompt_columns(prompt_length: int | None, cache: Any, input_ids: Tensor) -> int:
    """How many of the first new columns belong to the base's prompt; drafts follow.

    Args:
        prompt_length: columns of the whole prompt, those that the cache has seen included; None if
            nothing follows it.
        cache: the transformers cache, or None.
        input_ids: int64 [B, q], the new columns.
    """
    if prompt_length is None:
        return input_ids.shape[1]
    seen = 0 if cache is None else int(cache.get_seq_length())
    return max(prompt_length - seen, 0)


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, P], of prompts of several lengths."""
    width = max(map(len, rows))
    token_ids = [[pad_token_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(token_ids), torch.tensor(mask)


def unpadded(values: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Each row of [B, q] where the mask is not 0."""
    rows: list[list[int]] = values.tolist()
    if mask is None:
        return rows
    kept = mask.tolist()
    return [[v for v, k in zip(r, m, strict=True) if k] for r, m in zip(rows, kept, strict=True)]


def positions(mask: Tensor) -> Tensor:
    """Position of each token among its row's, int64 [B, T]; padding has 0, as transformers does."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def refuse(call: str, arguments: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Refuse arguments of transformers that a model of three models can't honour.

    Raises:
        ValueError: names the first that is neither known nor left at nothing (None, False, or a
            mapping to nothing else).
    """
    for name, value in arguments.items():
        said = value.values() if isinstance(value, Mapping) else [value]
        if name not in known and any(v is not None and v is not False for v in said):
            raise ValueError(
                f"{call}: {name} is not supported here, got {value!r:.80} (the three models are "
                "at .base, .expert and .anti)"
            )
