"""The update of LoRA adapters on some of the rows of a product: y += scaling * B (A x), in place.

Layers that take one input lie one behind the other in y: layer i has ``starts[i]`` to ``starts[i +
1]``, an A [R, in] and a B [out, R] of its own. A program adds to BLOCK_N outputs of one layer and
BLOCK_M rows. It computes the R numbers of A x again, for which it reads the layer's A and its rows
of x: from L2, where one read from memory serves all programs. So one launch does what takes two
products and an addition, whose middle would wait for a whole device.

Bytes: A, B, x once from memory, y once in and out; A from L2 once for each BLOCK_N outputs. At R =
16, in = 4,096 in bf16 these are 131 KB a program, and 172 programs for gate and up of 11,008
outputs each. Sums are in fp32. A x is rounded to the adapter's dtype, and the result to y's;
torch's own calls round B (A x) and its scaled value, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from proxytune_kernels.kernels.common import OPTIONS

_TILE_BYTES = 16_384  # of A, or of x, at a time


@triton.jit(do_not_specialize=["tokens", "count"])
def _add_lora_kernel(
    y, y_row, y_token, x, x_row, x_token, lora_A, lora_B, starts, scaling, tokens, count,
    ROW_STRIDE: tl.constexpr, INNER: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of outputs, layers, blocks of rows]; R is RANK as a power of two."""
    layer = tl.program_id(1)
    start, end = starts[0], starts[1]
    for i in tl.static_range(1, LAYERS):
        if layer == i:
            start, end = starts[i], starts[i + 1]
    first = start + tl.program_id(0) * BLOCK_N
    if first >= end:
        return
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = m < count
    row, token = (m // tokens * ROW_STRIDE).to(tl.int64), m % tokens
    x_at = x + row * x_row + token * x_token
    r = tl.arange(0, R)
    a_at = lora_A + (layer * RANK + r) * INNER
    dtype = lora_A.dtype.element_ty
    thin = tl.zeros([BLOCK_M, R], tl.float32)
    for begin in range(0, INNER, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        some = tl.load(
            x_at[:, None] + k[None, :], mask=present[:, None] & (k < INNER)[None, :], other=0.0
        )
        a = tl.load(a_at[None, :] + k[:, None], mask=(r < RANK)[None, :] & (k < INNER)[:, None],
                    other=0.0)  # fmt: skip
        thin = tl.dot(some.to(dtype), a, thin, input_precision="ieee")
    n = first + tl.arange(0, BLOCK_N)
    inside = n < end
    b = tl.load(
        lora_B + (n[None, :] * RANK + r[:, None]), mask=inside[None, :] & (r < RANK)[:, None],
        other=0.0,
    )  # fmt: skip
    update = tl.dot(thin.to(dtype), b, input_precision="ieee") * scaling
    at = y + (row * y_row + token * y_token)[:, None] + n[None, :]
    mask = present[:, None] & inside[None, :]
    old = tl.load(at, mask=mask, other=0.0)
    tl.store(at, (old.to(tl.float32) + update).to(old.dtype), mask=mask)


def launch_add_lora(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, widths: Sequence[int], scaling: float,
    row_stride: int,
) -> None:  # fmt: skip
    """Adds to the rows 0, ``row_stride``, ... of ``y`` what the adapters make of those of ``x``.

    Args:
        y: [rows, q, sum of widths], written; the last dimension is contiguous.
        x: [rows, q, in], likewise.
        lora_A: [layers * R, in], contiguous.
        lora_B: [sum of widths, R], contiguous, of lora_A's dtype.
        widths: outputs of each layer.
        scaling: factor of the update.
        row_stride: of how many rows one has the update.
    """
    rows, tokens, inner = x.shape
    rank, count = lora_B.shape[1], triton.cdiv(rows, row_stride) * tokens
    if not count:
        return
    starts = tuple(sum(widths[:i]) for i in range(len(widths) + 1))
    padded = max(16, triton.next_power_of_2(rank))
    block_m = min(max(16, triton.next_power_of_2(count)), 64)
    block_n = 128 if padded <= 64 else 64
    at_once = _TILE_BYTES // (max(padded, block_m) * lora_A.itemsize)
    grid = triton.cdiv(max(widths), block_n), len(widths), triton.cdiv(count, block_m)
    _add_lora_kernel[grid](
        y, y.stride(0), y.stride(1), x, x.stride(0), x.stride(1), lora_A, lora_B, starts, scaling,
        tokens, count, ROW_STRIDE=row_stride, INNER=inner, LAYERS=len(widths), RANK=rank, R=padded,
        BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=min(at_once, max(16, triton.next_power_of_2(inner))), num_warps=4, num_stages=3,
        **OPTIONS,
    )  # fmt: skip
