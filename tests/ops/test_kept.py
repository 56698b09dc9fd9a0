"""Kept sets: as a sort in fp64 finds them, for every filter, order, dtype and backend."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from tests.ops import oracle
from tests.ops.conftest import sized


@functools.cache
def _cases(
    dtype: torch.dtype, order: str, sizes: tuple[tuple[int, int], ...]
) -> list[tuple[oracle.Rows, oracle.Kept, oracle.Array]]:
    seed = 10 * oracle.DTYPES.index(dtype) + oracle.ORDERS.index(order)
    found = []
    for rows in oracle.batches(seed, dtype, order, sizes):
        x = rows.x
        found.append((rows, oracle.kept(x, rows.filters), x))
    return found


def check_inside(kept: oracle.Kept, out: ptk.SampleOutput) -> oracle.Ints:
    """Sizes differ from the oracle's only inside its band, and tokens are of the kept sets."""
    size = out.num_kept.numpy()
    wrong = (size < kept.low) | (size > kept.high)
    at = np.flatnonzero(wrong)
    assert not wrong.any(), (at, size[wrong], kept.low[wrong], kept.high[wrong])
    assert ((kept.order == out.token_ids.numpy()[:, None]).argmax(-1) < size).all()
    return size


@pytest.mark.parametrize("order", oracle.ORDERS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: str(d)[6:])
def test_kept_sets_are_the_sort_oracles(backend, dtype, order):
    """At least 3,000 rows."""
    total = undecided = cut_among_ties = 0
    # In the interpreter each width with one dtype.
    sizes = sized(backend, oracle.MANY, oracle.FEW[oracle.DTYPES.index(dtype) :: 3])
    for rows, kept, x in _cases(dtype, order, sizes):
        params = ptk.RowParams(**rows.params)
        out = backend.sample(*rows[:3], params, vocab_size=rows.vocab_size)
        size = check_inside(kept, out)
        assert not out.status.any()
        found, drawn = out.logprobs.double().numpy(), out.token_ids.numpy()
        _check_logprobs(found, drawn, x, rows.filters, kept, size, backend.tile_error)
        total += len(size)
        undecided += int((kept.low != kept.high).sum())
        ordered = np.take_along_axis(x, kept.order, 1)
        ends = np.stack([size - 1, np.minimum(size, x.shape[1] - 1)], 1)
        edge = np.take_along_axis(ordered, ends, 1)
        cut_among_ties += int(((edge[:, 0] == edge[:, 1]) & (size < x.shape[1])).sum())
    assert total == sum(rows for _, rows in sizes)
    assert cut_among_ties > sized(backend, 100, -1)  # ties at the cut are among the rows
    assert undecided <= sized(backend, 0.01 * total, 1)  # and nearly every size is settled


def _check_logprobs(logprobs, drawn, x, filters, kept, size, tile_error):
    """The probability drawn with is that of the kept set: one token more or less would show.

    The scaled difference d / T carries 3 roundings to fp32 and the result one: 2^-22 |d / T| and
    2^-23 |logprob|. The mass of the kept set is right to 2^-22 or so (as the band's), and to V
    halves of a unit, 2^-45 of the maximum's.
    """
    wanted = oracle.log_probabilities(x, filters.temperature, kept.order, size)
    at = np.arange(len(x)), drawn
    scaled = (x[at] - x.max(-1)) / np.where(filters.temperature == 0, 1, filters.temperature)
    bound = 2.0**-22 * (np.abs(scaled) + np.abs(wanted[at]) + 2 + math.log(x.shape[1]))
    assert (np.abs(logprobs - wanted[at]) <= bound + tile_error).all()


