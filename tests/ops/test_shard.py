"""The operators on shards, without collectives: parts of a row give what the whole one gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels import reference, rng
from proxytune_kernels.ops.sharded.candidates import evenly, first_keys
from proxytune_kernels.ops.table import NUM_WORDS, OPERATORS, Finished
from tests.ops import oracle
from tests.ops.conftest import KERNELS, Backend, _use, move, sized

# Parts that start and end anywhere: at no multiple of 4 or 128, of one token, of none.
CUTS: tuple[tuple[float, ...], ...] = ((), (0.4,), (0.001, 0.31, 0.31, 0.77))


@pytest.fixture(params=[k for k in KERNELS if k.name in ("cpu", "triton")], ids=str)
def kernel(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backends that have these operators, on every instruction set."""
    yield from _use(request.param)


def parts_of(x: Tensor, cuts: Sequence[float]) -> list[tuple[int, Tensor]]:
    """(first id, x) of each part."""
    size = x.shape[-1]
    edges = [0, *(math.ceil(cut * size) for cut in cuts), size]
    return [(a, x[:, a:b].contiguous()) for a, b in pairwise(edges)]


def drawn(
    kernel: Backend, x: Tensor, params: ptk.RowParams, cuts: Sequence[float], length: int,
    stream: str = "sample", wanted: Tensor | None = None,
) -> tuple[Finished, Tensor]:  # fmt: skip
    """What ranks with these parts get from each other's numbers; and their summaries."""
    parts = parts_of(x, cuts)
    number = rng.STREAMS[stream]
    summaries = torch.stack([kernel.operator("shard_scan")(part) for _, part in parts])
    words, lists = [], []
    for start, part in parts:
        draw = kernel.operator("shard_draw")
        words.append(draw(part, summaries, *params, None, wanted, start, number))
        keys = kernel.operator("shard_keys")(part, summaries, start)
        lists.append(first_keys(keys, length))
    finish = kernel.operator("shard_finish")
    out = finish(summaries, torch.stack(words), torch.stack(lists), *params, None, number)
    return Finished(*out), summaries


def same_draws(found: Finished, wanted: ptk.SampleOutput, kernel: Backend) -> None:
    """The same tokens, kept sets and status; logprobs too, but for Triton's sums of tiles."""
    assert torch.equal(found.token_ids, wanted.token_ids)
    assert torch.equal(found.num_kept, wanted.num_kept)
    assert torch.equal(found.status, wanted.status)
    for column in ("logprobs", "raw_logprobs"):
        one, other = getattr(found, column), getattr(wanted, column)
        if kernel.tile_error == 0:
            assert torch.equal(oracle.bits(one.nan_to_num(7)), oracle.bits(other.nan_to_num(7)))
        else:  # both are rounded to fp32: 2^-24 of each
            torch.testing.assert_close(
                one, other, rtol=2.0**-23, atol=kernel.tile_error, equal_nan=True
            )


def combined(rows: oracle.Rows) -> tuple[Tensor, ptk.RowParams]:
    params = ptk.RowParams(**rows.params)
    base, expert, anti = (t[:, : rows.vocab_size] for t in rows[:3])
    x = ptk.combine(base, expert, anti, params.alpha, backend="reference")
    return x, params


@pytest.mark.parametrize("cuts", CUTS, ids=len)
@pytest.mark.parametrize("size", (1, 5, 130, 1000))
def test_parts_draw_as_the_whole_row(kernel, cuts, size):
    batch = sized(kernel, 120, 4)
    x, params = combined(oracle.random_rows(size, batch, size))
    # As many candidates as tokens: no row is undecided.
    found, _ = drawn(kernel, x, params, cuts, size)
    assert not found.undecided.any()
    same_draws(found, kernel.sample(x, params=params), kernel)


