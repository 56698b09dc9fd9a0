"""Triton's language does what kernels rely on: on a device, and corrected in its interpreter.

``proxytune_kernels/kernels/interpreter.py`` has the corrections; the same tests hold a device to
them, so that the interpreter may stand in for it.
"""

from __future__ import annotations

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from tests.ops import oracle
from tests.ops.conftest import NEEDS_TRITON, Backend

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

pytestmark = NEEDS_TRITON

TRITON = Backend("triton")
INF, NAN = torch.inf, torch.nan

SEVEN = tl.constexpr(7.0)


@triton.jit
def _fma_kernel(x, y, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


@triton.jit
def _scalar_fma_kernel(x, y, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y), 0.5 * tl.load(z)))


@triton.jit
def _constants_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, SEVEN - value)
    tl.store(out + N + i, SEVEN + value)
    tl.store(out + 2 * N + i, SEVEN * value)
    tl.store(out + 3 * N + i, SEVEN / value)
    tl.store(out + 4 * N + i, value - SEVEN)
    tl.store(out + 5 * N + i, value / SEVEN)
    tl.store(out + 6 * N + i, tl.abs(SEVEN - value))  # a function takes the result


@triton.jit
def _extrema_kernel(x, y, larger, smaller, highest, N: tl.constexpr):
    i = tl.arange(0, N)
    one, other = tl.load(x + i), tl.load(y + i)
    tl.store(larger + i, tl.maximum(one, other))
    tl.store(smaller + i, tl.minimum(one, other))
    tl.store(highest, tl.max(one, 0))


@triton.jit
def _narrow_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


