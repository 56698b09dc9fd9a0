"""Draws for a batch of rows: what each rank computes, and what it tells the others.

1. Each rank's summary of its part (8 bytes a row) gives the row's maximum everywhere.
2. Each rank's masses and best token relative to it (40 bytes), and where a row has top_k or top_p
   its first candidates (8 bytes each), are all that most rows need: every rank decides alike.
3. Rows whose cut lies past the candidates are searched (search.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from proxytune_kernels.ops.shard_table import NUM_WORDS
from proxytune_kernels.ops.sharded.search import find_kept
from proxytune_kernels.ops.sharded.shard import Shard
from proxytune_kernels.params import RowParams, SamplingParams

MAX_CANDIDATES = 4096
"""Longest list of candidates that a rank sends."""

_SMALLEST_NORMAL = 2.0**-126


class Finished(NamedTuple):
    """Results of some rows, [B] each, the same on every rank."""

    token_ids: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor
    num_kept: Tensor
    status: Tensor
    cut: Tensor
    """int64: order key of the last kept token."""
    kept_mass: Tensor
    """int64: mass of the kept set."""
    wanted_logprobs: Tensor
    """fp32: logprob of the token asked for, NaN where it is not kept."""
    undecided: Tensor
    """int32: whether the candidates did not reach to the cut."""


class Candidates(NamedTuple):
    """How many candidates a rank sends, and whether they are certain to be enough."""

    length: int
    enough: bool


def candidates_for(
    given: Any, rows: RowParams, vocab_size: int, max_top_k: int | None, num_candidates: int
) -> Candidates:
    """What the host knows of the rows' filters, without a look at the device.

    Args:
        given: parameters as the caller gave them.
        rows: the same as tensors.
        vocab_size: of all ranks.
        max_top_k: the caller's promise: no row has top_p, or a top_k above it, unless its top_k is
            at most this. None is no promise.
        num_candidates: length where nothing better is known.
    """
    if max_top_k is not None:
        return Candidates(min(max_top_k, vocab_size), True)
    host = _on_host(given, rows)
    if host is None:
        return Candidates(num_candidates, False)
    top_k, top_p = host
    counted = (top_k > 0) & (top_k < vocab_size)
    listed = counted | (top_p < 1)
    if not bool(listed.any()):
        return Candidates(0, True)
    wanted = int(top_k[counted].max()) if bool(counted.any()) else 0
    enough = bool((counted | ~listed).all()) and wanted <= MAX_CANDIDATES
    if enough:
        return Candidates(wanted, True)
    return Candidates(num_candidates, False)


def _on_host(given: Any, rows: RowParams) -> tuple[Tensor, Tensor] | None:
    """top_k and top_p of rows that are not greedy, where the host has them."""
    if isinstance(given, SamplingParams):
        given = [given]
    if isinstance(given, Sequence) and not isinstance(given, RowParams):
        live = [p for p in given if p.temperature >= _SMALLEST_NORMAL]
        return torch.tensor([p.top_k for p in live]), torch.tensor([p.top_p for p in live])
    if rows.top_k.device.type != "cpu":
        return None
    live_rows = ~(rows.temperature < _SMALLEST_NORMAL)
    return rows.top_k[live_rows], rows.top_p[live_rows]


def first_keys(keys: Tensor, number: int) -> Tensor:
    """The highest keys of each row, [B, number], 0 past the last."""
    own = keys.topk(min(number, keys.shape[-1]), dim=-1).values
    return pad(own, (0, number - own.shape[-1]))


def draw_rows(
    shard: Shard, x: Tensor, rows: RowParams, stream: int, candidates: Candidates,
    wanted: Tensor | None = None,
) -> tuple[Finished, Tensor]:  # fmt: skip
    """Draw one token for each row.

    Args:
        shard: this rank's part.
        x: its combined logits, fp32 [B, n].
        rows: parameters, one value per row.
        stream: number of the noise stream.
        candidates: from :func:`candidates_for`.
        wanted: int64 [B], tokens whose logprobs are asked for.

    Returns:
        The results, and all ranks' summaries [W, B].
    """
    call = _Call(shard, x, rows, stream, wanted)
    summaries = shard.gather(call.operator("shard_scan")(x))
    sent = call.draw(summaries, None)
    if candidates.length:
        keys = call.operator("shard_keys")(x, summaries, shard.vocab_start)
        sent = torch.cat([sent, first_keys(keys, candidates.length)], -1)
    told = shard.gather(sent)
    width = NUM_WORDS + (wanted is not None)
    words, lists = told[..., :width].contiguous(), told[..., width:].contiguous()
    out = call.finish(summaries, words, lists, None)
    # The one look at the device, where a list may be too short; all ranks see the same.
    if candidates.enough or not bool(out.undecided.any()):
        return out, summaries
    left = out.undecided.nonzero()[:, 0]
    few, few_summaries = call.rows_at(left), summaries[:, left].contiguous()
    kept = find_kept(shard, few.x, few.rows, few_summaries, words[:, left])
    words = shard.gather(few.draw(few_summaries, kept[:, 0].contiguous()))
    settled = few.finish(few_summaries, words, None, kept)
    for column, values in zip(out, settled, strict=True):
        column[left] = values
    return out, summaries


class _Call(NamedTuple):
    """The operators on one batch of rows."""

    shard: Shard
    x: Tensor
    rows: RowParams
    stream: int
    wanted: Tensor | None

    def operator(self, name: str) -> Any:
        return self.shard.operator(name, self.x.device)

    def rows_at(self, index: Tensor) -> _Call:
        wanted = None if self.wanted is None else self.wanted[index]
        return self._replace(x=self.x[index], rows=self.rows.rows(index), wanted=wanted)

    def draw(self, summaries: Tensor, cut: Tensor | None) -> Tensor:
        start = self.shard.vocab_start
        run = self.operator("shard_draw")
        words: Tensor = run(self.x, summaries, *self.rows, cut, self.wanted, start, self.stream)
        return words

    def finish(
        self, summaries: Tensor, words: Tensor, lists: Tensor | None, kept: Tensor | None
    ) -> Finished:
        run = self.operator("shard_finish")
        return Finished(*run(summaries, words, lists, *self.rows, kept, self.stream))
