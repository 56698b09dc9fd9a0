"""The reference against small cases done by hand, and Python integers; the kernels are held to
it in tests/ops."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from proxytune_kernels import reference
from proxytune_kernels.params import RowParams

LOGITS = [math.log(p) for p in (0.4, 0.3, 0.15, 0.1, 0.05)]


def kept(**params):
    """Kept ids of tokens with probabilities .4 .3 .15 .1 .05, in fp64."""
    x = torch.tensor([LOGITS], dtype=torch.float64)
    return reference.distribution(x, RowParams.make(1, **params)).kept[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("params", "size"),
    [
        ({}, 5),
        (dict(top_k=2), 2),
        (dict(top_p=0.69), 2),
        (dict(top_p=0.71), 3),  # the token that crosses p is kept
        (dict(top_p=1e-6), 1),
        (dict(min_p=0.24), 4),  # .24 * .4 = .096
        (dict(min_p=0.26), 3),
        (dict(min_p=1.0), 1),
        # top_p .84 is of what is left: of .7 that min_p leaves (.588), or of the whole.
        (dict(min_p=0.5, top_p=0.84, filter_order="vllm"), 2),
        (dict(min_p=0.5, top_p=0.56, filter_order="vllm"), 1),
        (dict(min_p=0.5, top_p=0.56, filter_order="hf"), 2),
        (dict(min_p=0.5, top_p=0.56, filter_order="joint"), 2),
        (dict(top_k=3, top_p=0.8, filter_order="vllm"), 2),  # .8 * .85 = .68
        (dict(top_k=3, top_p=0.8, filter_order="hf"), 2),
        (dict(top_k=3, top_p=0.8, filter_order="joint"), 3),
        (dict(top_k=3, top_p=0.99, min_p=0.5, filter_order="hf"), 2),
        (dict(temperature=0.0), 1),
        (dict(temperature=1e-6, top_p=0.999), 1),
        (dict(temperature=1e6, top_p=0.79), 4),  # nearly uniform
    ],
)
def test_filters_by_hand(params, size):
    assert kept(**params) == list(range(size))


def test_order_is_by_value_then_id():
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]])
    for k, ids in enumerate(([1], [1, 3], [1, 2, 3], [1, 2, 3, 4]), 1):
        d = reference.distribution(x, RowParams.make(1, top_k=k))
        assert d.kept[0].nonzero()[:, 0].tolist() == ids


def test_negative_zero_is_zero():
    """-0 and 0 are equal logits: the lower id goes first, whichever it holds."""
    params = RowParams.make(2, top_k=1)
    d = reference.distribution(torch.tensor([[-0.0, 0.0], [0.0, -0.0]]), params)
    assert d.kept.tolist() == [[True, False]] * 2


def test_mass_target_is_exact():
    """ceil(p * mass), p cut to 32 fractional bits, at least 1."""
    ps = [1.0, 0.5, 0.9, 1 - 2.0**-24, 1e-3, 1e-9, 1e-12, 2.0**-32, 1.1754944e-38]
    masses = [0, 1, 2, 2**32 - 1, 2**32, 2**44, 2**44 + 1, 3 * 2**43 + 12345]
    for p, mass in itertools.product(ps, [*masses, 2**62 + 977, 2**63 - 1]):
        top_p = torch.tensor([p])
        exact = Fraction(math.floor(Fraction(float(top_p)) * 2**32), 2**32) * mass
        if exact < 2**63:
            found = reference.mass_target(top_p, torch.tensor([mass])).item()
            assert found == max(1, math.ceil(exact)), (p, mass)


def test_masses_are_integers_of_the_contract():
    x = torch.tensor([[0.0, -1.0, -20.0, -30.0, -31.3, -torch.inf]], dtype=torch.float64)
    d = reference.distribution(x, RowParams.make(1, temperature=0.5))
    wanted = [round(2**44 * math.exp(v / 0.5)) for v in x[0].tolist()]
    assert d.mass[0].tolist() == wanted and d.mass.dtype == torch.int64
    assert wanted[0] == 2**44 and wanted[3] == 0


def test_unpack_mask():
    words = torch.tensor([[1 | -(2**31), 0b101, -1]], dtype=torch.int32)
    allowed = reference.unpack_mask(words, 66)[0]
    assert allowed.nonzero()[:, 0].tolist() == [0, 31, 32, 34, 64, 65]


def test_fma32_rounds_once():
    a = torch.tensor([1 + 2.0**-12])
    assert reference.fma32(a, a, torch.tensor([-1.0])).item() == 2.0**-11 + 2.0**-24


def test_fp64_inputs_are_combined_in_fp64():
    base = torch.tensor([[1.0]], dtype=torch.float64)
    tiny = torch.tensor([[2.0**-40]], dtype=torch.float64)
    x = reference.combine(base, tiny, tiny * 0, torch.tensor([1.0]))
    assert x.dtype == torch.float64 and x.item() == 1 + 2.0**-40


def test_logprobs_sum_to_one_over_the_kept_set():
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    d = reference.distribution(x, RowParams.make(20, top_p=0.8, temperature=0.7))
    # masses are rounded to 2^-45 of the largest each
    torch.testing.assert_close(
        d.logprobs().exp().sum(-1), torch.ones(20, dtype=torch.float64), rtol=0, atol=50 * 2.0**-44
    )
    assert torch.equal(d.logprobs() > -torch.inf, d.kept)


def test_verify_by_hand():
    """Greedy: accepted while equal to the argmax, then the argmax, then nothing."""
    x = torch.nn.functional.one_hot(torch.tensor([[2, 0, 1], [1, 1, 0], [0, 2, 2]]), 3).double()
    drafts = torch.tensor([[2, 0], [1, 0], [1, 2]])
    params = RowParams.make(3, temperature=0.0)
    for mode, draft_x in (
        ("coupled", None),
        ("rejection", torch.nn.functional.one_hot(drafts, 3).double()),
    ):
        out = reference.verify(x, drafts, params, mode, draft_x)
        assert out.token_ids.tolist() == [[2, 0, 1], [1, 1, -1], [0, -1, -1]]
        assert out.num_accepted.tolist() == [2, 1, 0]
        assert out.logprobs.isnan().tolist() == (out.token_ids < 0).tolist()