def test_kept_sets_recovered_by_drawing(backend):
    """Every token of a kept set is drawn and no other is: the set itself, not only its size."""
    rows = oracle.random_rows(5, 300, 40)
    params = rows.params | {"temperature": rows.params["temperature"].clamp(min=1.0)}
    params["top_k"] = torch.where(params["top_k"] < 1, 12, params["top_k"].clamp(max=12)).int()
    rows = rows._replace(params=params)
    x = rows.x
    kept = oracle.kept(x, rows.filters)
    wanted = oracle.log_probabilities(x, rows.filters.temperature, kept.order, kept.low)
    # Each token of a set is missed with probability 0.98^1500 = 7e-14, or 0.8^90 = 2e-9.
    least, draws, sets, of_three = sized(backend, (0.02, 1500, 60, 15), (0.2, 90, 1, 0))
    likely = np.where(np.isneginf(wanted), 0, wanted).min(-1) > math.log(least)
    settled = likely & (kept.low == kept.high) & (kept.low >= sized(backend, 1, 3))
    chosen = np.flatnonzero(settled)[:sets]
    assert len(chosen) == sets and (kept.low[chosen] > 2).sum() > of_three
    for row in chosen:
        one = {n: v[row].expand(draws).contiguous() for n, v in params.items()}
        one["position"] = torch.arange(draws)
        roles = (t[row].expand(draws, -1) for t in (rows.base, rows.expert, rows.anti))
        out = backend.sample(*roles, ptk.RowParams(**one), vocab_size=rows.vocab_size)
        assert set(out.token_ids.tolist()) == set(kept.order[row, : kept.low[row]].tolist())


@pytest.mark.parametrize("count", (1, 2, 7, 128, 300, 5000, 20000))
def test_constant_rows_are_cut_by_id(backend, count):
    """All logits equal: masses are all 2^44 and sums exact, so sizes are exact too."""
    # Of one program, of several, and past 8192 tokens, which one program searches alone.
    count = sized(backend, count, {5000: 2100, 20_000: 8200}.get(count, count))
    p = torch.tensor([1.0, 1.0, 0.5, 0.3, 0.999, 1e-9, 0.75, 1.0])
    k = torch.tensor([0, 5, 0, 0, 0, 0, 3, 2**31 - 1], dtype=torch.int32)
    # fp32 p has 24 bits, at most 32 of them behind the point; the shortest prefix that reaches it
    shares = [max(1, math.ceil(math.floor(float(v) * 2**32) * count / 2**32)) for v in p]
    # Long lists take the interpreter seconds a row.
    short = count <= 128 or not backend.interpreted
    rows = slice(None) if short else slice(2, 3)
    for order in oracle.ORDERS if short else ("joint",):
        whole = [min(int(j) or count, count) for j in k]
        if order == "joint":
            sizes = [min(s, w) for s, w in zip(shares, whole, strict=True)]
        else:
            fp = [math.floor(float(v) * 2**32) for v in p]
            sizes = [max(1, math.ceil(f * w / 2**32)) for f, w in zip(fp, whole, strict=True)]
        row = torch.full((1, count), -3.25).expand(len(p[rows]), -1)
        out = backend.sample(row, top_p=p[rows], top_k=k[rows], filter_order=order, temperature=0.5)
        assert out.num_kept.tolist() == sizes[rows]
        assert (out.token_ids < torch.tensor(sizes[rows])).all()


def test_ties_at_the_cut_go_by_id(backend):
    """Two values: of the tied tokens at the cut the lower ids stay, wherever they lie."""
    cases = [(50, 7), (1000, 300), (9000, 5), (20000, 12345)]
    if backend.name == "reference":
        cases = cases[:2]
    # Each of three tokens has at least 0.28: one is missed in 36 draws with probability 2e-5.
    cases, few, many = sized(backend, (cases, 8, 256), ([(5, 2), (600, 300), (1100, 5)], 3, 36))
    for vocab_size, high in cases:
        g = torch.Generator().manual_seed(vocab_size + high)
        row = torch.zeros(vocab_size)
        row[torch.randperm(vocab_size, generator=g)[:high]] = 0.5
        order = torch.where(row > 0)[0].tolist() + torch.where(row == 0)[0].tolist()
        for size in (1, high - 1, high, high + 1, high + 3, vocab_size - 1):
            draws = many if 1 < size <= few else sized(backend, 2, 1)
            out = backend.sample(
                row.expand(draws, -1), top_k=size, temperature=4.0, position=torch.arange(draws)
            )
            assert set(out.num_kept.tolist()) == {size}
            assert set(out.token_ids.tolist()) <= set(order[:size])
            if size <= few:  # each of 8 has at least 0.11: one is missed with probability 8e-13
                assert set(out.token_ids.tolist()) == set(order[:size])


