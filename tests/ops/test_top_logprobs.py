"""sample with top_logprobs: the likeliest tokens against a stable sort in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import proxytune_kernels as ptk
from tests.ops import oracle
from tests.ops.conftest import registered, sized

INF = torch.inf
MOST = 128


def expected(x: oracle.Array, n: int) -> tuple[oracle.Ints, oracle.Array, oracle.Array]:
    """Token ids, raw logprobs and the distances below the maximum of x [B, V], each [B, n]."""
    order = np.argsort(-x, axis=-1, kind="stable")[:, :n]
    missing = ((0, 0), (0, max(0, n - x.shape[1])))
    with np.errstate(invalid="ignore", divide="ignore"):
        depth = x.max(-1, keepdims=True) - x
        logprobs = -depth - np.log(np.exp(-depth).sum(-1, keepdims=True))
    token_ids, logprobs, depth = (
        np.pad(values, missing, constant_values=fill)
        for values, fill in (
            (order, -1),
            (np.take_along_axis(logprobs, order, 1), np.nan),
            (np.take_along_axis(depth, order, 1), np.inf),
        )
    )
    masked = ~np.isfinite(depth)
    return np.where(masked, -1, token_ids), np.where(masked, np.nan, logprobs), depth


def check(out: ptk.SampleOutput, x: oracle.Array, n: int, tile_error: float) -> None:
    """``out.top`` is the sort's, with logprobs in the bound of docs/contracts.md, Logprobs."""
    top = out.top
    assert top is not None
    assert top.token_ids.shape == top.logprobs.shape == (len(x), n)
    assert (top.token_ids.dtype, top.logprobs.dtype) == (torch.int64, torch.float32)
    token_ids, logprobs, depth = expected(x, n)
    np.testing.assert_array_equal(top.token_ids.numpy(), token_ids)
    found = top.logprobs.double().numpy()
    np.testing.assert_array_equal(np.isnan(found), token_ids < 0)
    live = token_ids >= 0
    bound = 2.0**-24 * (depth[live] + np.abs(logprobs[live])) + max(9.1e-7, tile_error)
    assert (np.abs(found[live] - logprobs[live]) <= bound).all()


def draw(backend: Any, rows: oracle.Rows, n: int, index: Any = slice(None), **kwargs: Any) -> Any:
    roles = (t[index] for t in rows[:3])
    params = ptk.RowParams(**rows.params).rows(index)
    return backend.sample(*roles, params, vocab_size=rows.vocab_size, top_logprobs=n, **kwargs)


@pytest.mark.parametrize("vocab_size", (1, 5, 127, 128, 129, 1000, 2085))
def test_tokens_are_the_sorts(backend, vocab_size):
    """Whatever the filters keep; a third of the rows has ties, a third -inf tokens.

    A dtype is what a role is read as, whatever the width: each of them at two widths or three.
    """
    few = (2,) if vocab_size % 2 else (MOST,)
    batch, numbers = sized(backend, (60, (1, 2, 20, MOST)), (3, few))
    dtype = oracle.DTYPES[vocab_size % 3]
    rows = oracle.random_rows(300 + vocab_size, batch, vocab_size, dtype)
    for n in numbers:
        check(draw(backend, rows, n), rows.x, n, backend.tile_error)


def test_the_rows_above_have_ties_at_the_cut_and_too_few_tokens():
    rows = oracle.random_rows(1300, 60, 1000)
    ordered = -np.sort(-rows.x, -1)
    assert (ordered[:, 19] == ordered[:, 20]).sum() > 5
    assert (oracle.random_rows(428, 60, 128).x == -np.inf).any(-1).sum() > 5


