"""Draws for a batch of rows: what each rank computes, and what it tells the others.

1. Each rank's summary of its part (8 bytes a row) gives the row's maximum everywhere.
2. Each rank's masses and best token relative to it (40 bytes), and where a row has top_k or top_p
   its first candidates (8 bytes each), are all that most rows need: every rank decides alike.
3. Rows whose cut lies past the candidates are searched: flat rows, a large top_k. A cut is searched
   among the 51-bit order keys: counts and masses above 1,024 edges are added up over all ranks, and
   the cut lies between two of them. The first edges are keys sampled from all ranks, which part any
   row into about equal pieces; where few tokens are left between two edges, those are the next
   edges, and the search ends. A row of which samples tell little is parted evenly by key: 1,024
   pieces a round, so at most six more rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from proxytune_kernels.ops.sharded.shard import Shard
from proxytune_kernels.ops.table import NUM_WORDS, Finished
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.reference import Prefix, kept_prefix
from proxytune_kernels.rng import STREAMS

MAX_CANDIDATES = 4096
"""Longest list of candidates that a rank sends."""

NUM_EDGES = 1024
_KEY_END = 1 << 51  # past all order keys
_MAX_ROUNDS = 8  # samples; keys parted by 2^10 six times; what is left
_NO_MASS = 2**63 - 1  # no sum of masses reaches it
_UNKNOWN = -1  # a cut that has not been searched for
_SUMMARY_COUNT = (1 << 20) - 1
_SUMMARY_MAX = 21  # bits below the maximum
_HIGHEST = 0xFF800000  # order bits of +inf
_SMALLEST_NORMAL = 2.0**-126


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
    shard: Shard, x: Tensor, rows: RowParams, noise_stream: str, candidates: Candidates,
    wanted: Tensor | None = None, plain: Tensor | None = None,
) -> tuple[Finished, Tensor]:  # fmt: skip
    """Draw one token for each row.

    Args:
        shard: this rank's part.
        x: its combined logits, fp32 [B, n].
        rows: parameters, one value per row.
        noise_stream: what the rows are drawn with.
        candidates: from :func:`candidates_for`.
        wanted: int64 [B], tokens whose logprobs are asked for.
        plain: bool [R], where the rows are B / R positions of R requests: those whose first row is
            drawn with noise stream "sample" all the same.

    Returns:
        The results, and all ranks' summaries [W, B].
    """
    call = _Call(shard, x, rows, noise_stream, wanted)
    if plain is not None:
        first = torch.arange(len(plain), device=x.device) * (len(x) // max(1, len(plain)))
        call = call._replace(other=_Other(first, plain))
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


class _Other(NamedTuple):
    """Rows that may be drawn with noise stream "sample" in place of the call's own."""

    at: Tensor
    """int64 [R]: which rows."""
    is_drawn: Tensor
    """bool [R]: whether they are."""


class _Call(NamedTuple):
    """The operators on one batch of rows."""

    shard: Shard
    x: Tensor
    rows: RowParams
    noise_stream: str
    wanted: Tensor | None
    other: _Other | None = None

    def operator(self, name: str) -> Any:
        return self.shard.operator(name, self.x.device)

    def rows_at(self, index: Tensor) -> _Call:
        wanted = None if self.wanted is None else self.wanted[index]
        few = self._replace(x=self.x[index], rows=self.rows.rows(index), wanted=wanted)
        if self.other is None:
            return few
        is_drawn = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        is_drawn[self.other.at] = self.other.is_drawn
        return few._replace(other=_Other(torch.arange(len(index)), is_drawn[index]))

    def _others(self) -> _Call:
        assert self.other is not None
        alone = self._replace(noise_stream="sample", other=None)
        return alone.rows_at(self.other.at)

    def draw(self, summaries: Tensor, cut: Tensor | None) -> Tensor:
        start, number = self.shard.vocab_start, STREAMS[self.noise_stream]
        run = self.operator("shard_draw")
        words: Tensor = run(self.x, summaries, *self.rows, cut, self.wanted, start, number)
        if self.other is not None:
            index, is_drawn = self.other
            own = None if cut is None else cut[index]
            others = self._others().draw(summaries[:, index].contiguous(), own)
            words[index] = torch.where(is_drawn[:, None], others, words[index])
        return words

    def finish(
        self, summaries: Tensor, words: Tensor, lists: Tensor | None, kept: Tensor | None
    ) -> Finished:
        run, number = self.operator("shard_finish"), STREAMS[self.noise_stream]
        out = Finished(*run(summaries, words, lists, *self.rows, kept, number))
        if self.other is not None:
            index, is_drawn = self.other
            others = self._others().finish(
                summaries[:, index].contiguous(),
                words[:, index].contiguous(),
                None if lists is None else lists[:, index].contiguous(),
                None if kept is None else kept[index],
            )
            for column, values in zip(out, others, strict=True):
                column[index] = torch.where(is_drawn, values, column[index])
        return out


