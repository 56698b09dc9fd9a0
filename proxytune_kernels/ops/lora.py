"""``proxytune::add_lora``: the update of LoRA adapters on some of the rows of a product.

The decoder's own, as :mod:`proxytune_kernels.ops.attention` is. On CUDA, and in Triton's
interpreter, it is the kernel of kernels/lora.py; elsewhere the reference below.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import linear

from proxytune_kernels import kernels
from proxytune_kernels.ops.table import LIBRARY

MAX_RANK = 128
"""A larger B would not fit into a program's registers."""
_OP = "add_lora"

LIBRARY.define(
    f"{_OP}(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, int[] widths, float scaling, "
    "int row_stride) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, widths: Sequence[int], scaling: float,
    row_stride: int,
) -> None:  # fmt: skip
    """``proxytune::add_lora`` in plain PyTorch, on any device: y += scaling * B (A x), in place.

    Args:
        y: [rows, q, sum of widths]: products of one input, one layer behind the other; the last
            dimension is contiguous, as is that of x.
        x: [rows, q, in].
        lora_A: [layers * R, in], R at most 128.
        lora_B: [sum of widths, R], of lora_A's dtype, to which x is converted.
        widths: outputs of each layer.
        scaling: factor of the update.
        row_stride: the rows 0, ``row_stride``, 2 ``row_stride``, ... have the update.

    Example:
        >>> y, x = torch.zeros(2, 1, 3), torch.ones(2, 1, 4)
        >>> reference(y, x, torch.ones(1, 4), torch.ones(3, 1), [3], 0.5, 2)
        >>> y.tolist()
        [[[2.0, 2.0, 2.0]], [[0.0, 0.0, 0.0]]]

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    adapted, start = y[::row_stride], 0
    inputs = x[::row_stride].to(lora_A.dtype)
    for width, a in zip(widths, lora_A.chunk(len(widths)), strict=True):
        part = slice(start, start + width)
        update = linear(linear(inputs, a), lora_B[part]) * scaling
        adapted[..., part].add_(update.to(y.dtype))
        start += width


def _check(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, widths: Sequence[int], row_stride: int
) -> None:
    inner, out = x.shape[-1], sum(widths)
    for name, tensor, end in (("x", x, inner), ("y", y, out)):
        fits = tensor.dim() == 3 and tensor.shape == (*x.shape[:2], end) and tensor.stride(2) == 1
        if not fits or tensor.device != lora_A.device:
            raise ValueError(
                f"{_OP}: {name} must be [rows, q, {end}] on {lora_A.device} with rows and q of x "
                f"and its last dimension contiguous, got shape {list(tensor.shape)}, strides "
                f"{list(tensor.stride())}, on {tensor.device}"
            )
    rank = lora_B.shape[-1]
    for name, tensor, shape in (
        ("lora_A", lora_A, [len(widths) * rank, inner]),
        ("lora_B", lora_B, [out, rank]),
    ):
        fits = list(tensor.shape) == shape and tensor.dtype == lora_A.dtype
        if not fits or not tensor.is_contiguous() or tensor.device != lora_A.device:
            raise ValueError(
                f"{_OP}: {name} must be contiguous {lora_A.dtype} {shape} on {lora_A.device}, got "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{_OP}: lora_B must have 1 to {MAX_RANK} columns, got {rank}")
    if row_stride < 1:
        raise ValueError(f"{_OP}: row_stride must be at least 1, got {row_stride}")


def _triton(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, widths: Sequence[int], scaling: float,
    row_stride: int,
) -> None:  # fmt: skip
    _check(y, x, lora_A, lora_B, widths, row_stride)
    operators = import_module("proxytune_kernels.ops.backends.triton_operators")
    operators.add_lora(y, x, lora_A, lora_B, widths, scaling, row_stride)


def _cpu(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, widths: Sequence[int], scaling: float,
    row_stride: int,
) -> None:  # fmt: skip
    if kernels.interpreted() and y.dtype != torch.float64:
        return _triton(y, x, lora_A, lora_B, widths, scaling, row_stride)
    _check(y, x, lora_A, lora_B, widths, row_stride)
    return reference(y, x, lora_A, lora_B, widths, scaling, row_stride)


LIBRARY.impl(_OP, _triton, "CUDA")
LIBRARY.impl(_OP, _cpu, "CPU")
torch.library.register_fake(f"proxytune::{_OP}", lambda *given: None, lib=LIBRARY)
