"""verify: coupled gives plain decoding's tokens, rejection the target's law."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import proxytune_kernels as ptk
from tests.ops import oracle
from tests.ops.conftest import Backend, sized

SIGNIFICANCE = 1e-5


def block(seed, batch, k, vocab_size, dtype=torch.float32):
    """Logits [B, k + 1, V] of three roles, and one set of parameters per row."""
    rows = oracle.random_rows(seed, batch * (k + 1), vocab_size, dtype, padding=0)
    roles = [t.view(batch, k + 1, vocab_size) for t in rows[:3]]
    g = torch.Generator().manual_seed(seed)
    return roles, ptk.RowParams(**oracle.random_params(g, batch, vocab_size))


def plain(backend, roles, params, **kwargs):
    """What decoding without drafts draws at each position: a SampleOutput of [B, k + 1]."""
    outs = [
        backend.sample(
            *(r[:, j] for r in roles),
            params=params._replace(position=params.position + j),
            **kwargs,
        )
        for j in range(roles[0].shape[1])
    ]
    columns = zip(*(out[:-2] for out in outs), strict=True)
    return ptk.SampleOutput._make([*(torch.stack(column, 1) for column in columns), None, None])


@pytest.mark.parametrize(("k", "vocab_size"), [(0, 9), (1, 1), (3, 20), (4, 300), (7, 2)])
def test_coupled_is_plain_decoding(backend, k, vocab_size):
    """Token for token, logprob for logprob, whatever the drafts: right, wrong, missing, absurd."""
    batch, dtype = sized(backend, 60, 3), oracle.DTYPES[k % 3]
    roles, params = block(70 + k, batch, k, vocab_size, dtype)
    wanted = plain(backend, roles, params)
    tokens, status = wanted.token_ids, wanted.status
    g = torch.Generator().manual_seed(71)
    drafts = tokens[:, :k].clone()
    wrong = torch.rand(batch, k, generator=g) < 0.2
    drafts[wrong] = torch.randint(-1, vocab_size + 2, (int(wrong.sum()),), generator=g)
    out = backend.verify(*roles, drafts, params)
    for row in range(batch):
        agree = [int(d) == int(t) for d, t in zip(drafts[row], tokens[row, :k], strict=True)] + [
            False
        ]
        accepted = agree.index(False)
        assert int(out.num_accepted[row]) == accepted
        emitted = [*tokens[row, : accepted + 1].tolist(), *[-1] * (k - accepted)]
        assert out.token_ids[row].tolist() == emitted
        used = torch.arange(k + 1) <= accepted
        for name in ("logprobs", "raw_logprobs"):
            expected = getattr(wanted, name)[row].masked_fill(~used, torch.nan)
            torch.testing.assert_close(
                getattr(out, name)[row], expected, rtol=0, atol=0, equal_nan=True
            )
        assert int(out.status[row]) == np.bitwise_or.reduce(status[row, : accepted + 1].numpy())


def test_coupled_never_accepts_a_missing_draft_of_an_empty_row(backend):
    logits = torch.full((1, 2, 4), -torch.inf)
    out = backend.verify(logits, None, None, torch.tensor([[-1]]))
    assert out.num_accepted.tolist() == [0] and out.token_ids.tolist() == [[-1, -1]]
    assert out.status.tolist() == [4] and out.logprobs.isnan().all()


@pytest.mark.parametrize("mode", ("coupled", "rejection"))
@pytest.mark.parametrize("k", (1, 4))
def test_is_the_references(kernel, mode, k):
    """Token for token but where fp32 scores tie (see test_sample): not in these rows."""
    batch = sized(kernel, 400, 6)
    roles, params = block(80 + k, batch, k, 50)
    g, stream = torch.Generator().manual_seed(81), "sample" if mode == "coupled" else "draft"
    draft_logits = roles[0][:, :k] + 0.5 * torch.randn(batch, k, 50, generator=g)
    steps = [params._replace(position=params.position + j) for j in range(k)]
    drawn = [
        kernel.sample(draft_logits[:, j], params=p, noise_stream=stream)
        for j, p in enumerate(steps)
    ]
    drafts = torch.stack([d.token_ids for d in drawn], 1)
    drafts[::9] = torch.randint(-1, 52, drafts[::9].shape, generator=g)
    extra = {} if mode == "coupled" else {"draft_logits": draft_logits}
    out = kernel.verify(*roles, drafts, params, mode=mode, **extra)
    wanted = Backend("reference").verify(*roles, drafts, params, mode=mode, **extra)
    assert out.token_ids.tolist() == wanted.token_ids.tolist()
    assert out.num_accepted.tolist() == wanted.num_accepted.tolist()
    assert out.status.tolist() == wanted.status.tolist()
    # each is right to test_kept's bound, which at these depths (under 130 nats) is 2^-22 * 264
    for name in ("logprobs", "raw_logprobs"):
        one, other = getattr(out, name), getattr(wanted, name)
        torch.testing.assert_close(one, other, rtol=0, atol=7e-5, equal_nan=True)
    assert 0 < out.num_accepted.sum() < batch * k


def test_bias_and_mask_apply_to_the_target(backend):
    batch = sized(backend, 30, 5)
    (base, _, _), params = block(85, batch, 2, 40)
    params = params._replace(alpha=torch.ones(batch))
    g = torch.Generator().manual_seed(86)
    bias = torch.randn(batch, 3, 40, generator=g)
    allowed = torch.randint(-(2**31), 2**31, (batch, 3, 2), generator=g).int()
    words = allowed.long()[..., None] >> torch.arange(32) & 1
    x = (base + bias).masked_fill(words.flatten(-2)[..., :40] == 0, -torch.inf)
    drafts = torch.randint(40, (batch, 2), generator=g)
    for mode in ("coupled", "rejection"):
        extra = {} if mode == "coupled" else {"draft_logits": base[:, :2]}
        out = backend.verify(
            base, None, None, drafts, params, mode=mode, bias=bias, allowed_mask=allowed, **extra
        )
        wanted = backend.verify(x, None, None, drafts, params, mode=mode, **extra)
        assert out.token_ids.tolist() == wanted.token_ids.tolist()


# Rejection, by full enumeration: a toy language model over 8 tokens whose next logits depend on
# the last token and the position, a drafter near it, filters on both.
V, K = 8, 3
FILTERS = [
    dict(),
    dict(temperature=0.7, top_k=6, top_p=0.9),
    dict(temperature=1.4, min_p=0.12, top_p=0.95, filter_order="hf"),
]


def toy(seed):
    """Target and draft logits by position and last token: [K + 1, V + 1, V]; V: no token yet."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(K + 1, V + 1, V, generator=g) * 1.2
    return target, target + torch.randn(K + 1, V + 1, V, generator=g) * 0.8


