"""score: log-softmax of the combined logits at given tokens, against fp64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops import oracle
from tests.ops.conftest import registered, sized

pytestmark = registered

INF = torch.inf


def log_softmax(base, expert, anti, alpha):
    x = torch.from_numpy(oracle.combined(base, expert, anti, alpha))
    return x - x.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("vocab_size", (1, 5, 128, 1003, 20_000))
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: str(d)[6:])
def test_log_softmax(backend, vocab_size, dtype):
    """x - max is rounded to fp32 (2^-24 of it), the mass right to 2^-23 and 2^-24 per nat of its
    mean depth, at most ln V; masses below 2^-45 of the largest are lost, V 2^-45 together; and the
    result is rounded (2^-24 of it)."""
    g = torch.Generator().manual_seed(vocab_size)
    shape = (3, 5, vocab_size)
    base, expert, anti = ((torch.randn(shape, generator=g) * s).to(dtype) for s in (5.0, 2.0, 2.0))
    alpha = torch.tensor([1.0, 0.0, -0.7])
    token_ids = torch.randint(vocab_size, (3, 5), generator=g)
    out = backend.score(base, expert, anti, token_ids, alpha)
    wanted = log_softmax(base, expert, anti, alpha).gather(-1, token_ids[..., None])[..., 0]
    x = torch.from_numpy(oracle.combined(base, expert, anti, alpha))
    depth = x.amax(-1) - x.gather(-1, token_ids[..., None])[..., 0]
    bound = 2.0**-24 * (depth + wanted.abs() + 4 + math.log(vocab_size)) + vocab_size * 2.0**-45
    assert out.shape == (3, 5) and out.dtype == torch.float32
    assert ((out.double() - wanted).abs() <= bound + backend.tile_error).all()


def test_every_token_together_has_mass_1(backend):
    """Right to the mean of the single bounds: 2^-24 (20 + 2 ln V) or so."""
    logits = torch.randn(1, 1, 300, generator=torch.Generator().manual_seed(1)) * 3
    out = backend.score(logits.expand(1, 300, 300), None, None, torch.arange(300)[None])
    assert out.double().exp().sum().item() == pytest.approx(1.0, abs=2e-6 + backend.tile_error)


def test_tokens_outside_the_vocabulary_are_nan(backend):
    logits = torch.zeros(1, 5, 8)
    ids = torch.tensor([[-1, 8, 7, 2**40, -(2**63)]])
    out = backend.score(logits, None, None, ids)
    assert out.isnan().tolist() == [[True, True, False, True, True]]
    assert backend.score(logits, None, None, ids, vocab_size=7).isnan().all()


def test_masked_tokens_and_rows(backend):
    logits = torch.zeros(1, 5, 3)
    logits[0, 0, 1] = -INF
    logits[0, 1, 1] = torch.nan
    logits[0, 2] = -INF
    logits[0, 3, 2] = INF
    logits[0, 4, 2] = INF
    out = backend.score(logits, None, None, torch.tensor([[1, 1, 0, 1, 2]]))[0]
    assert out[:2].tolist() == [-INF, -INF] and out[2].isnan() and out[3:].tolist() == [-INF, 0.0]


def test_strided(backend):
    g = torch.Generator().manual_seed(3)
    roles = [torch.randn(4, 3, 2, 50, generator=g) for _ in range(3)]
    ids = torch.randint(40, (3, 4), generator=g).T  # strided too
    views = [r[:, :, i % 2] for i, r in enumerate(roles)]
    alpha = torch.rand(4, 2, generator=g)[:, 1]
    out = backend.score(*views, ids, alpha, vocab_size=40)
    plain = backend.score(
        *(v[..., :40].contiguous() for v in views), ids.contiguous(), alpha.contiguous()
    )
    assert torch.equal(out, plain)


def test_raw_logprobs_of_sample_are_the_same(backend):
    rows = oracle.random_rows(65, sized(backend, 80, 12), 500)
    params = dict(alpha=rows.params["alpha"], temperature=0.6, top_p=0.8, seed=3)
    out = backend.sample(rows.base, rows.expert, rows.anti, vocab_size=500, **params)
    roles = (r[:, None] for r in (rows.base, rows.expert, rows.anti))
    scored = backend.score(*roles, out.token_ids[:, None], rows.params["alpha"], vocab_size=500)
    assert torch.equal(scored[:, 0], out.raw_logprobs)