class _Keys:
    """Some rows' tokens, in order, by all ranks' order keys: :class:`reference.Order`.

    Args:
        keys: this rank's, int64 [B, n].
        summaries: all ranks', [W, B].
        whole, likely: all tokens, and those that min_p keeps.
    """

    def __init__(
        self, shard: Shard, keys: Tensor, summaries: Tensor, temperature: Tensor, whole: Prefix,
        likely: Prefix,
    ) -> None:  # fmt: skip
        self.shard, self.keys, self.whole, self.likely = shard, keys, whole, likely
        self._masses_of = summaries, temperature

    def first(self, count: Tensor) -> Prefix:
        if not bool((count < self.whole.length).any()):
            return self.whole
        return self._find(count, torch.full_like(count, _NO_MASS))

    def reaching(self, mass: Tensor) -> Prefix:
        return self._find(self.whole.length, mass)

    def _find(self, count: Tensor, mass: Tensor) -> Prefix:
        """The shortest prefixes of at least ``count`` tokens or ``mass``.

        Reads from the device once a round.
        """
        lower, none = self.whole, count * 0
        upper = Prefix(none, none, torch.full_like(count, _KEY_END))
        edges = self._sampled()
        for _ in range(_MAX_ROUNDS):
            edges = edges.clamp(lower.cut[:, None], upper.cut[:, None] - 1)
            counts, masses = self._above(edges)
            met = (counts >= count[:, None]) | (masses >= mass[:, None])
            number = (~met).sum(-1)  # edges before the first that meets the need
            found = _at(edges, counts, masses, number)
            before = _at(edges, counts, masses, number - 1)
            lower = found.where(number < edges.shape[-1], lower)
            upper = before.where(number > 0, upper)
            inside = lower.length - upper.length
            if not bool((inside > 1).any()):
                return lower
            even, few = evenly(lower.cut, upper.cut), (inside <= NUM_EDGES)[:, None]
            edges = torch.where(few, self._between(lower.cut, upper.cut), even)
        raise AssertionError("a search among order keys must end")

    def _above(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and masses of all ranks' tokens from each edge up, [B, E] each."""
        run = self.shard.operator("shard_histogram", self.keys.device)
        own = run(self.keys, *self._masses_of, edges)
        count, mass = self.shard.add(own).view(len(edges), 2, -1).unbind(1)
        return count.cumsum(-1), mass.cumsum(-1)

    def _sampled(self) -> Tensor:
        """About evenly spaced tokens' keys, of all ranks."""
        number = max(1, NUM_EDGES // self.shard.world_size)
        step = max(1, self.keys.shape[-1] // number)
        return self._all(self.keys[:, ::step][:, :number], number)

    def _between(self, lower: Tensor, upper: Tensor) -> Tensor:
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


def evenly(lower: Tensor, upper: Tensor) -> Tensor:
    """Edges that part [lower, upper) evenly, descending, the last of them lower: [B, E]."""
    step = (upper - lower + NUM_EDGES - 1) // NUM_EDGES
    number = torch.arange(1, NUM_EDGES + 1, device=lower.device)
    return (upper[:, None] - step[:, None] * number).maximum(lower[:, None])


def _at(edges: Tensor, counts: Tensor, masses: Tensor, number: Tensor) -> Prefix:
    at = number.clamp(0, edges.shape[-1] - 1)[:, None]
    return Prefix(*(t.gather(-1, at)[:, 0] for t in (counts, masses, edges)))


def find_kept(shard: Shard, x: Tensor, rows: RowParams, summaries: Tensor, words: Tensor) -> Tensor:
    """The kept sets of some rows, and what their logprobs are relative to; the same on every rank.

    Args:
        shard: this rank's part.
        x: its combined logits, fp32 [B, n]; each row has a token, and top_k or top_p.
        rows: their parameters.
        summaries: all ranks', [W, B].
        words: all ranks' of shard_draw without a cut, [W, B, 5 or 6].

    Returns:
        int64 [B, 4]: cut, count, mass, and the row's mass at temperature 1.
    """
    top = summaries >> _SUMMARY_MAX
    counted = (top < _HIGHEST).all(0) | (top == _HIGHEST)
    count = ((summaries & _SUMMARY_COUNT) * counted).sum(0)
    # Numbers by column of shard_draw: likely tokens are those that min_p keeps.
    number = (words[..., 1] >> 32).sum(0)
    likely_mass, mass, raw_mass = (words[..., i].sum(0) for i in (2, 3, 4))
    whole = Prefix(count, mass, torch.ones_like(count))
    likely = Prefix(number, likely_mass, torch.full_like(count, _UNKNOWN))
    own = shard.operator("shard_keys", x.device)(x, summaries, shard.vocab_start)
    keys = _Keys(shard, own, summaries, rows.temperature, whole, likely)
    kept = kept_prefix(keys, rows)
    unknown = kept.cut == _UNKNOWN
    if bool(unknown.any()):
        kept = keys.first(number).where(unknown, kept)
    return torch.stack((kept.cut, kept.length, kept.mass, raw_mass), -1)