def test_the_token_that_crosses_p_is_kept_to_the_unit(backend):
    """p times the mass is not an integer: the prefix must reach it, not the integer below.

    With p = 1 - 2^-24 and masses 2^44 and m = 2^20 + 1, p (2^44 + m) lies between 2^44 and
    2^44 + 1: one token has not reached it. m is right to 2^-23 of itself, an eighth of a unit.
    """
    wanted = (2**20 + 1) / 2**44
    step = np.float32(2.0**-19)  # of fp32 at 16.6
    found = 0
    for k in range(-40, 40):
        temperature = np.float32(1 + k * 2.0**-23)
        d = np.float32(math.log(wanted) * float(temperature))
        for gap in (d - step, d, d + step):
            m = 2**44 * math.exp(float(gap) / float(temperature))
            if abs(m - (2**20 + 1)) > 0.2:
                continue
            found += 1
            row = torch.tensor([[0.0, float(gap)]])
            out = backend.sample(row, top_p=1 - 2.0**-24, temperature=float(temperature))
            assert out.num_kept.tolist() == [2]
        if found > sized(backend, 240, 3):
            break
    assert found > 3


@pytest.mark.parametrize(
    ("spread", "order"), [(0.0, "vllm"), (1e-3, "hf"), (1.0, "joint"), (4.0, "vllm")]
)
def test_wide_rows(kernel, spread, order):
    """130,000 tokens, flat to peaked: pruning fails for the flat ones, and histograms take over.

    Every order of the filters but in the interpreter, where the spreads share them out.
    """
    for each in sized(kernel, oracle.ORDERS, (order,)):
        check_wide_rows(kernel, spread, each)