@pytest.mark.parametrize("order", oracle.ORDERS)
def test_too_few_candidates_are_noticed(kernel, order):
    """A row is either drawn as it should be or said to be undecided, whatever the lists hold."""
    batch = sized(kernel, 200, 12)
    x, params = combined(oracle.random_rows(3, batch, 300, order=order))
    wanted = kernel.sample(x, params=params)
    for length in (1, 7):
        found, _ = drawn(kernel, x, params, CUTS[2], length)
        open_rows = found.undecided != 0
        assert open_rows.any() and not open_rows.all()
        assert (found.token_ids[open_rows] == -1).all() and (found.status[open_rows] == 8).all()
        # A list reaches to kept sets of its own length, where it has what top_p is a share of.
        assert ((wanted.num_kept > length) | (params.top_k > length))[open_rows].all()
        closed = Finished(*(column[~open_rows] for column in found))
        same_draws(closed, ptk.SampleOutput(*(t[~open_rows] for t in wanted[:-2])), kernel)


def test_a_token_that_was_not_sent_makes_what_lies_below_uncertain(kernel):
    """Where a rank has one token more than it sent; where it has sent all, nothing is missing."""
    x = torch.tensor([[5.0, 4.0, 3.9, 3.0, 2.0, 1.0, 0.0, -1.0]])
    for first, known in ((3, [1, 1, 0]), (2, [1, 1, 1])):  # tokens of the first rank, which sends 2
        for top_k, is_known in zip((1, 2, 3), known, strict=True):
            params = ptk.RowParams.make(1, top_k=top_k)
            found, _ = drawn(kernel, x, params, (first / 8,), 2)
            assert bool(found.undecided) != bool(is_known)
            assert int(found.num_kept) == top_k * is_known


def test_even_edges_reach_down_to_the_lower_end():
    lower = torch.tensor([5, 1, 100, 7, 2**50 + 1])
    upper = lower + torch.tensor([3 * 1024 + 1, 2**51 - 1, 1, 1024, 2**20 - 3])
    edges = evenly(lower, upper)
    assert torch.equal(edges[:, -1], lower)
    steps = torch.cat([upper[:, None], edges], 1).diff().neg()
    assert (steps >= 0).all() and (edges < upper[:, None]).all()
    assert torch.equal(steps.amax(1), torch.tensor([4, 2**41, 1, 1, 1024]))


def test_summaries(kernel):
    x = torch.tensor(
        [[1.0, -2.0, 0.5], [math.nan, -1.0, -math.inf], [-math.inf] * 3, [math.inf, 0, math.inf],
         [-0.0, 0.0, -0.0], [math.nan] * 3]
    )  # fmt: skip
    word = kernel.operator("shard_scan")(x)
    assert (word & 0xFFFFF).tolist() == [3, 1, 0, 2, 3, 0]
    assert ((word >> 20) & 1).tolist() == [0, 1, 0, 0, 0, 1]
    top = word >> 21
    assert top[0] > top[4] > top[1] > top[2] == top[5]
    assert top[3] == 0xFF800000


def test_keys_are_the_order_of_tokens(kernel):
    x, _ = combined(oracle.random_rows(5, sized(kernel, 50, 3), 400))
    x[0, 7], x[1, 3] = math.nan, -math.inf
    x[2, 100:103] = math.inf
    for start, part in parts_of(x, CUTS[2]):
        summaries = kernel.operator("shard_scan")(part)[None]
        keys = kernel.operator("shard_keys")(part, summaries, start)
        for row, own in zip(part, keys, strict=True):
            infinite = row == math.inf
            live = infinite if infinite.any() else row > -math.inf  # false for NaN
            assert torch.equal(own > 0, live)
            ids = (2**19 - 1 - (own & (2**19 - 1)))[live]
            assert ids.tolist() == (start + live.nonzero()[:, 0]).tolist()
            values = row.masked_fill(infinite, 0)[live]
            order = np.lexsort((ids.numpy(), -values.numpy()))
            assert own[live].sort(descending=True).values.tolist() == own[live][order].tolist()


