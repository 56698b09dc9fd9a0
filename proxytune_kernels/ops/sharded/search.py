"""Exact kept sets of rows whose cut lies past the ranks' candidates: flat rows, a large top_k.

A cut is searched among the 51-bit order keys: counts and masses above 1,024 edges are added up over
all ranks, and the cut lies between two of them. The first edges are keys sampled from all ranks,
which part any row into about equal pieces; where few tokens are left between two edges, those are
the next edges, and the search ends. A row that samples tell little of is parted evenly by key:
1,024 pieces a round, so at most six more rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from proxytune_kernels import reference
from proxytune_kernels.ops.sharded.shard import Shard
from proxytune_kernels.params import RowParams

NUM_EDGES = 1024
_KEY_END = 1 << 51  # past all order keys
_MAX_ROUNDS = 8  # samples; keys parted by 2^10 six times; what is left
_NO_MASS = 2**63 - 1  # no sum of masses reaches it
_SUMMARY_COUNT = (1 << 20) - 1
_SUMMARY_MAX = 21  # bits below the maximum
_HIGHEST = 0xFF800000  # order bits of +inf


class Prefix(NamedTuple):
    """Prefixes of the order, int64 [B]: tokens whose key is at least ``cut``."""

    cut: Tensor
    length: Tensor
    mass: Tensor

    def where(self, condition: Tensor, other: Prefix) -> Prefix:
        """These where the condition holds, else the others."""
        return Prefix(*(torch.where(condition, a, b) for a, b in zip(self, other, strict=True)))


class _Keys(NamedTuple):
    """This rank's order keys of some rows, and what their masses depend on."""

    shard: Shard
    keys: Tensor
    summaries: Tensor
    temperature: Tensor

    def above(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and masses of all ranks' tokens from each edge up, [B, E] each."""
        run = self.shard.operator("shard_histogram", self.keys.device)
        own = run(self.keys, self.summaries, self.temperature, edges)
        count, mass = self.shard.add(own).view(len(edges), 2, -1).unbind(1)
        return count.cumsum(-1), mass.cumsum(-1)

    def sampled(self) -> Tensor:
        """About evenly spaced tokens' keys, of all ranks."""
        number = max(1, NUM_EDGES // self.shard.world_size)
        step = max(1, self.keys.shape[-1] // number)
        return self._all(self.keys[:, ::step][:, :number], number)

    def between(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The highest keys in [lower, upper), of all ranks."""
        inside = (self.keys >= lower[:, None]) & (self.keys < upper[:, None])
        number = min(NUM_EDGES, self.keys.shape[-1])
        own = torch.where(inside, self.keys, 0).topk(number, dim=-1).values
        return self._all(own, NUM_EDGES)

    def _all(self, own: Tensor, number: int) -> Tensor:
        sent = own.new_zeros((len(own), number))
        sent[:, : own.shape[-1]] = own
        told = self.shard.gather(sent).permute(1, 0, 2).flatten(1)
        return told.topk(min(NUM_EDGES, told.shape[-1]), dim=-1).values


def _evenly(lower: Tensor, upper: Tensor) -> Tensor:
    """Edges that part [lower, upper) evenly, descending, the last of them lower: [B, E]."""
    step = (upper - lower + NUM_EDGES - 1) // NUM_EDGES
    number = torch.arange(1, NUM_EDGES + 1, device=lower.device)
    return (upper[:, None] - step[:, None] * number).maximum(lower[:, None])


def find_prefix(keys: _Keys, whole: Prefix, count: Tensor, mass: Tensor) -> Prefix:
    """The shortest prefixes of at least ``count`` tokens or ``mass``, which ``whole`` has.

    Reads from the device once a round.
    """
    lower, upper = whole, Prefix(torch.full_like(count, _KEY_END), count * 0, count * 0)
    edges = keys.sampled()
    for _ in range(_MAX_ROUNDS):
        edges = edges.clamp(lower.cut[:, None], upper.cut[:, None] - 1)
        counts, masses = keys.above(edges)
        met = (counts >= count[:, None]) | (masses >= mass[:, None])
        number = (~met).sum(-1)  # edges before the first that meets the need
        found = _at(edges, counts, masses, number)
        before = _at(edges, counts, masses, number - 1)
        lower = found.where(number < edges.shape[-1], lower)
        upper = before.where(number > 0, upper)
        inside = lower.length - upper.length
        if not bool((inside > 1).any()):
            return lower
        even, few = _evenly(lower.cut, upper.cut), (inside <= NUM_EDGES)[:, None]
        edges = torch.where(few, keys.between(lower.cut, upper.cut), even)
    raise AssertionError("a search among order keys must end")


def _at(edges: Tensor, counts: Tensor, masses: Tensor, number: Tensor) -> Prefix:
    at = number.clamp(0, edges.shape[-1] - 1)[:, None]
    return Prefix(*(t.gather(-1, at)[:, 0] for t in (edges, counts, masses)))


def find_kept(shard: Shard, x: Tensor, rows: RowParams, summaries: Tensor, words: Tensor) -> Tensor:
    """The kept sets of some rows: int64 [B, 3], cut, count and mass; the same on every rank.

    Args:
        shard: this rank's part.
        x: its combined logits, fp32 [B, n]; each row has a token, and top_k or top_p.
        rows: their parameters.
        summaries: all ranks', [W, B].
        words: all ranks' of shard_draw without a cut, [W, B, 5 or 6].
    """
    own = shard.operator("shard_keys", x.device)(x, summaries, shard.vocab_start)
    keys = _Keys(shard, own, summaries, rows.temperature)
    top = summaries >> _SUMMARY_MAX
    counted = (top < _HIGHEST).all(0) | (top == _HIGHEST)
    count = ((summaries & _SUMMARY_COUNT) * counted).sum(0)
    # Numbers by column of shard_draw: likely tokens are those that min_p keeps.
    likely = (words[..., 1] >> 32).sum(0)
    likely_mass, mass = words[..., 2].sum(0), words[..., 3].sum(0)
    whole = Prefix(torch.ones_like(count), count, mass)
    none = torch.full_like(count, _NO_MASS)

    by_k = whole
    k = torch.where(rows.top_k > 0, rows.top_k.long(), count).minimum(count)
    if bool((k < count).any()):
        by_k = find_prefix(keys, whole, k, none)
    # docs/contracts.md, Selection: what top_p's mass is a share of
    vllm, joint = rows.filter_order == 0, rows.filter_order == 2
    share = torch.where(vllm & (likely <= by_k.length), likely_mass, by_k.mass)
    share = torch.where(joint, mass, share)
    kept = by_k
    if bool((rows.top_p < 1).any()):
        target = torch.where(rows.top_p < 1, reference.mass_target(rows.top_p, share), mass)
        by_p = find_prefix(keys, whole, count, target)
        shorter = (rows.top_p < 1) & (by_p.length < kept.length)
        kept = by_p.where(shorter, kept)
    if bool((likely < kept.length).any()):
        by_min_p = find_prefix(keys, whole, likely, none)
        kept = by_min_p.where(likely < kept.length, kept)
    return torch.stack(kept, -1)
