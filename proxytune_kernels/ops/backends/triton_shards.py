"""The operators on shards on Triton: check the arguments, allocate what is returned, launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.kernels.shard_sample import (
    Finished,
    Part,
    launch_shard_draw,
    launch_shard_finish,
    launch_shard_histogram,
    launch_shard_keys,
    launch_shard_scan,
)
from proxytune_kernels.kernels.shard_verify import launch_shard_accept, launch_shard_residual
from proxytune_kernels.kernels.verify import Kept
from proxytune_kernels.ops.checks import MAX_VOCAB_SIZE, exactly, noise_stream
from proxytune_kernels.ops.table import NUM_PARAMS, NUM_RESIDUAL_WORDS, NUM_WORDS, OPERATORS
from proxytune_kernels.params import ROW_FIELDS, RowParams
from proxytune_kernels.rng import STREAMS

_LONG, _REAL, _WHOLE = torch.int64, torch.float32, torch.int32


def _tensor(op: str, name: str, value: Any, dtype: torch.dtype, *shape: int, like: Tensor) -> None:
    exactly(op, name, value, dtype, shape, like.device, contiguous=True)


def _part(op: str, x: Tensor, summaries: Tensor, vocab_start: int, name: str = "x") -> Part:
    if x.dim() != 2 or summaries.dim() != 2:
        raise ValueError(f"{op}: {name} must be [B, n] and its summaries [W, B]")
    rows, size = x.shape
    _tensor(op, name, x, _REAL, rows, size, like=x)
    _tensor(op, "summaries", summaries, _LONG, len(summaries), rows, like=x)
    if vocab_start < 0 or vocab_start + size > MAX_VOCAB_SIZE:
        raise ValueError(f"{op}: vocab_start must be in [0, 2^19 - {size}], got {vocab_start}")
    return Part(x, summaries, size, vocab_start)


def _params(op: str, values: tuple[Any, ...], rows: int, like: Tensor) -> RowParams:
    params = RowParams(*values)
    for (name, field), value in zip(ROW_FIELDS.items(), params, strict=True):
        _tensor(op, name, value, field.dtype, rows, like=like)
    return params


def shard_scan(x: Tensor) -> Tensor:
    """``proxytune::shard_scan``."""
    out = x.new_empty(x.shape[0], dtype=_LONG)
    launch_shard_scan(_part("shard_scan", x, out[None], 0), out)
    return out


def shard_keys(x: Tensor, summaries: Tensor, vocab_start: int) -> Tensor:
    """``proxytune::shard_keys``."""
    out = x.new_empty(x.shape, dtype=_LONG)
    launch_shard_keys(_part("shard_keys", x, summaries, vocab_start), out)
    return out


def shard_draw(x: Tensor, summaries: Tensor, *rest: Any) -> Tensor:
    """``proxytune::shard_draw``."""
    op, rows = "shard_draw", x.shape[0]
    params = _params(op, rest[:NUM_PARAMS], rows, x)
    cut, wanted, vocab_start, stream = rest[NUM_PARAMS:]
    part = _part(op, x, summaries, vocab_start)
    for name, value in (("cut", cut), ("wanted", wanted)):
        if value is not None:
            _tensor(op, name, value, _LONG, rows, like=x)
    noise_stream(op, stream, STREAMS.values())
    out = x.new_zeros((rows, NUM_WORDS + (wanted is not None)), dtype=_LONG)
    launch_shard_draw(part, params, cut, wanted, stream, out)
    return out


def shard_histogram(keys: Tensor, summaries: Tensor, temperature: Tensor, edges: Tensor) -> Tensor:
    """``proxytune::shard_histogram``."""
    op = "shard_histogram"
    if keys.dim() != 2 or edges.dim() != 2 or summaries.dim() != 2:
        raise ValueError(f"{op}: keys, edges and summaries must be matrices")
    rows, size = keys.shape
    _tensor(op, "keys", keys, _LONG, rows, size, like=keys)
    _tensor(op, "summaries", summaries, _LONG, len(summaries), rows, like=keys)
    _tensor(op, "temperature", temperature, _REAL, rows, like=keys)
    _tensor(op, "edges", edges, _LONG, rows, edges.shape[1], like=keys)
    out = keys.new_zeros((rows, 2 * edges.shape[1]))
    launch_shard_histogram(keys, summaries, temperature, edges, out)
    return out


def shard_finish(
    summaries: Tensor, words: Tensor, candidates: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """``proxytune::shard_finish``."""
    op = "shard_finish"
    if words.dim() != 3 or (candidates is not None and candidates.dim() != 3):
        raise ValueError(f"{op}: words and candidates must be [W, B, n]")
    world, rows, width = words.shape
    params = _params(op, rest[:NUM_PARAMS], rows, words)
    kept, stream = rest[NUM_PARAMS:]
    if width not in (NUM_WORDS, NUM_WORDS + 1) and (kept is None or width != NUM_RESIDUAL_WORDS):
        raise ValueError(f"{op}: words must have 5 or 6 words a row, 2 with kept, got {width}")
    _tensor(op, "words", words, _LONG, world, rows, width, like=words)
    _tensor(op, "summaries", summaries, _LONG, world, rows, like=words)
    if candidates is not None:
        shape = (world, rows, candidates.shape[2])
        _tensor(op, "candidates", candidates, _LONG, *shape, like=words)
    if kept is not None:
        _tensor(op, "kept", kept, _LONG, rows, 4, like=words)
    noise_stream(op, stream, STREAMS.values())
    out = OPERATORS[op].empty(summaries, words, candidates, *rest)
    launch_shard_finish(summaries, words, candidates, params, kept, stream, Finished(*out))
    return out


def shard_accept(
    target_logprobs: Tensor, target_status: Tensor, draft_logprobs: Tensor,
    draft_token_ids: Tensor, seed: Tensor, position: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``proxytune::shard_accept``."""
    op = "shard_accept"
    if draft_token_ids.dim() != 2:
        raise ValueError(f"{op}: draft_token_ids must be [B, k]")
    (rows, drafts), like = draft_token_ids.shape, target_logprobs
    _tensor(op, "draft_token_ids", draft_token_ids, _LONG, rows, drafts, like=like)
    _tensor(op, "target_logprobs", target_logprobs, _REAL, rows, drafts + 1, like=like)
    _tensor(op, "target_status", target_status, _WHOLE, rows, drafts + 1, like=like)
    _tensor(op, "draft_logprobs", draft_logprobs, _REAL, rows, drafts, like=like)
    _tensor(op, "seed", seed, _LONG, rows, like=like)
    _tensor(op, "position", position, _LONG, rows, like=like)
    num_accepted, steps = seed.new_empty(rows, dtype=_WHOLE), seed.new_empty(rows)
    launch_shard_accept(
        target_logprobs, target_status, draft_logprobs, draft_token_ids, seed, position,
        num_accepted, steps,
    )  # fmt: skip
    return num_accepted, steps