def test_masses(kernel):
    """Of all tokens, of those above a cut, and at temperature 1; docs/contracts.md, Measured."""
    g = torch.Generator().manual_seed(6)
    x = torch.randn(4, 500, generator=g) * 5
    temperature = torch.tensor([0.5, 1.0, 2.0, 1e-40])
    params = ptk.RowParams.make(4, temperature=temperature, min_p=0.01)
    summaries = kernel.operator("shard_scan")(x)[None]
    keys = kernel.operator("shard_keys")(x, summaries, 11)
    cut = keys.sort(descending=True).values[:, 200].contiguous()
    words = kernel.operator("shard_draw")(x, summaries, *params, cut, None, 11, 0)
    shifted = x.double() - x.amax(-1, keepdim=True)
    scaled = shifted / torch.where(temperature < 1e-38, 1.0, temperature)[:, None]
    kept = (keys >= cut[:, None]) & (scaled >= math.log(0.01))
    for row in range(3):
        assert int(words[row, 1]) >> 32 == int(kept[row].sum())
    for word, exponent, mask in (
        (2, scaled[:3], kept[:3]), (3, scaled, kept | ~kept), (4, shifted, kept | ~kept)
    ):  # fmt: skip
        p = exponent.exp() * mask
        # 2^-24 |s| from x - max, 9.92e-8 from exp2, 2^-45 from each integer
        bound = (p * (exponent.abs() * 2.0**-24 + 9.92e-8) + 2.0**-45).sum(-1)
        error = words[: len(p), word].double() / 2**44 - p.sum(-1)
        assert (error.abs() <= bound).all()


def test_histogram(kernel):
    g = torch.Generator().manual_seed(7)
    x = torch.randn(3, 700, generator=g) * 3
    x[1] = x[1].round()
    temperature = torch.tensor([1.0, 0.3, 0.0])
    summaries = kernel.operator("shard_scan")(x)[None]
    keys = kernel.operator("shard_keys")(x, summaries, 1000)
    ordered = keys.sort(descending=True).values
    # At tokens, between tokens, twice the same, past both ends.
    edges = torch.stack((ordered[:, 0] + 5, ordered[:, 0], ordered[:, 9], ordered[:, 9],
                         ordered[:, 10] + 1, ordered[:, 600], ordered[:, -1] - 4), -1)  # fmt: skip
    run = kernel.operator("shard_histogram")
    found = run(keys, summaries, temperature, edges.contiguous()).view(3, 2, -1).cumsum(-1)
    for row in range(3):
        above = keys[row] >= edges[row][:, None]
        assert found[row, 0].tolist() == above.sum(-1).tolist()
    # The masses are those of shard_draw from the same cut.
    params = ptk.RowParams.make(3, temperature=temperature.clamp(min=0.3))
    params = params._replace(temperature=torch.tensor([1.0, 0.3, 1.0]))
    for i in range(edges.shape[1]):
        cut = edges[:, i].contiguous()
        words = kernel.operator("shard_draw")(x, summaries, *params, cut, None, 1000, 0)
        assert torch.equal(found[:, 1, i], words[:, 2])


def test_given_kept_sets_are_drawn_from(kernel):
    """A cut and its mass, found elsewhere, give the draw and its logprob."""
    batch = sized(kernel, 40, 6)
    x, params = combined(oracle.random_rows(8, batch, 300, order="vllm"))
    whole, _ = drawn(kernel, x, params, (), 300)
    live = whole.token_ids >= 0
    kept = torch.stack((whole.cut, whole.num_kept.long(), whole.kept_mass, whole.raw_mass), -1)
    parts = parts_of(x, CUTS[2])
    summaries = torch.stack([kernel.operator("shard_scan")(part) for _, part in parts])
    words = torch.stack(
        [kernel.operator("shard_draw")(part, summaries, *params, whole.cut, None, start, 0)
         for start, part in parts]
    )  # fmt: skip
    finish = kernel.operator("shard_finish")
    found = Finished(*finish(summaries, words, None, *params, kept, 0))
    assert live.any()
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(oracle.bits(one.nan_to_num(7)), oracle.bits(other.nan_to_num(7)))


