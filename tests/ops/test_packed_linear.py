"""Products with packed weights on a CPU: int8 by vectors, int8 and int4 by AMX."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor

_cpu = pytest.importorskip("proxytune_kernels._cpu", reason="the CPU extension is not built")
linear = torch.ops.proxytune.packed_linear


def int8_factors(weight: Tensor, scales: Tensor) -> Tensor:
    """Weights fp64 [N, K] of int8 and a scale for each 128 of a row."""
    parts = zip(weight.double().split(128, 1), scales.double().unbind(1), strict=True)
    return torch.cat([part * scale[:, None] for part, scale in parts], 1)


# A rest of a lane alone, a group and a rest, more than are taken at once; outputs for two threads.
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (130, 399), (1168, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_by_vectors(inputs, outputs, dtype):
    torch.manual_seed(5)
    x = torch.randn(21, inputs)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scales = torch.rand(outputs, math.ceil(inputs / 128)).to(dtype) / 100
    factors = int8_factors(weight, scales)
    exact, size = x.double() @ factors.T, x.double().abs() @ factors.abs().T
    torch.library.opcheck(linear, (x, weight, scales))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = linear(x, weight, scales)
    finally:
        torch.set_num_threads(threads)
    # trio/packed.py, but for the last rounding.
    assert ((found.double() - exact).abs() <= (inputs + 2) * 2**-24 * size).all()
    try:
        for isa in ("scalar", "avx2", "avx512", "neon"):
            with contextlib.suppress(ValueError):  # another processor's
                _cpu.set_isa(isa)
            assert torch.equal(linear(x, weight, scales), found)
    finally:
        _cpu.set_isa(None)
    for rows in (0, 1, 5, 16):
        assert torch.equal(linear(x[:rows], weight, scales), found[:rows])
    x[5, 3] = torch.nan
    spoilt = linear(x, weight, scales)
    assert spoilt[5].isnan().all()
    assert torch.equal(spoilt[6:], found[6:])


def test_what_is_refused():
    x, weight, scales = torch.ones(1, 160), torch.ones(3, 160, dtype=torch.int8), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="must have shapes"):
        linear(x, weight, scales[:, 1:].contiguous())
    for wrong, values in ((x.half(), weight), (x, weight.byte())):
        with pytest.raises(RuntimeError, match="rows must be float32 and weight int8"):
            linear(wrong, values, scales)


# Inputs of 2 tiles, of 18; outputs of a panel, of several, of a rest.
@pytest.mark.parametrize(
    ("quantization", "inputs", "outputs"),
    [("int8", 64, 32), ("int8", 576, 75), ("int4", 64, 64), ("int4", 576, 192)],
)
def test_products_by_amx(quantization, inputs, outputs):
    if not _cpu.has_amx():
        pytest.skip("the processor has no AMX, or the system keeps it back")
    torch.manual_seed(3)
    x = torch.randn(150, inputs).bfloat16()
    if quantization == "int8":
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        weight[0, :4] = torch.tensor([-127, 0, 127, 1])
        scales = torch.rand(outputs, math.ceil(inputs / 128)).bfloat16() / 100
        factors = int8_factors(weight, scales)
        sizes = factors.abs()
    else:
        steps = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
        weight = torch._convert_weight_to_int4pack_for_cpu(steps, 1)
        scales = torch.randn(inputs // 32, outputs, 2).bfloat16()
        scale, zero = scales.double().transpose(0, 1).repeat_interleave(32, 1).unbind(-1)
        factors = (steps - 8) * scale + zero
        sizes = ((steps - 8) * scale).abs() + zero.abs()
    found = linear(x, weight, scales)
    exact, size = x.double() @ factors.T, x.double().abs() @ sizes.T
    # trio/packed.py: the sum's roundings in fp32, and one to bf16 (2^-9 of a number's own size).
    bound = 2**-8 * exact.abs() + (inputs + 2) * 2**-24 * size
    assert ((found.double() - exact).abs() <= bound).all()
    for rows in (1, 5, 16, 17, 33, 129):
        assert torch.equal(linear(x[:rows].contiguous(), weight, scales), found[:rows])
    x[5, 7] = torch.nan
    spoilt = linear(x, weight, scales)
    assert spoilt[5].isnan().all()
    assert torch.equal(spoilt[6:], found[6:])
    with pytest.raises(RuntimeError, match="must have shapes"):
        linear(x, weight, scales[1:].contiguous())
    try:
        _cpu.set_isa("avx2")
        with pytest.raises(RuntimeError, match="needs a processor with AMX"):
            linear(x, weight, scales)
    finally:
        _cpu.set_isa(None)