def check_wide_rows(kernel, spread, order):
    vocab_size = sized(kernel, 130_000, 700)
    g = torch.Generator().manual_seed(int(spread * 1000))
    row = torch.randn(1, vocab_size, generator=g) * spread
    row = torch.cat([row, (row * 8).round() / 8])  # and one with thousands of ties
    filters = [
        (1.0, 0, 0.0), (0.9, 0, 0.0), (0.5, vocab_size * 5 // 13, 0.0), (0.999, 100, 0.0),
        (1.0, vocab_size * 7 // 13 + 1, 0.02), (0.7, 0, 0.3), (1e-7, 0, 0.0),
    ]  # fmt: skip
    top_p, top_k, min_p = (torch.tensor(v).repeat_interleave(2) for v in zip(*filters, strict=True))
    base = row.repeat(len(filters), 1)
    rows = sized(kernel, slice(None), slice(0, None, 3))
    base, top_p, top_k, min_p = (t[rows] for t in (base, top_p, top_k, min_p))
    out = kernel.sample(
        base, top_p=top_p, top_k=top_k, min_p=min_p, filter_order=order, temperature=0.9
    )
    f = oracle.Filters(
        np.full(len(base), float(np.float32(0.9))), top_k.long().numpy(), top_p.double().numpy(),
        min_p.double().numpy(), np.full(len(base), oracle.ORDERS.index(order)),
    )  # fmt: skip
    kept = oracle.kept(base.double().numpy(), f)
    check_inside(kept, out)
    # Flat rows have thousands of tokens inside 1e-6 of the mass; the decided ones must not be few.
    assert (kept.high - kept.low <= 2 + 3e-6 * base.shape[1]).all()


_LOWEST = torch.finfo(torch.float32).min
HARD = {
    "ties": lambda normal, uniform: normal.round(),  # thousands of them, at 0 too
    "steps": lambda normal, uniform: (5 * uniform).floor() / 4,
    "two values": lambda normal, uniform: torch.where(normal > -0.3, 0.0, -0.5),
    "geometric": lambda normal, uniform: -torch.exp2(250 * uniform - 125),
    "far below": lambda normal, uniform: torch.where(uniform < 0.6, -1e9, 2 * normal),
    "lowest": lambda normal, uniform: torch.where(uniform < 0.5, _LOWEST, 2 * normal),
    "sorted": lambda normal, uniform: 3 * normal.sort().values,
    "all floats": lambda normal, uniform: 1 + uniform.argsort() * 2.0**-23,
    "unsampled": lambda normal, uniform: torch.where(_sampled(len(normal)), normal - 8, normal),
}
"""Rows for which estimates are wrong, or in which bins of x or of keys part few tokens."""


def _sampled(vocab_size: int) -> Tensor:
    """The tokens that csrc/cpu/select.h estimates from: 16 of each tile."""
    ids = torch.arange(vocab_size)
    return ids % 128 // 16 == ids // 128 * 5 % 8


@pytest.mark.parametrize("kind", HARD)
def test_searches_do_not_get_lost(kernel, kind):
    """Kept sets are the reference's. A sort makes its own: it neither estimates nor bins."""
    vocab_size = sized(kernel, 24_000, 700)
    g = torch.Generator().manual_seed(len(kind))
    row = HARD[kind](torch.randn(vocab_size, generator=g), torch.rand(vocab_size, generator=g))
    mass = ((row - row.max()) / 0.7).double().exp()
    middle = float(mass[row >= row.median()].sum() / mass.sum())
    filters = [
        (top_p, top_k, order)
        for top_p, top_k in (
            (0.1, 0), (0.9, 0), (0.99999, 0), (min(1.0001 * middle, 0.9999), 0),
            (1.0, vocab_size // 3), (0.999, vocab_size // 2),
        )
        for order in range(3)
    ]  # fmt: skip
    filters = sized(kernel, filters, filters[::7])
    base = row.repeat(len(filters), 1)
    top_p, top_k, order = (torch.tensor(column) for column in zip(*filters, strict=True))
    given: dict[str, Any] = dict(
        top_p=top_p, top_k=top_k, filter_order=order, temperature=0.7, seed=3
    )
    out = kernel.sample(base, **given)
    expected = ptk.sample(base, **given, backend="reference")
    assert torch.equal(out.num_kept, expected.num_kept)
    assert torch.equal(out.token_ids, expected.token_ids)


@functools.cache
def _wide_cases(vocab_size, batch):
    """A real model's widths and peaks: most tiles are pruned, and masses only bounded."""
    rows = oracle.random_rows(99, batch, vocab_size)
    return rows, oracle.kept(rows.x, rows.filters)


def test_kept_sets_of_wide_peaked_rows(kernel):
    for vocab_size, batch in sized(kernel, [(20_000, 240)], [(8193, 5), (50_257, 1)]):
        rows, kept = _wide_cases(vocab_size, batch)
        out = kernel.sample(*rows[:3], ptk.RowParams(**rows.params), vocab_size=vocab_size)
        check_inside(kept, out)
        assert (kept.low == kept.high).mean() >= 0.8  # flat rows have tokens of under 1e-6 each


@pytest.mark.parametrize("below", [0.5, 1e-3, 1e30])
def test_the_likeliest_tile_says_nothing_of_the_others(backend, below):
    """Its tokens are all equal; those of the others, too many to sort, lie apart or anywhere."""
    x = 5.0 - below * torch.rand(1, 12_800, generator=torch.Generator().manual_seed(0))
    x[:, :128] = 5.0
    temperature = max(1.0, below)
    given: Any = {"temperature": temperature, "top_p": 0.9, "seed": 3}
    wanted = ptk.sample(x, backend="reference", **given)
    out = backend.sample(x, **given)
    assert (out.token_ids, out.num_kept) == (wanted.token_ids, wanted.num_kept)
    assert int(out.num_kept) > 2048  # what a kernel sorts at once


def test_rows_at_the_ends_of_fp32(backend):
    """Tokens that lie further below the maximum than fp32 reaches are tokens all the same."""
    vocab_size = sized(backend, 9000, 700)
    filters: list[dict[str, Any]] = [
        dict(min_p=0.1), dict(min_p=0.1, top_p=0.5), dict(min_p=1e-30, temperature=1e30),
        dict(min_p=0.1, top_k=5), dict(top_k=200), dict(top_k=vocab_size - 3),
        dict(top_k=vocab_size // 2, top_p=0.7), dict(top_p=0.5), dict(top_k=131, temperature=1e30),
    ]  # fmt: skip
    for i, values in enumerate(filters):
        few = slice(i % 4, None, 4) if backend.interpreted else slice(None)
        rows = oracle.rows_at_the_ends_of_fp32(vocab_size)[few]
        x = rows.double().numpy()
        for order in sized(backend, oracle.ORDERS, oracle.ORDERS[i % 3 : i % 3 + 1]):
            params = ptk.RowParams.make(len(rows), filter_order=order, **values)
            out = backend.sample(rows, params=params)
            f = oracle.Filters.of(params._asdict())
            kept = oracle.kept(x, f)
            size = check_inside(kept, out)
            found, drawn = out.logprobs.double().numpy(), out.token_ids.numpy()
            _check_logprobs(found, drawn, x, f, kept, size, backend.tile_error)


def test_top_k_as_wide_as_the_row_is_off(backend):
    batch = sized(backend, 50, 6)
    rows = oracle.random_rows(6, batch, 77)
    plain = rows.params | {"top_k": torch.zeros(batch, dtype=torch.int32)}
    for k in (-1, 77, 78, 2**31 - 1):
        wide = plain | {"top_k": torch.full((batch,), k, dtype=torch.int32)}
        made = (ptk.RowParams(**values) for values in (plain, wide))
        oracle.assert_same(*(backend.sample(*rows[:3], p, vocab_size=77) for p in made))


def test_greedy_is_the_first_maximum(backend):
    batch = sized(backend, 400, 60)
    rows = oracle.random_rows(7, batch, 150)
    params = ptk.RowParams(**rows.params | {"temperature": torch.zeros(batch)})
    out = backend.sample(*rows[:3], params, vocab_size=150)
    assert out.token_ids.tolist() == rows.x.argmax(-1).tolist()  # numpy: the first of equals
    assert out.num_kept.tolist() == [1] * batch and out.logprobs.tolist() == [0.0] * batch


def test_a_subnormal_temperature_is_greedy(backend):
    row = torch.tensor([[1.0, 1.0 + 2**-20, 0.5]])
    out = backend.sample(row.expand(3, -1), temperature=torch.tensor([1e-39, 1e-45, 1.1754942e-38]))
    assert out.token_ids.tolist() == [1, 1, 1] and out.num_kept.tolist() == [1, 1, 1]


@pytest.mark.parametrize("temperature", (1.1754944e-38, 1e-30, 1e-6, 1e6, 3e38))
def test_extreme_temperatures(backend, temperature):
    """Just above zero only the maxima have mass; at infinity all are alike."""
    batch = sized(backend, 64, 6)
    rows = oracle.random_rows(8, batch, 200)
    t = float(np.float32(temperature))
    given: Any = {"temperature": t, "top_p": 0.9, "position": torch.arange(batch)}
    out = backend.sample(*rows[:3], vocab_size=200, **given)
    base, expert, anti = (r[:, :200] for r in rows[:3])
    x = oracle.combined(base, expert, anti, torch.ones(batch))
    ones, zeros = np.ones(batch), np.zeros(batch, int)
    f = oracle.Filters(ones * t, zeros, ones * float(np.float32(0.9)), 0 * ones, zeros)
    check_inside(oracle.kept(x, f), out)
    assert torch.isfinite(out.logprobs).all()