def test_wanted_tokens(kernel):
    """Logprobs of given tokens where they are kept, NaN for others and for ids that are none."""
    batch, size = sized(kernel, 200, 12), 60
    x, params = combined(oracle.random_rows(9, batch, size))
    g = torch.Generator().manual_seed(9)
    wanted = torch.randint(-1, size + 2, (batch,), generator=g)
    found, _ = drawn(kernel, x, params, CUTS[2], size, wanted=wanted)
    inside = (wanted >= 0) & (wanted < size)
    d = reference.distribution(x, params)
    kept = inside & d.kept.gather(-1, wanted.clamp(0, size - 1)[:, None])[:, 0]
    assert torch.equal(found.wanted_logprobs.isnan(), ~kept)
    drawn_ids = found._replace(token_ids=found.token_ids.clamp(min=0)).token_ids
    again, _ = drawn(kernel, x, params, CUTS[2], size, wanted=drawn_ids)
    live = found.token_ids >= 0
    assert torch.equal(again.wanted_logprobs[live], found.logprobs[live])
    assert torch.equal(again.wanted_raw_logprobs[live], found.raw_logprobs[live])
    assert torch.equal(found.wanted_raw_logprobs.isnan(), ~kept)
    # The likeliest tokens' too: docs/contracts.md, Logprobs.
    logprobs = d.logprobs().gather(-1, wanted.clamp(0, size - 1)[:, None])[:, 0]
    scaled = d.scaled.gather(-1, wanted.clamp(0, size - 1)[:, None])[:, 0]
    greedy = params.temperature < 2.0**-126
    for row in kept.nonzero()[:, 0].tolist():
        expected = 0.0 if greedy[row] else float(logprobs[row])
        bound = 2.0**-23 * abs(float(scaled[row])) + 9.1e-7 + 2.0**-24 * abs(expected)
        assert abs(float(found.wanted_logprobs[row]) - expected) <= bound


def test_a_word_has_no_room_for_the_wanted_token_unless_it_is_asked_for(kernel):
    x = torch.zeros(2, 5)
    params = ptk.RowParams.make(2)
    summaries = kernel.operator("shard_scan")(x)[None]
    draw = kernel.operator("shard_draw")
    assert draw(x, summaries, *params, None, None, 0, 0).shape == (2, NUM_WORDS)
    wanted = torch.tensor([3, 99])
    words = draw(x, summaries, *params, None, wanted, 0, 0)
    assert words.shape == (2, NUM_WORDS + 1) and words[0, -1] > 0 and words[1, -1] == 0


