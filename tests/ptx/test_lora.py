"""add_lora's PTX gives what the reference gives, in any order, in one launch."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.ops.test_attention import BF16, FP16, FP32
from tests.ops.test_lora import Adapted
from tests.ptx.device import CAPABILITIES
from tests.ptx.test_kernels import device

SHAPES: dict[str, Any] = {
    "bf16": ((4, 1, 48, [136, 16, 32], 16, BF16), {}),
    "fp16, 5 tokens": ((3, 5, 36, [40, 24], 4, FP16), {}),
    "fp32 adapters": ((2, 3, 32, [24], 24, BF16), {"adapter": FP32, "row_stride": 1}),
    "R = 128": ((2, 1, 150, [40], 128, BF16), {"scaling": 0.3}),
}
# Each compute capability and each shape once; `slow` has all of the others.
FEW = {("bf16", 90), ("fp16, 5 tokens", 80), ("fp32 adapters", 120), ("R = 128", 100)}


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(n, c, marks=() if (n, c) in FEW else (pytest.mark.slow,), id=f"{n}-{c}")
        for n in SHAPES
        for c in CAPABILITIES
    ],
)
def test_add_lora(name, capability):
    shape, options = SHAPES[name]
    with device(capability) as at:
        Adapted(*shape, **options).check()
    assert at.launches == 1
