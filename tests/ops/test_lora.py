"""``proxytune::add_lora``: right to its bound, on the rows that have adapters alone.

On CPU tensors it is the reference in plain PyTorch; with TRITON_INTERPRET=1 (make interpret) it is
the kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_attention import BF16, DEVICE, FP16, FP32, ROUNDING

pytestmark = pytest.mark.triton
OP: Any = torch.ops.proxytune.add_lora


class Adapted:
    """Random products of one input, and adapters whose updates are as large."""

    def __init__(
        self, rows: int, tokens: int, inner: int, widths: list[int], rank: int, dtype: torch.dtype,
        *, adapter: torch.dtype | None = None, scaling: float = 1.5, row_stride: int = 2,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(0)

        def randn(*shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
            return (size * torch.randn(shape, generator=g)).to(dtype).to(DEVICE)

        kind = adapter or dtype
        # Rows that lie apart, as views of a larger tensor do.
        self.y = randn(rows, tokens, sum(widths) + 3, dtype=dtype)[..., :-3]
        self.x = randn(rows, tokens, inner, dtype=dtype)
        self.lora_A = randn(len(widths) * rank, inner, dtype=kind, size=inner**-0.5)
        self.lora_B = randn(sum(widths), rank, dtype=kind, size=rank**-0.5)
        self.given = self.x, self.lora_A, self.lora_B, widths, scaling, row_stride

    def check(self) -> None:
        """Each number within its bound of the sum in fp64; other rows to the bit.

        a and u are the roundings of the adapter's dtype and of y's; n numbers are summed up in fp32
        within (n + 2) 2^-24 of their magnitudes' sum. A x is within that and a of it. So B (A x)
        times scaling is within 3 a + (in + R + 6) 2^-24 of scaling |B| (|A| |x|): A x, and in the
        reference the product and its scaled value, are rounded. There it is rounded to y's dtype,
        too; the sum is, anyway: 2 u of |y| + |update|.
        """
        before, x, a, b = (t.cpu().double() for t in (self.y, self.x, self.lora_A, self.lora_B))
        widths, scaling, stride = self.given[3:]
        OP(self.y, *self.given)
        found = self.y.cpu().double()
        others = [i for i in range(len(x)) if i % stride]
        assert torch.equal(found[others], before[others])
        rank, start = b.shape[1], 0
        for i, width in enumerate(widths):
            part, own = slice(start, start + width), a[i * rank : (i + 1) * rank]
            start += width
            update = scaling * x[::stride] @ own.T @ b[part].T
            size = scaling * (x[::stride].abs() @ own.abs().T) @ b[part].abs().T
            adapter, u = ROUNDING[self.lora_A.dtype], ROUNDING[self.y.dtype]
            relative = 3 * adapter + (x.shape[2] + rank + 6) * 2.0**-24
            y = before[::stride, :, part]
            # fp16's smallest numbers are 2^-24 apart.
            bound = (relative + 2 * u) * size + 2 * u * y.abs() + rank * 2.0**-24
            assert bool(((found[::stride, :, part] - y - update).abs() <= bound).all())


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 1, 96, [64, 32, 32], 16, BF16), {}),  # queries, keys and values
        ((3, 5, 700, [130, 40], 4, FP16), {}),  # an odd number of rows; no multiple of a block
        ((2, 3, 64, [48], 24, BF16), {"adapter": FP32, "row_stride": 1}),
        ((2, 1, 40, [150], 128, FP32), {"scaling": 0.3}),
        ((140, 1, 32, [16], 1, BF16), {}),  # 70 rows: two programs
    ],
    ids=str,
)
def test_each_number_is_within_its_bound(shape, options):
    Adapted(*shape, **options).check()


def test_no_row_is_nothing():
    Adapted(0, 1, 16, [16], 2, FP32).check()


def test_registration():
    made = Adapted(2, 2, 16, [8, 4], 2, FP32)
    torch.library.opcheck(OP.default, (made.y, *made.given))

    def run(y: Tensor) -> Tensor:
        y = y * 2
        OP(y, *made.given)
        return y + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(made.y), run(made.y))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"y": torch.zeros(2, 2, 11)}, r"y must be \[rows, q, 12\] .* got shape \[2, 2, 11\]"),
        ({"x": torch.zeros(2, 16, 2).mT}, "x must be .* its last dimension contiguous"),
        ({"lora_A": torch.zeros(2, 16)}, r"lora_A must be .* \[4, 16\] .* got .* \[2, 16\]"),
        ({"lora_B": torch.zeros(12, 2).double()}, "lora_B must be contiguous torch.float32"),
        (
            {"lora_A": torch.zeros(258, 16), "lora_B": torch.zeros(12, 129)},
            "lora_B must have 1 to 128",
        ),
        ({"row_stride": 0}, "row_stride must be at least 1, got 0"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change, said):
    made = Adapted(2, 2, 16, [8, 4], 2, FP32)
    names = ("x", "lora_A", "lora_B", "widths", "scaling", "row_stride")
    given = {"y": made.y, **dict(zip(names, made.given, strict=True))}
    moved = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in change.items()}
    with pytest.raises(ValueError, match=f"add_lora: {said}"):
        OP(**(given | moved))