def _rejected(kernel: Backend, batch: int, size: int, cuts: Sequence[float], seed: int) -> Any:
    """One draft a request, by the operators on parts; and verify's result for whole rows."""
    x, params = combined(oracle.random_rows(seed, batch * 2, size))
    params = params.rows(slice(0, batch))
    g = torch.Generator().manual_seed(seed)
    y = x[::2].nan_to_num(0, 0, -30) + torch.randn(batch, size, generator=g)
    y[0], y[1, : size // 2] = -math.inf, -math.inf
    drafts = reference.sample(y, params, "draft").token_ids.clamp(min=0)
    rows = ptk.RowParams(*(column.repeat_interleave(2) for column in params))
    rows = rows._replace(position=rows.position + torch.tensor([0, 1]).repeat(batch))
    wanted = torch.stack((drafts, torch.full_like(drafts, -1)), -1).flatten()
    target, summaries = drawn(kernel, x, rows, cuts, size, "bonus", wanted)
    draft, draft_summaries = drawn(kernel, y, params, cuts, size, "draft", drafts)
    accepted, steps = kernel.operator("shard_accept")(
        target.wanted_logprobs.view(batch, 2), target.status.view(batch, 2),
        draft.wanted_logprobs[:, None], drafts[:, None], params.seed, params.position,
    )  # fmt: skip
    residual = kernel.operator("shard_residual")
    words = torch.stack([
        residual(part, summaries, target.cut, target.kept_mass, draft_part, draft_summaries,
                 draft.cut, draft.kept_mass, steps, *params, start)
        for (start, part), (_, draft_part) in zip(parts_of(x, cuts), parts_of(y, cuts), strict=True)
    ])  # fmt: skip
    known = (target.cut, target.num_kept.long(), target.kept_mass, target.raw_mass)
    kept = torch.stack(known, -1)[::2]
    finish = kernel.operator("shard_finish")
    stream = rng.STREAMS["residual"]
    at = summaries[:, ::2].contiguous()
    drawn_again = Finished(*finish(at, words, None, *params, kept.contiguous(), stream))
    whole = kernel.verify(
        x.view(batch, 2, size), None, None, drafts[:, None], params, mode="rejection",
        draft_logits=y[:, None],
    )  # fmt: skip
    return whole, accepted, steps, drawn_again


@pytest.mark.parametrize("cuts", CUTS, ids=len)
def test_rejection(kernel, cuts):
    batch = sized(kernel, 150, 6)
    whole, accepted, steps, residual = _rejected(kernel, batch, 77, cuts, 10)
    assert torch.equal(accepted, whole.num_accepted)
    rejected = steps == 0
    assert rejected.any() and (accepted[rejected] == 0).all()
    assert torch.equal(residual.token_ids[rejected], whole.token_ids[rejected, 0])
    for name in ("logprobs", "raw_logprobs"):
        one, other = getattr(residual, name)[rejected], getattr(whole, name)[rejected, 0]
        torch.testing.assert_close(one, other, rtol=2.0**-23, atol=kernel.tile_error)
        if kernel.tile_error == 0:
            assert torch.equal(one, other)
    assert (residual.token_ids[~rejected] == -1).all()


@functools.cache
def good(kernel: Backend, op: str) -> tuple[Any, ...]:
    """Arguments of a call that is right: two rows of three tokens, two ranks, one draft."""
    rows, size, world = 2, 3, 2
    params = list(ptk.RowParams.make(rows))
    x = torch.zeros(rows, size)
    summaries = torch.stack([kernel.operator("shard_scan")(x)] * world)
    first = torch.zeros(rows, dtype=torch.int64)
    drawn_words = kernel.operator("shard_draw")(x, summaries, *params, None, first, 0, 0)
    words, lists = torch.stack([drawn_words] * world), torch.zeros(world, rows, 4).long()
    vector = torch.ones(rows, dtype=torch.int64)
    two = torch.ones(2 * rows, dtype=torch.int64)
    calls: dict[str, Any] = {
        "shard_scan": [x],
        "shard_keys": [x, summaries, 0],
        "shard_draw": [x, summaries, *params, vector, vector, 0, 0],
        "shard_histogram": [lists[0], summaries, params[1], lists[1]],
        "shard_finish": [summaries, words, lists, *params, torch.ones(rows, 4).long(), 0],
        "shard_accept": [torch.zeros(rows, 2), torch.zeros(rows, 2).int(), torch.zeros(rows, 1),
                         torch.zeros(rows, 1).long(), *params[-2:]],
        "shard_residual": [torch.zeros(2 * rows, size), torch.cat([summaries, summaries], 1), two,
                           two, x, summaries, vector, vector, vector, *params, 0],
    }  # fmt: skip
    return tuple(calls[op])


@pytest.mark.parametrize("op", [name for name in OPERATORS if name.startswith("shard_")])
def test_opcheck(widest, op):
    """Schemas, fakes and traced calls; the dispatcher knows no interpreter."""
    if widest.interpreted:
        pytest.skip("Triton's interpreter runs on tensors of the CPU, whose kernels are C++")
    arguments = move(good(widest, op), widest.device)
    torch.library.opcheck(getattr(torch.ops.proxytune, op).default, arguments)