@pytest.mark.parametrize("vocab_size", (20_000, 130_000))
@pytest.mark.parametrize("spread", (1e-3, 1.0, 6.0))
def test_wide_rows(kernel, vocab_size, spread):
    """Flat to peaked, and one with thousands of ties: where a kernel can't sort what is left."""
    vocab_size = sized(kernel, vocab_size, vocab_size // 36)
    g = torch.Generator().manual_seed(vocab_size)
    row = torch.randn(1, vocab_size, generator=g) * spread
    base = torch.cat([row, (row * 2).round() / 2, (row > 2 * spread).float()])
    for n in sized(kernel, (1, 7, MOST), (7,)):
        out = kernel.sample(base, top_logprobs=n, top_k=3)
        check(out, base.double().numpy(), n, kernel.tile_error)


@pytest.mark.parametrize("vocab_size", (1, 100, 128, 300, 5000, 20_000))
def test_equal_logits_go_by_id(backend, vocab_size):
    vocab_size = sized(backend, vocab_size, min(vocab_size, 550 + vocab_size // 100))
    row = torch.full((2, vocab_size), -3.25)
    row[1, vocab_size // 2 :] = 0.5
    for n in sized(backend, (1, 40, MOST), (40, MOST)):
        check(backend.sample(row, top_logprobs=n), row.double().numpy(), n, backend.tile_error)


def test_zeros_of_both_signs_are_equal(backend):
    row = torch.tensor([[-0.0, 0.0, -0.0, -1.0, 0.0]])
    out = backend.sample(row, top_logprobs=5)
    assert out.top.token_ids.tolist() == [[0, 1, 2, 4, 3]]
    steered = backend.sample(row * 0, row, row, top_logprobs=5)  # 0 + 1 * 0
    assert steered.top.token_ids.tolist() == [[0, 1, 2, 3, 4]]


def test_order_is_by_x_where_its_distance_from_the_maximum_rounds(backend):
    """fl(x - max) is the same for all but the first; or it is past fp32, -inf of a live token."""
    row = torch.tensor([[1e-45, 3e-45, 3e38, -1.0, -3e38, -INF]])
    top = backend.sample(row, top_logprobs=6).top
    assert top.token_ids.tolist() == [[2, 1, 0, 3, 4, -1]]
    low = float(np.float32(-3e38))
    assert top.logprobs[0, :5].tolist() == [0.0, low, low, low, -INF] and top.logprobs[0, 5].isnan()


def test_rows_at_the_ends_of_fp32(backend):
    """Tiles that lie further below the maximum than fp32 reaches are as good as others."""
    rows = oracle.rows_at_the_ends_of_fp32(sized(backend, 5000, 700))
    rows = rows[2::3] if backend.interpreted else rows
    for n in sized(backend, (5, MOST), (MOST,)):
        top = backend.sample(rows, top_logprobs=n).top
        token_ids, logprobs, _ = expected(rows.double().numpy(), n)
        np.testing.assert_array_equal(top.token_ids.numpy(), token_ids)
        with np.errstate(over="ignore"):
            wanted = torch.from_numpy(logprobs.astype(np.float32))
        bound = 2.0**-23 * wanted.abs() + max(9.1e-7, backend.tile_error)
        near = (top.logprobs - wanted).abs() <= bound
        assert (near | (top.logprobs == wanted) | (wanted.isnan() & top.logprobs.isnan())).all()


def test_status_rows(backend):
    """NaN is masked, +inf alone is left where there is one, and nothing where nothing is."""
    x = torch.tensor([
        [0.0, torch.nan, 2.0, 1.0], [INF, 5.0, INF, -INF], [INF, torch.nan, 0.0, 0.0],
        [-INF] * 4, [torch.nan] * 4, [-INF, -1e30, -INF, -INF], [3.0, 2.0, 1.0, 0.0],
    ])  # fmt: skip
    position = torch.tensor([0, 0, 0, 0, 0, 0, -1])
    out = backend.sample(x, top_logprobs=3, position=position)
    assert out.status.tolist() == [1, 2, 3, 4, 5, 0, 8]
    assert out.top.token_ids.tolist() == [
        [2, 3, 0], [0, 2, -1], [0, -1, -1], [-1] * 3, [-1] * 3, [1, -1, -1], [-1] * 3,
    ]  # fmt: skip
    plain = np.array([
        [0.0, -np.inf, 2.0, 1.0], [0.0, -np.inf, 0.0, -np.inf], [0.0] + [-np.inf] * 3,
        [-np.inf] * 4, [-np.inf] * 4, [-np.inf, -1e30, -np.inf, -np.inf], [-np.inf] * 4,
    ])  # fmt: skip
    check(out, plain, 3, backend.tile_error)


@pytest.mark.parametrize("vocab_size", (33, 300))
def test_bias_and_mask(backend, vocab_size):
    batch = sized(backend, 40, 10)
    rows = oracle.random_rows(vocab_size, batch, vocab_size, padding=0)
    g = torch.Generator().manual_seed(1)
    bias = (torch.randn(batch, vocab_size, generator=g) * 2).round() / 4
    words = torch.randint(-(2**31), 2**31, (batch, -(-vocab_size // 32)), generator=g).int()
    words[:5] = 0
    words[:5, 0] = 0b1010  # fewer tokens than are asked for
    bits = (words.numpy()[..., None] >> np.arange(32)) & 1
    allowed = bits.reshape(batch, -1)[:, :vocab_size] == 1
    x = (rows.x.astype(np.float32) + bias.numpy()).astype(np.float64)
    out = draw(backend, rows, 9, bias=bias, allowed_mask=words)
    check(out, np.where(allowed, x, -np.inf), 9, backend.tile_error)


def test_the_rest_of_the_output_does_not_change(backend):
    rows = oracle.random_rows(8, sized(backend, 100, 3), 700)
    out = draw(backend, rows, 12)
    oracle.assert_same(out._replace(top=None), draw(backend, rows, 0))


@registered
def test_logprobs_are_the_bits_of_raw_logprobs_and_score(backend):
    batch = sized(backend, 100, 5)
    rows = oracle.random_rows(9, batch, 700)
    out = draw(backend, rows, 30)
    drawn = out.top.token_ids == out.token_ids[:, None]
    assert drawn.any(-1).sum() > batch // 2
    assert torch.equal(out.top.logprobs[drawn], out.raw_logprobs[drawn.any(-1)])
    roles = (t[:, None].expand(-1, 30, -1) for t in rows[:3])
    scored = backend.score(*roles, out.top.token_ids, rows.params["alpha"], vocab_size=700)
    live = out.top.token_ids >= 0
    assert live.sum() > 20 * batch and torch.equal(scored[live], out.top.logprobs[live])


@pytest.mark.parametrize("vocab_size", (5, 300, 2048))
def test_fewer_are_the_first_of_more(backend, vocab_size):
    rows = oracle.random_rows(vocab_size, sized(backend, 48, 2), vocab_size, torch.bfloat16)
    whole = draw(backend, rows, MOST).top
    for n in sized(backend, (1, 3, 40, 127), (3, 40)):
        few = ptk.TopLogprobs(whole.token_ids[:, :n], whole.logprobs[:, :n])
        oracle.assert_same(draw(backend, rows, n).top, few)


def test_no_rows_and_off(backend):
    top = backend.sample(torch.zeros(0, 7), top_logprobs=9).top
    assert (top.token_ids.shape, top.logprobs.shape) == ((0, 9), (0, 9))
    assert backend.sample(torch.zeros(1, 7)).top is None
    assert backend.sample(torch.zeros(1, 7), top_logprobs=0).top is None