def launch(kernel, *arguments, **constants) -> None:
    from proxytune_kernels.kernels.common import OPTIONS
    from proxytune_kernels.ops.backends import triton_operators  # noqa: F401  (corrects the interpreter)

    kernel[(1,)](*arguments, **constants, **OPTIONS)


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``tl.fma`` of fp32 tensors of a power of two elements."""
    x, y, z = (t.float().to(TRITON.device) for t in (x, y, z))
    out = torch.full_like(x, 77)
    launch(_fma_kernel, x, y, z, out, N=len(x))
    return out.cpu()


def exactly(x: Tensor, y: Tensor, z: Tensor) -> list[float]:
    """x * y + z in fractions, rounded to fp32 once."""
    triples = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    return [oracle.nearest_fp32(Fraction(a) * Fraction(b) + Fraction(c)) for a, b, c in triples]


@pytest.mark.parametrize("exponent", (0, 24, 47, 60, -140))
def test_fma_rounds_once(exponent):
    """Of random numbers; with -140, results are subnormal."""
    g = torch.Generator().manual_seed(abs(exponent))
    x, y, z = (torch.randn(1024, generator=g) for _ in range(3))
    # z about 2^exponent times the product, so that their bits meet everywhere.
    if exponent < 0:
        x, y, z = x * 2.0**-70, y * 2.0**-70, z * 2.0**exponent
    else:
        z = z * 2.0 ** (exponent * torch.rand(1024, generator=g)).round()
    assert fma(x, y, z).tolist() == exactly(x, y, z)


def test_bf16_is_rounded_to_nearest_even():
    """Ties in both directions, a carry into the exponent and past the largest, zeros, NaN."""
    ties = torch.tensor([1.00390625, 1.01171875, 1.9999, 3.4e38, -0.0, INF, NAN, 1e-39])
    x = torch.cat([ties, torch.randn(504, generator=torch.Generator().manual_seed(1))])
    out = torch.empty(len(x), dtype=torch.bfloat16, device=TRITON.device)
    launch(_narrow_kernel, x.to(TRITON.device), out, N=len(x))
    assert torch.equal(out.cpu().nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
    assert out[6].isnan()


def test_fma_of_sums_that_fp64_rounds_onto_a_tie():
    """2^46 + 1 and 2^46 - 1 as products: the 1 decides the fp32 result, and fp64 loses it."""
    above, below = (8392705.0, 8384513.0), (2.0**23 - 1, 2.0**23 + 1)
    cases = []
    for (a, b), c in ((above, 2.0**70), (below, 2.0**70 + 2.0**47), (above, 2.0**71 - 2.0**47)):
        for sign in (1, -1):
            for scale in (1.0, 2.0**-60, 2.0**50, 2.0**-140):
                cases.append((sign * a * scale, b, sign * c * scale))
                cases.append((-sign * a * scale, b, sign * c * scale))
    cases += [(0.0, 0.0, 0.0)] * (64 - len(cases))
    x, y, z = torch.tensor(cases, dtype=torch.float64).T
    assert torch.equal(x.float().double(), x) and torch.equal(z.float().double(), z)
    assert above[0] * above[1] == 2.0**46 + 1 and below[0] * below[1] == 2.0**46 - 1
    wanted = exactly(x, y, z)
    assert fma(x, y, z).tolist() == wanted
    # A check of the check: rounding to fp64 between would show in a quarter of the cases or more.
    twice = (x * y + z).float().tolist()
    assert sum(a != b for a, b in zip(twice, wanted, strict=True)) >= len(cases) // 4


def test_fma_of_what_is_not_a_number_and_of_zeros():
    cases = torch.tensor([
        [INF, 0.0, 1.0, NAN], [INF, 1.0, -INF, NAN], [NAN, 1.0, 1.0, NAN], [1.0, 1.0, NAN, NAN],
        [1e38, 10.0, -INF, -INF], [3e38, 3e38, -3e38, INF], [-3e38, 3e38, INF, INF],
        [3e38, 2.0, -3e38, 3e38], [0.0, -1.0, 0.0, 0.0], [0.0, -1.0, -0.0, -0.0],
        [1.0, 1.0, -1.0, 0.0], [1e-45, 0.5, 1e-45, 3e-45], [1e-45, 0.5, 0.0, 0.0],
        [1e-45, 0.75, 0.0, 1e-45], [-INF, 2.0, 5.0, -INF], [2.0, 3.0, 4.0, 10.0],
    ])  # fmt: skip
    x, y, z, wanted = cases.T.contiguous()
    found = fma(x, y, z)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    zero = wanted == 0
    assert torch.equal(found[zero].signbit(), wanted[zero].signbit())


def test_fma_of_scalars():
    x = torch.arange(16.0, device=TRITON.device) + 2.0**-12
    y, z = torch.tensor([1 + 2.0**-12, -3.0], device=TRITON.device)[:, None]
    out = torch.empty_like(x)
    launch(_scalar_fma_kernel, x, y, z, out, N=16)
    wanted = exactly(x.cpu(), y.cpu().expand(16), (0.5 * z).cpu().expand(16))
    assert out.cpu().tolist() == wanted


def test_constants_and_tensors():
    x = torch.tensor([1.0, -2.5, 7.0, 0.1, INF, 1e-40, 3e38, -0.0], device=TRITON.device)
    out = torch.empty((7, 8), device=TRITON.device)
    launch(_constants_kernel, x, out, N=8)
    wanted = torch.stack([7 - x, 7 + x, 7 * x, 7 / x, x - 7, x / 7, (7 - x).abs()])
    # A device divides to 2 units in the last place; all else is rounded once.
    torch.testing.assert_close(out, wanted, rtol=2.0**-22, atol=0)
    exact = [0, 1, 2, 4, 6]
    assert torch.equal(out[exact], wanted[exact])


def test_the_larger_of_a_number_and_nan_is_the_number():
    x = torch.tensor([NAN, 1.0, NAN, 2.0], device=TRITON.device)
    y = torch.tensor([3.0, NAN, NAN, -5.0], device=TRITON.device)
    larger, smaller, highest = (torch.empty(4, device=TRITON.device) for _ in range(3))
    launch(_extrema_kernel, x, y, larger, smaller, highest, N=4)
    for found, wanted in ((larger, [3.0, 1.0, NAN, 2.0]), (smaller, [3.0, 1.0, NAN, -5.0])):
        expected = torch.tensor(wanted)
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert float(highest[0]) == 2.0


@pytest.mark.skipif(not TRITON.interpreted, reason="the interpreter does not run here")
def test_kernels_warn_of_nothing_and_leave_numpy_as_it_was():
    """They subtract infinities and let integers wrap; what the caller does in numpy still warns."""
    row = torch.full((2, 200), -INF)
    row[0, 3], row[1, 5], row[1, 6] = INF, NAN, 1.0
    before = np.geterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (dict(), dict(top_p=0.9, seed=2**64 - 1), dict(temperature=1e-30)):
            TRITON.sample(row, **values)
    assert np.geterr() == before
    with pytest.warns(RuntimeWarning, match="invalid value"):
        np.float32(INF) - np.float32(INF)


@pytest.mark.skipif(not TRITON.interpreted, reason="the interpreter does not run here")
def test_correcting_again_changes_nothing():
    from triton.runtime import interpreter

    from proxytune_kernels.kernels.interpreter import correct

    correct()
    before = interpreter.GridExecutor.__call__, tl.constexpr.__sub__, interpreter._convert_float
    correct()
    after = interpreter.GridExecutor.__call__, tl.constexpr.__sub__, interpreter._convert_float
    assert before == after
    assert ptk.backends()["triton"] is None
