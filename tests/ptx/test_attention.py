"""decode_attention's PTX gives what the reference gives, in any order, without a race.

Of keys and values it reads each once, and nothing past a row's length or before its window.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.ops.test_attention import BF16, FP16, FP32, Rows, check
from tests.ptx.device import CAPABILITIES, Launched
from tests.ptx.test_kernels import device

SHAPES: dict[str, Any] = {
    # lengths, heads, kv_heads, queries, size, dtype, window, soft cap
    "bf16": ([300, 1, 520], 2, 2, 1, 128, BF16, None, None),
    "fp16, 3 heads share a key, window and cap": ([600, 3, 256], 6, 2, 4, 80, FP16, 290, 20.0),
    "48 queries": ([1030, 5], 8, 1, 6, 64, BF16, None, None),
    "fp32": ([300, 0, 257], 4, 2, 3, 64, FP32, None, None),
    "D = 256": ([257], 4, 1, 8, 256, BF16, None, None),
}
# Each compute capability and each shape once; `slow` has all of the others.
FEW = {("bf16", 100), ("fp16, 3 heads share a key, window and cap", 80), ("48 queries", 90)}
FEW |= {("fp32", 120)}


def cases() -> list[Any]:
    found = []
    for shape in SHAPES:
        for capability in CAPABILITIES:
            if (shape, capability) == ("48 queries", 100):
                continue  # tcgen05: docs/ptx.md
            marks = () if (shape, capability) in FEW else (pytest.mark.slow,)
            found.append(pytest.param(shape, capability, marks=marks, id=f"{shape}-{capability}"))
    return found


@pytest.mark.parametrize(("name", "capability"), cases())
def test_attention(name, capability):
    lengths, heads, kv_heads, queries, size, dtype, window, soft_cap = SHAPES[name]
    rows = Rows(lengths, heads, kv_heads, queries, size, dtype)
    # What is past a row's length is not read: a load from there would show as NaN.
    for layer in (rows.keys, rows.values):
        for b, length in enumerate(lengths):
            layer[b, :, length:] = torch.nan
    with device(capability) as at:
        check(rows, window, soft_cap)
    assert at.launches == 1


@pytest.mark.parametrize(("groups", "most"), [(1, 1.01), (16, 1.05)])
def test_what_a_key_costs(groups, most):
    """Bytes by those of keys and values, queries and lengths included; instructions by slots.

    An H200 has 100 issue slots for a key of 512 bytes (kernels/attention.py): half of them will do.
    """
    rows = Rows([1300, 700, 4], 2 * groups, 2, 1, 128)
    for window in (None, 512):
        launched: list[Launched] = []
        with device(90, on_launch=[launched.append]):
            rows.attend(window=window)
        [one] = launched
        keys = 2 * sum(min(n, window or n) for n in rows.seq_lens.tolist())
        assert 512 * keys <= one.report.read.sum() <= most * 512 * keys
        assert one.report.instructions <= 50 * keys
