"""Schemas and fake versions of the operators on shards of the vocabulary (docs/sharded.md).

They are what :mod:`proxytune_kernels.ops.sharded` calls between its collectives; a row's numbers
travel as int64 words. All tensors are contiguous. W ranks, B rows, n tokens of this rank's shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxytune_kernels.ops.table import LIBRARY

_PARAMS = (
    "Tensor alpha, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor filter_order, Tensor seed, Tensor position"
)

NUM_WORDS = 5
"""Words of a rank's draw of one row; one more where the key of a given token is asked for."""
NUM_RESIDUAL_WORDS = 2

FINISHED = (
    "token_ids", "logprobs", "raw_logprobs", "num_kept", "status", "cut", "kept_mass",
    "wanted_logprobs", "undecided",
)  # fmt: skip
"""What shard_finish returns, [B] each: the results of ``sample``; the order key of the last kept
token and the kept set's mass; the logprob of the token asked for, NaN where it is not kept; and
whether the candidates did not reach to the cut, where token is -1 and status 8."""

_SCHEMAS = {
    # x fp32 [B, n] -> one word [B]: highest x, whether a NaN was there, tokens not masked
    "shard_scan": "(Tensor x) -> Tensor",
    # summaries: shard_scan's of all ranks, [W, B] -> order keys [B, n], 0 where masked
    "shard_keys": "(Tensor x, Tensor summaries, int vocab_start) -> Tensor",
    # -> words [B, 5], or [B, 6] with wanted. Draws among the tokens whose key is at least cut and
    # that min_p keeps; without a cut, rows with top_k or top_p are not drawn.
    "shard_draw": f"(Tensor x, Tensor summaries, {_PARAMS}, Tensor? cut, Tensor? wanted, "
    "int vocab_start, int stream) -> Tensor",
    # keys [B, m], edges [B, E] descending -> [B, 2 E]: for each edge the number, then the mass, of
    # the keys from it up to the edge before
    "shard_histogram": "(Tensor keys, Tensor summaries, Tensor temperature, Tensor edges) "
    "-> Tensor",
    # words [W, B, 2 to 6]; candidates [W, B, C]: each rank's first keys, 0 past the last;
    # kept int64 [B, 3]: the kept sets (cut, count, mass) where they are known
    "shard_finish": f"(Tensor summaries, Tensor words, Tensor? candidates, {_PARAMS}, "
    "Tensor? kept, int stream) -> (" + ", ".join(["Tensor"] * len(FINISHED)) + ")",
    # logprobs of the drafts, NaN where not kept: fp32 [B, k + 1] and [B, k] -> number accepted,
    # int32 [B], and the step that a residual is drawn at, int64 [B], -1 for none
    "shard_accept": "(Tensor target_logprobs, Tensor target_status, Tensor draft_logprobs, "
    "Tensor draft_token_ids, Tensor seed, Tensor position) -> (Tensor, Tensor)",
    # x [B (k + 1), n] and draft_x [B k, n] with their kept sets; steps [B] -> words [B, 2]
    "shard_residual": "(Tensor x, Tensor summaries, Tensor cut, Tensor kept_mass, Tensor draft_x, "
    "Tensor draft_summaries, Tensor draft_cut, Tensor draft_kept_mass, Tensor steps, "
    f"{_PARAMS}, int vocab_start) -> Tensor",
}

SHARD_OPERATORS = tuple(_SCHEMAS)

for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))


def _longs(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("proxytune::shard_scan", lib=LIBRARY)
def _(x: Tensor) -> Tensor:
    return _longs(x, x.shape[0])


@torch.library.register_fake("proxytune::shard_keys", lib=LIBRARY)
def _(x: Tensor, summaries: Tensor, vocab_start: int) -> Tensor:
    return _longs(x, *x.shape)


@torch.library.register_fake("proxytune::shard_draw", lib=LIBRARY)
def _(x: Tensor, summaries: Tensor, *arguments: object) -> Tensor:
    *_, wanted, _, _ = arguments
    return _longs(x, x.shape[0], NUM_WORDS + (wanted is not None))


@torch.library.register_fake("proxytune::shard_histogram", lib=LIBRARY)
def _(keys: Tensor, summaries: Tensor, temperature: Tensor, edges: Tensor) -> Tensor:
    return _longs(keys, edges.shape[0], 2 * edges.shape[1])


def empty_finished(words: Tensor) -> tuple[Tensor, ...]:
    """Unwritten outputs of shard_finish."""
    long, real, whole = torch.int64, torch.float32, torch.int32
    dtypes = (long, real, real, whole, whole, long, long, real, whole)
    return tuple(words.new_empty(words.shape[1], dtype=dtype) for dtype in dtypes)


@torch.library.register_fake("proxytune::shard_finish", lib=LIBRARY)
def _(summaries: Tensor, words: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    return empty_finished(words)


@torch.library.register_fake("proxytune::shard_accept", lib=LIBRARY)
def _(
    target_logprobs: Tensor, target_status: Tensor, draft_logprobs: Tensor,
    draft_token_ids: Tensor, seed: Tensor, position: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return seed.new_empty(seed.shape, dtype=torch.int32), _longs(seed, seed.shape[0])


@torch.library.register_fake("proxytune::shard_residual", lib=LIBRARY)
def _(x: Tensor, *arguments: object) -> Tensor:
    steps = arguments[7]
    assert isinstance(steps, Tensor)
    return _longs(x, steps.shape[0], NUM_RESIDUAL_WORDS)
