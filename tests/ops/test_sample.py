"""sample: golden draws, the noise itself, the reference's tokens, masks, status."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

import proxytune_kernels as ptk
from proxytune_kernels import reference, rng
from tests.ops import golden, oracle
from tests.ops.conftest import Backend, sized

NAN, POSITIVE_INF, EMPTY, BAD = 1, 2, 4, 8
INF = torch.inf
STREAMS = ("sample", "draft", "accept", "residual", "bonus")


def test_golden_draws(backend):
    draws = json.loads(golden.PATH.read_text())["draws"]
    wide = max(golden.WIDTHS)
    few = [d for i, d in enumerate(draws) if (d["vocab_size"] < wide and i % 2) or i % 60 == 4]
    assert sum(d["vocab_size"] == wide for d in few) == 4
    for entry in sized(backend, draws, few):
        roles = golden.logits(entry["case"], entry["vocab_size"], entry["shift"])
        options = {"noise_stream": entry["stream"]}
        edits = golden.edits_of(entry)
        if edits is not None:
            if backend.name in ("cuda", "cluster"):
                continue  # they take none
            options["edits"] = edits
        out = backend.sample(*roles, golden.params_of(entry), **options)
        assert int(out.token_ids) == entry["token_id"], entry
        assert int(out.num_kept) == entry["num_kept"], entry


def _check_gap(backend, token, other, seed, position, stream="sample"):
    """g(token) - g(other) is the contract's: the most that the other's logit may be above.

    Races of two, in which the other has a little less and a little more; fp32 scores and logs are
    right to 2^-20 of their size.
    """
    code = rng.STREAMS[stream]
    one, rival = (oracle.gumbel(seed, position, i, code) for i in (token, other))
    bound = 2.0**-20 * (4 + abs(one - rival))
    steps = one - rival + torch.tensor([-20, -1, -bound, bound, 1, 20], dtype=torch.float64)
    rows = torch.full((6, max(token, other) + 1), -INF)
    rows[:, token], rows[:, other] = 0.0, steps.float()
    out = backend.sample(rows, seed=seed, position=position, noise_stream=stream)
    assert out.token_ids.tolist() == [token] * 3 + [other] * 3


@pytest.mark.parametrize(
    ("seed", "position", "token", "other"),
    [
        (7, 0, 0, 1),
        (7, 5, 2, 9),
        (2**64 - 1, 2**40 + 1, 130, 127),
        (3, 1757194, 46, 45),  # word 0: drawn again
        (12, 586726, 21, 4),
        (29, 1473643, 6, 7),
        (0, 58585, 48, 49),  # word 0xFFFFFFE3: fp32 rounds it to 2^32, u to its bound
        (0, 1260597, 24, 3),
    ],
)
def test_the_noise_is_the_contracts(backend, seed, position, token, other):
    _check_gap(backend, token, other, seed, position)


@pytest.mark.parametrize("stream", rng.STREAMS)
def test_each_stream_has_its_own_noise(backend, stream):
    assert rng.STREAMS[stream] == STREAMS.index(stream)
    _check_gap(backend, 1, 2, 3, 8, stream)


def test_a_word_that_rounds_up_to_1_still_draws(backend):
    """Tokens whose word is at least 2^32 - 64, alone in their kept set: noise that is NaN or -inf
    would leave nothing."""
    for position, token in ((58585, 48), (1260597, 24), (2662490, 15), (3207180, 57)):
        row = torch.zeros(1, 64)
        row[0, token] = 1.0
        out = backend.sample(row, top_k=1, seed=0, position=position)
        assert out.token_ids.tolist() == [token]
        row = torch.full((1, 64), -INF)
        row[0, token] = 1.0
        assert backend.sample(row, seed=0, position=position).token_ids.tolist() == [token]


@functools.cache
def _reference_draws(dtype, sizes):
    found = []
    for rows in oracle.batches(50 + oracle.DTYPES.index(dtype), dtype, "joint", sizes):
        params = ptk.RowParams(**rows.params)
        base, expert, anti = (t[:, : rows.vocab_size] for t in rows[:3])
        x = reference.combine(base, expert, anti, params.alpha)
        d = reference.distribution(x, params)
        wanted = Backend("reference").sample(*rows[:3], params, vocab_size=rows.vocab_size)
        found.append(
            (rows, d, reference.scores(d, params, 0), wanted, oracle.kept(rows.x, rows.filters))
        )
    return found


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: str(d)[6:])
def test_tokens_are_the_references(kernel, dtype):
    """Where they differ, the two best fp64 scores lie as close as fp32 scores are wrong.

    Score = (x - max) / T + g: three roundings of the first term, two logs of 2 units in the last
    place each (the outer one's argument is wrong by 2^-22, so g by 2^-22 + 2^-22 |g|), and the
    sum's rounding. Two tokens, so twice 2^-22 (|d / T| + |g| + 2).
    """
    differ = total = 0
    sizes = sized(kernel, oracle.MANY, oracle.FEW)
    for rows, d, scores, wanted, kept in _reference_draws(dtype, sizes):
        params = ptk.RowParams(**rows.params)
        out = kernel.sample(*rows[:3], params, vocab_size=rows.vocab_size)
        same_set = (out.num_kept == wanted.num_kept).numpy()
        assert (same_set | (kept.low != kept.high)).all()
        total += int(same_set.sum())
        for row in np.flatnonzero(same_set & (out.token_ids != wanted.token_ids).numpy()):
            one, other = int(out.token_ids[row]), int(wanted.token_ids[row])
            gap = float(scores[row, other] - scores[row, one])
            size = max(
                abs(float(d.scaled[row, t])) + abs(float(scores[row, t])) for t in (one, other)
            )
            differ += 1
            print(f"row {row}: {one} for {other}, {gap:.3g} apart")
            assert 0 <= gap <= 2 * 2.0**-22 * (2 * size + 2)
    assert total > 0.95 * sum(rows for _, rows in sizes) and differ <= 3


def test_logprobs_are_the_references(kernel):
    """raw_logprob: fp32 x - max, masses right to 2^-23, one rounding (as in test_kept)."""
    rows = oracle.random_rows(60, sized(kernel, 500, 16), 777)
    params = ptk.RowParams(**rows.params)
    out = kernel.sample(rows.base, rows.expert, rows.anti, params, vocab_size=777)
    x = torch.from_numpy(rows.x)
    raw = (x - x.logsumexp(-1, keepdim=True)).gather(1, out.token_ids[:, None])[:, 0]
    depth = (x.amax(-1) - x.gather(1, out.token_ids[:, None])[:, 0]).abs()
    bound = 2.0**-22 * (depth + raw.abs() + 2 + math.log(777))
    assert ((out.raw_logprobs.double() - raw).abs() <= bound + kernel.tile_error).all()


def test_roles_of_different_dtypes(backend):
    rows = oracle.random_rows(61, sized(backend, 200, 5), 300)
    params = ptk.RowParams(**rows.params)
    for dtypes in ((0, 1, 2), (1, 0, 0), (2, 2, 1), (0, 2, 2)):
        roles = [t.to(oracle.DTYPES[d]) for t, d in zip(rows[:3], dtypes, strict=True)]
        out = backend.sample(*roles, params, vocab_size=300)
        wide = backend.sample(*(r.float() for r in roles), params, vocab_size=300)
        oracle.assert_same(out, wide)


def test_alpha_0_does_not_look_at_expert_and_anti(backend):
    base = torch.randn(4, 50, generator=torch.Generator().manual_seed(63))
    plain = backend.sample(base)
    for poison in (torch.nan, INF, -INF):
        bad = torch.full_like(base, poison)
        out = backend.sample(base, bad, bad, alpha=0.0)
        assert out.token_ids.tolist() == plain.token_ids.tolist() and not out.status.any()


@pytest.mark.parametrize("vocab_size", (4, 130, 700))
def test_status_and_masks(backend, vocab_size):
    """Each rule of the contract's Inputs and Combination; what is masked is never drawn."""

    def row(**values):
        x = torch.zeros(vocab_size)
        for i, v in values.items():
            x[int(i[1:])] = v
        return x

    nothing = torch.full((vocab_size,), -INF)
    alone = nothing.clone()
    alone[2] = -1e30
    only_nan = torch.full((vocab_size,), torch.nan)
    base = torch.stack([
        row(_1=torch.nan), row(_1=INF, _3=INF), row(_0=INF, _1=torch.nan), nothing, only_nan, alone,
        row(_0=3e38, _1=-3e38), row(),
    ])  # fmt: skip
    wanted = [NAN, POSITIVE_INF, NAN | POSITIVE_INF, EMPTY, NAN | EMPTY, 0, 0, 0]
    sizes = [vocab_size - 1, 2, 1, 0, 0, 1, None, vocab_size]
    for position in range(sized(backend, 40, 4)):
        out = backend.sample(base, position=position)
        assert out.status.tolist() == wanted
        assert [a for a, b in zip(out.num_kept.tolist(), sizes, strict=True) if b is not None] == [
            s for s in sizes if s is not None
        ]
        tokens = out.token_ids.tolist()
        assert tokens[0] != 1 and tokens[1] in (1, 3) and tokens[2:6] == [0, -1, -1, 2]
        assert tokens[6] == 0 and 0 <= tokens[7] < vocab_size
        for name in ("logprobs", "raw_logprobs"):
            value = getattr(out, name)
            assert value.isnan().tolist() == [t < 0 for t in tokens]
        for value in (out.logprobs[1], out.raw_logprobs[1]):  # two alike, whatever else there was
            assert value.item() == pytest.approx(math.log(0.5), abs=1e-6)


def test_infinities_of_expert_and_anti(backend):
    base = torch.zeros(6, 5)
    base[5, 0] = -INF
    expert, anti = torch.zeros(6, 5), torch.zeros(6, 5)
    expert[0, 0] = INF  # x = +inf
    anti[1, 0] = INF  # x = -inf: masked
    expert[2, 0] = anti[2, 0] = INF  # inf - inf = NaN: masked
    expert[3, 0] = -INF
    anti[4, 0] = -INF
    expert[5, 0] = INF  # -inf in base stays masked
    out = backend.sample(base, expert, anti)
    assert out.status.tolist() == [POSITIVE_INF, 0, NAN, 0, POSITIVE_INF, 0]
    assert out.num_kept.tolist() == [1, 4, 4, 4, 1, 4]


def test_parameters_out_of_range_mark_their_row_alone(backend):
    nan = torch.nan
    bad: dict[str, list[Any]] = {
        "alpha": [nan, INF, -INF], "temperature": [nan, INF, -1.0, -1e-45], "top_k": [-2, -(2**31)],
        "top_p": [nan, 0.0, -0.1, 1.0001], "min_p": [nan, -1e-9, 1.0001], "filter_order": [-1, 3],
        "position": [-1],
    }  # fmt: skip
    for name, values in bad.items():
        params = ptk.RowParams.make(3)
        for value in values:
            column = getattr(params, name).clone()
            column[1] = torch.tensor(value, dtype=column.dtype)
            out = backend.sample(torch.zeros(3, 9), params=params._replace(**{name: column}))
            assert out.status.tolist() == [0, BAD, 0], (name, value)
            assert out.token_ids.tolist()[1] == -1 and out.num_kept.tolist()[1] == 0
            assert out.logprobs.isnan().tolist() == [False, True, False]
            assert (out.token_ids[[0, 2]] >= 0).all()


@pytest.mark.parametrize("vocab_size", (1, 31, 32, 33, 127, 129, 300))
def test_bias_and_mask(backend, vocab_size):
    """The same as adding the bias to, and masking, the combined logits."""
    batch = sized(backend, 40, 6)
    rows = oracle.random_rows(vocab_size, batch, vocab_size, padding=0)
    g = torch.Generator().manual_seed(64)
    bias = (torch.randn(batch, vocab_size, generator=g) * 2).round() / 4
    bias[torch.rand(batch, vocab_size, generator=g) < 0.05] = -INF
    allowed = torch.rand(batch, vocab_size, generator=g) < 0.6
    words = -(-vocab_size // 32)
    padded = torch.ones(batch, 32 * words, dtype=torch.int64)  # bits past the row: never read
    padded[:, :vocab_size] = allowed
    packed = (padded.view(batch, words, 32) << torch.arange(32)).sum(-1)
    packed = (packed - (packed >> 31 << 32)).int()
    params = ptk.RowParams(**rows.params)
    x = backend.combine(rows.base, rows.expert, rows.anti, params.alpha)
    by_hand = torch.where(x == -INF, x, x + bias).masked_fill(~allowed, -INF)
    kwargs = dict(bias=bias, allowed_mask=packed)
    assert torch.equal(backend.combine(*rows[:3], params.alpha, **kwargs), by_hand)
    out = backend.sample(*rows[:3], params, **kwargs)
    plain = backend.sample(by_hand, params=params)
    oracle.assert_same(out, plain)
    strided = torch.stack([bias, bias + 1], 1)[:, 0], torch.stack([packed, packed], 1)[:, 1]
    again = backend.sample(*rows[:3], params, bias=strided[0], allowed_mask=strided[1])
    assert again.token_ids.tolist() == out.token_ids.tolist()


def test_no_rows(backend):
    out = backend.sample(torch.zeros(0, 7))
    assert [list(t.shape) for t in oracle.tensors(out).values()] == [[0]] * 5
