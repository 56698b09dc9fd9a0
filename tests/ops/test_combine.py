"""combine: one rounding, per element, against exact fractions; and what passes through."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from tests.ops import oracle
from tests.ops.conftest import registered, sized

pytestmark = registered

INF = torch.inf


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=lambda d: str(d)[6:])
def test_one_rounding(backend, dtype):
    """``fma(alpha, fl32(expert - anti), base)`` to the bit, in exact arithmetic.

    The reference rounds twice where fp64 can't hold the sum: one case in 2^29, not in these.
    """
    g = torch.Generator().manual_seed(1)
    base, expert, anti = (torch.randn(3, 333, generator=g).mul(4).to(dtype) for _ in range(3))
    alpha = torch.tensor([1.0, 0.3, -1.7])
    x = backend.combine(base, expert, anti, alpha)
    for row in range(3):
        a = Fraction(float(alpha[row]))
        for i in range(333):
            b, e, n = (Fraction(float(t[row, i])) for t in (base, expert, anti))
            difference = Fraction(oracle.nearest_fp32(e - n)) if e != n else Fraction(0)
            assert float(x[row, i]) == oracle.nearest_fp32(b + a * difference), (row, i)


def test_a_product_rounded_first_would_show(backend):
    """alpha * d = 1 + 2^-11 + 2^-24 exactly; less 1, one rounding keeps its last bit."""
    alpha = 1 + 2.0**-12
    d = torch.tensor([[1 + 2.0**-12]])
    x = backend.combine(torch.tensor([[-1.0]]), d, torch.zeros(1, 1), alpha)
    assert float(x) == 2.0**-11 + 2.0**-24


@pytest.mark.parametrize("alpha", (0.0, -0.0))
@pytest.mark.parametrize("poison", (torch.nan, INF, -INF))
def test_alpha_0_is_base(backend, alpha, poison):
    base = torch.tensor([[1.5, -INF, 3e-45, 1e38, -7.0]])
    other = torch.full_like(base, poison)
    for expert, anti in ((other, other), (other, base), (base, other)):
        assert torch.equal(backend.combine(base, expert, anti, alpha), base)


def test_alpha_0_for_some_rows(backend):
    base, expert, anti = torch.zeros(2, 4), torch.full((2, 4), torch.nan), torch.zeros(2, 4)
    x = backend.combine(base, expert, anti, torch.tensor([0.0, 1.0]))
    assert x[0].tolist() == [0.0] * 4 and x[1].isnan().all()


def test_infinities_and_nan_pass_through(backend):
    #                     base expert anti -> x at alpha 2
    cases = torch.tensor([
        [-INF, 1, 2, -INF], [-INF, INF, 0, -INF], [-INF, torch.nan, 0, -INF],
        [-INF, INF, INF, -INF],
        [INF, 1, 2, INF], [INF, -INF, 0, torch.nan], [0, INF, 0, INF], [0, 0, INF, -INF],
        [0, INF, INF, torch.nan], [torch.nan, 0, 0, torch.nan], [1, 3e38, -3e38, INF],
    ])  # fmt: skip
    for repeat in (1, 30):  # in whole tiles and in the last one
        base, expert, anti, wanted = cases.repeat(repeat, 1).T[:, None].contiguous()
        x = backend.combine(base, expert, anti, 2.0)
        torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)


def test_base_alone(backend):
    base = torch.randn(3, 400, generator=torch.Generator().manual_seed(2))
    for dtype in oracle.DTYPES:
        role = base.to(dtype)
        assert torch.equal(backend.combine(role, None, None, 1.0), role.float())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_16_bit_number(backend, dtype):
    """All 65,536 of them, subnormal ones and infinities too; NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for shape in ((1, 2**16), sized(backend, (2**14, 4), (2**8, 2**8))):
        x = backend.combine(every.view(shape), None, None, 1.0)
        assert torch.equal(x.isnan(), every.view(shape).isnan())
        assert torch.equal(x.nan_to_num(0), every.view(shape).float().nan_to_num(0))


def test_width_is_the_narrowest_roles(backend):
    base, expert, anti = torch.zeros(2, 9), torch.ones(2, 7), torch.zeros(2, 8)
    assert backend.combine(base, expert, anti, 1.0).shape == (2, 7)
    assert backend.combine(base, expert, anti, 1.0, vocab_size=5).shape == (2, 5)