def decode_three(backend, target, draft, draws, seed, filters):
    """The first three tokens of speculative decoding, and how many drafts were accepted."""
    position, start = torch.arange(draws) * 16, torch.full((draws,), V)
    last, drafts = start, []
    for j in range(K):
        out = backend.sample(
            draft[j][last], position=position + j, seed=seed, noise_stream="draft", **filters
        )
        last = out.token_ids
        drafts.append(last)
    path = torch.stack([start, *drafts], 1)
    steps = torch.arange(K + 1)
    out = backend.verify(
        target[steps, path], None, None, path[:, 1:].contiguous(), mode="rejection",
        draft_logits=draft[steps[:K], path[:, :K]], position=position, seed=seed, **filters,
    )  # fmt: skip
    tokens = out.token_ids[:, :3].clone()
    for j in range(1, 3):  # past a rejection: plain decoding, from a seed of its own
        plain = backend.sample(
            target[j][tokens[:, j - 1]], position=position + j, seed=seed + 10**6, **filters
        )
        tokens[:, j] = torch.where(tokens[:, j] < 0, plain.token_ids, tokens[:, j])
    return tokens, drafts[0], out.num_accepted


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(FILTERS)))
def test_rejection_has_the_targets_joint_law(fast, case):
    """1.2 * 10^6 decodings in all: chi-square over the 512 first three tokens, and the acceptance
    rate, which is the sum of min(target, draft): not one more can be accepted, none less is."""
    filters, draws = FILTERS[case], 400_000
    target, draft = toy(case)
    tokens, first, accepted = decode_three(fast, target, draft, draws, 100 + case, filters)
    p = [oracle.law(target[j], **filters) for j in range(3)]
    joint = np.zeros((V, V, V))
    for a, b, c in itertools.product(range(V), repeat=3):
        joint[a, b, c] = p[0][V, a] * p[1][a, b] * p[2][b, c]
    counts = np.zeros((V, V, V))
    np.add.at(counts, tuple(tokens.numpy().T), 1)
    assert counts[joint == 0].sum() == 0
    expected = draws * joint
    small = expected < 10
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    chi = ((observed - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    assert stats.chi2.sf(chi, (wanted > 0).sum() - 1) > SIGNIFICANCE

    q = oracle.law(draft[0], **filters)[V]
    rate = np.minimum(p[0][V], q).sum()
    assert stats.binomtest(int((accepted > 0).sum()), draws, rate).pvalue > SIGNIFICANCE
    # By token: a draft t is accepted with probability min(1, p / q) of itself.
    for t in range(V):
        drafted = (first == t).numpy()
        if drafted.sum() > 0:
            kept = int((accepted.numpy()[drafted] > 0).sum())
            share = min(1.0, p[0][V, t] / q[t])
            assert stats.binomtest(kept, int(drafted.sum()), share).pvalue > SIGNIFICANCE / V


def test_the_bonus_after_a_full_acceptance_has_the_targets_law(fast):
    """Draft = target: all is accepted; the fourth token depends on none of the first three."""
    draws = 200_000
    row = torch.randn(V, generator=torch.Generator().manual_seed(90))
    position = torch.arange(draws) * 4
    batch = row.expand(draws, -1)
    drawn = [
        fast.sample(batch, position=position + j, seed=1, noise_stream="draft") for j in range(K)
    ]
    drafts = torch.stack([d.token_ids for d in drawn], 1)
    logits = row.expand(draws, K + 1, -1)
    given = {"draft_logits": logits[:, :K], "position": position, "seed": 1}
    out = fast.verify(logits, None, None, drafts, mode="rejection", **given)
    assert out.num_accepted.eq(K).all() and torch.equal(out.token_ids[:, :K], drafts)
    pairs = np.zeros((V, V))
    np.add.at(pairs, (out.token_ids[:, K - 1].numpy(), out.token_ids[:, K].numpy()), 1)
    p = oracle.law(row)
    assert stats.chisquare(pairs.ravel(), draws * np.outer(p, p).ravel()).pvalue > SIGNIFICANCE


def test_acceptance_does_not_reuse_the_draft_noise(fast):
    """Given the draft token, acceptance must not depend on the noise that drew it: the drafter's
    noise of the losing tokens is known, and can't tell accepted from rejected."""
    draws = 100_000
    q = torch.tensor([0.0, 0.0])
    p = torch.tensor([0.0, -1.0])  # token 1 is accepted with probability 2 * 0.269
    position = torch.arange(draws)
    tokens = fast.sample(
        q.expand(draws, -1), position=position, seed=2, noise_stream="draft"
    ).token_ids
    ones = position[tokens == 1]
    # Whether token 1 would have won by two nats more.
    clear = fast.sample(
        torch.tensor([2.0, 0.0]).expand(len(ones), -1), position=ones, seed=2, noise_stream="draft"
    ).token_ids
    out = fast.verify(
        p.expand(len(ones), 2, -1), None, None, torch.ones(len(ones), 1, dtype=torch.int64),
        mode="rejection", draft_logits=q.expand(len(ones), 1, -1), position=ones, seed=2,
    )  # fmt: skip
    table = np.zeros((2, 2))
    np.add.at(table, (clear.numpy(), out.num_accepted.numpy()), 1)
    assert stats.chi2_contingency(table, correction=False).pvalue > SIGNIFICANCE
    assert out.num_accepted.double().mean().item() == pytest.approx(
        2 * 0.26894, abs=0.01
    )  # 4 sigma: 0.009


def test_greedy_rejection_is_argmax_equality(backend):
    batch = sized(backend, 120, 8)
    roles, params = block(91, batch, 3, 30)
    params = params._replace(temperature=torch.zeros(batch))
    x = oracle.combined(roles[0], roles[1], roles[2], params.alpha)
    argmax = torch.from_numpy(x.argmax(-1))
    g = torch.Generator().manual_seed(92)
    draft_logits = torch.randn(batch, 3, 30, generator=g)
    drafts = torch.where(
        torch.rand(batch, 3, generator=g) < 0.7, argmax[:, :3], draft_logits.argmax(-1)
    )
    # A drafter that is greedy too: its logits have their maximum at the drafted token.
    draft_logits = draft_logits.scatter(2, drafts[..., None], 9.0)
    for mode in ("coupled", "rejection"):
        extra = {} if mode == "coupled" else {"draft_logits": draft_logits}
        out = backend.verify(*roles, drafts, params, mode=mode, **extra)
        agree = torch.cat([drafts == argmax[:, :3], torch.zeros(batch, 1, dtype=torch.bool)], 1)
        accepted = agree.int().cumprod(1).sum(1)
        assert out.num_accepted.tolist() == accepted.tolist()
        used = torch.arange(4) <= accepted[:, None]
        assert out.token_ids.tolist() == torch.where(used, argmax, -1).tolist()


def test_drafts_outside_a_kept_set(backend):
    """Outside the target's: rejected, always; the residual is drawn from the target's kept set."""
    draws = sized(backend, 300, 32)  # the less likely token has 0.26: missed in 32 with 6e-5
    x = torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(draws, 2, -1)
    apart = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(draws, 1, -1)  # keeps 2 and 3
    for bad, some in ((2, draws), *((bad, sized(backend, draws, 3)) for bad in (3, 4, 10**12))):
        out = backend.verify(
            x[:some], None, None, torch.full((some, 1), bad), mode="rejection",
            draft_logits=apart[:some], top_k=2, position=torch.arange(some) * 2,
        )  # fmt: skip
        tokens = set(out.token_ids[:, 0].tolist())
        assert not out.num_accepted.any()
        assert tokens == {0, 1} or (some < draws and tokens < {0, 1})
        assert out.token_ids[:, 1].eq(-1).all()
    # A draft that the drafter's own kept set lacks has probability 0 there: target / 0, accepted.
    out = backend.verify(
        x[:3], None, None, torch.zeros(3, 1, dtype=torch.int64), mode="rejection",
        draft_logits=torch.tensor([0.0, 0.0, 5.0, 6.0]).expand(3, 1, -1), top_k=2,
    )  # fmt: skip
    assert out.num_accepted.eq(1).all()


def test_rejection_of_rows_without_drafts_is_plain_decoding(backend):
    """Where k is 0, or the first draft is -1: to the bit, whatever follows it."""
    batch = sized(backend, 40, 6)
    roles, params = block(93, batch, 2, 25)
    drafts = torch.full((batch, 2), -1)
    drafts[::2, 1] = 3
    for k in (0, 2):
        out = backend.verify(
            *(r[:, : k + 1] for r in roles), drafts[:, :k], params, mode="rejection",
            draft_logits=roles[0][:, :k] * 0,
        )  # fmt: skip
        wanted = backend.sample(*(r[:, 0] for r in roles), params=params)
        for name in ("token_ids", "logprobs", "raw_logprobs"):
            one, other = getattr(out, name)[:, 0], getattr(wanted, name)
            assert torch.equal(oracle.bits(one), oracle.bits(other)), name
        assert torch.equal(out.status, wanted.status)
        assert not out.num_accepted.any() and out.token_ids[:, 1:].eq(-1).all()


def test_a_draft_that_is_missing_further_on_is_drawn_as_the_bonus(backend):
    """A row with fewer drafts ends with a token of the target, not of the residual."""
    batch = sized(backend, 40, 6)
    (base, _, _), params = block(95, batch, 2, 25)
    params = params._replace(top_k=torch.full_like(params.top_k, 5))
    sure = base[:, 0].argmax(-1)
    drafts = torch.stack([sure, torch.full_like(sure, -1)], 1)
    # A drafter that gives its draft next to nothing: accepted, always.
    unlikely = torch.zeros_like(base[:, :2]).scatter_(2, drafts[:, :1, None].expand(-1, 2, 1), -60)
    out = backend.verify(base, None, None, drafts, params, mode="rejection", draft_logits=unlikely)
    live = out.num_accepted == 1
    assert live.sum() > batch // 2
    later = params._replace(position=params.position + 1)
    bonus = backend.sample(base[:, 1], params=later, noise_stream="bonus")
    assert torch.equal(out.token_ids[live, 1], bonus.token_ids[live])
    assert torch.equal(
        oracle.bits(out.raw_logprobs[live, 1]), oracle.bits(bonus.raw_logprobs[live])
    )


def test_a_residual_of_nothing_is_the_target(backend):
    """Draft and target are the same, and the draft outside of both: rounding leaves nothing."""
    batch = sized(backend, 60, 10)
    (base, _, _), params = block(94, batch, 1, 140)
    drafts = torch.full((batch, 1), 10**6)
    out = backend.verify(
        base, None, None, drafts, params, mode="rejection", draft_logits=base[:, :1]
    )
    wanted = backend.sample(base[:, 0], params=params, noise_stream="residual")
    assert out.token_ids[:, 0].tolist() == wanted.token_ids.tolist()
    assert len(set(wanted.token_ids.tolist())) > batch // 4
    assert torch.equal(out.status, wanted.status) and not out.num_accepted.any()
    for name in ("logprobs", "raw_logprobs"):
        one, other = getattr(out, name)[:, 0], getattr(wanted, name)
        assert torch.equal(oracle.bits(one), oracle.bits(other)), name


@pytest.mark.parametrize("mode", ("coupled", "rejection"))
def test_bad_parameters_and_empty_rows(backend, mode):
    logits = torch.zeros(3, 2, 6)
    logits[1] = -torch.inf
    extra = {} if mode == "coupled" else {"draft_logits": torch.zeros(3, 1, 6)}
    top_p = torch.tensor([1.0, 1.0, 2.0])
    out = backend.verify(
        logits, None, None, torch.zeros(3, 1, dtype=torch.int64), mode=mode, top_p=top_p, **extra
    )
    assert out.status.tolist() == [0, 4, 8]
    assert out.token_ids[1:].tolist() == [[-1, -1]] * 2 and out.logprobs[1:].isnan().all()
    assert torch.equal(out.raw_logprobs.isnan(), out.token_ids < 0)
    assert out.num_accepted[1:].tolist() == [0, 0] and out.token_ids[0, 0] >= 0