def shard_residual(
    x: Tensor, summaries: Tensor, cut: Tensor, kept_mass: Tensor, draft_x: Tensor,
    draft_summaries: Tensor, draft_cut: Tensor, draft_kept_mass: Tensor, steps: Tensor, *rest: Any,
) -> Tensor:  # fmt: skip
    """``proxytune::shard_residual``."""
    op, rows, vocab_start = "shard_residual", steps.numel(), rest[NUM_PARAMS]
    params = _params(op, rest[:NUM_PARAMS], rows, x)
    part = _part(op, x, summaries, vocab_start)
    draft_part = _part(op, draft_x, draft_summaries, vocab_start, "draft_x")
    drafts = draft_part.rows // rows if rows else 0
    if (draft_part.rows, part.rows) != (rows * drafts, rows * (drafts + 1)):
        raise ValueError(f"{op}: x, draft_x and steps must be of [B, k + 1], [B, k] and [B]")
    if draft_part.size != part.size:
        raise ValueError(f"{op}: draft_x must have {part.size} tokens, got {draft_part.size}")
    _tensor(op, "steps", steps, _LONG, rows, like=x)
    for name, value, number in (
        ("cut", cut, part.rows), ("kept_mass", kept_mass, part.rows),
        ("draft_cut", draft_cut, draft_part.rows),
        ("draft_kept_mass", draft_kept_mass, draft_part.rows),
    ):  # fmt: skip
        _tensor(op, name, value, _LONG, number, like=x)
    out = x.new_zeros((rows, NUM_RESIDUAL_WORDS), dtype=_LONG)
    kept, draft_kept = Kept(cut, kept_mass), Kept(draft_cut, draft_kept_mass)
    launch_shard_residual(part, kept, draft_part, draft_kept, params, steps, out)
    return out


def _at_16_bytes(run: Callable[..., Any]) -> Callable[..., Any]:
    """Has tensors at other addresses copied: Triton compiles its kernels anew for those."""

    @wraps(run)
    def copying(*arguments: Any) -> Any:
        return run(
            *(a.clone() if isinstance(a, Tensor) and a.data_ptr() % 16 else a for a in arguments)
        )

    return copying


SHARD_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    run.__name__: _at_16_bytes(run)
    for run in (
        shard_scan, shard_keys, shard_draw, shard_histogram, shard_finish, shard_accept,
        shard_residual,
    )
}  # fmt: skip
"""By name."""
