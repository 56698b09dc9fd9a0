"""``proxytune::decode_attention``: attention of new tokens over the keys of a static cache.

Not in the table of operators: it is the decoder's own, has one implementation for each device and
no logits. On CUDA, and in Triton's interpreter, it is the kernel of kernels/attention.py; elsewhere
the reference below.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from proxytune_kernels import kernels
from proxytune_kernels.ops.checks import exactly
from proxytune_kernels.ops.table import LIBRARY

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_SIZE = 256
_OP = "decode_attention"

LIBRARY.define(
    # arrivals is written, and as it was when the operator returns: to a graph it is an input.
    f"{_OP}(Tensor query, Tensor keys, Tensor values, Tensor seq_lens, float scale, "
    "int? window=None, float? soft_cap=None, Tensor? arrivals=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def reference(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, scale: float,
    window: int | None = None, soft_cap: float | None = None,
) -> Tensor:  # fmt: skip
    """``proxytune::decode_attention`` in plain PyTorch, on any device; fp32, fp64 of fp64 inputs.

    Args:
        query: [B, heads, q, D]: the last q tokens of each row.
        keys, values: [B, kv_heads, L, D] and [B, kv_heads, L, VALUE_D]; ``heads`` is a multiple of
            ``kv_heads``, and as many heads in a row share one's keys.
        seq_lens: int32 [B], each row's keys, its q new ones included. Query i of a row of n keys is
            the token at n - q + i and sees the keys up to its own. A row may be longer than L: then
            its last tokens are not there.
        scale: factor of the scores.
        window: a query sees this many keys at most, its own included; None sees all.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap); None leaves them.

    Returns:
        [B, q, heads, VALUE_D], zeros where a query sees no key.

    Example:
        >>> query, keys, values = torch.randn(3, 1, 2, 1, 16)
        >>> keys, values = keys[:, :1], values[:, :1]
        >>> out = reference(query, keys, values, torch.ones(1, dtype=torch.int32), 0.25)
        >>> torch.equal(out[0, 0, 1], values[0, 0, 0])
        True
    """
    rows, heads, queries, _ = query.shape
    kv_heads, length = keys.shape[1:3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    span = torch.arange(length, device=query.device)
    position = seq_lens[:, None] - queries + torch.arange(queries, device=query.device)
    seen = span <= position[..., None]
    if window is not None:
        seen &= span > position[..., None] - window
    grouped = query.to(wide).reshape(rows, kv_heads, heads // kv_heads, queries, -1)
    scores = grouped @ keys.to(wide)[:, :, None].mT * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(~seen.any(-1)[:, None, None, :, None], 0.0)
    # What nobody sees may be NaN, and 0 * NaN is NaN.
    there = values.to(wide).masked_fill(~seen.any(1)[:, None, :, None], 0.0)
    attended = (weights @ there[:, :, None]).to(query.dtype)
    return attended.reshape(rows, heads, queries, -1).transpose(1, 2).contiguous()


def _check(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, window: int | None,
    soft_cap: float | None, arrivals: Tensor | None,
) -> None:  # fmt: skip
    if query.dim() != 4 or query.dtype not in DTYPES or query.shape[3] > MAX_HEAD_SIZE:
        raise ValueError(
            f"{_OP}: query must be bfloat16, float16 or float32 [B, heads, q, D] with D up to "
            f"{MAX_HEAD_SIZE}, got {query.dtype} of shape {list(query.shape)}"
        )
    rows, heads, _, size = query.shape
    for name, tensor in (("keys", keys), ("values", values)):
        fits = tensor.dim() == 4 and tensor.shape[0] == rows and tensor.stride(3) == 1
        fits = fits and tensor.dtype == query.dtype and tensor.shape[:3] == keys.shape[:3]
        fits = fits and tensor.shape[1] > 0 and heads % tensor.shape[1] == 0
        sizes = (size,) if name == "keys" else range(1, MAX_HEAD_SIZE + 1)
        if not fits or tensor.shape[3] not in sizes or tensor.device != query.device:
            raise ValueError(
                f"{_OP}: {name} must be {query.dtype} [{rows}, kv_heads, L, D] on {query.device}, "
                f"its last dimension contiguous and at most {MAX_HEAD_SIZE}, kv_heads a divisor of "
                f"{heads}; got {tensor.dtype} of shape {list(tensor.shape)}, strides "
                f"{list(tensor.stride())}, on {tensor.device}"
            )
    exactly(_OP, "seq_lens", seq_lens, torch.int32, [rows], query.device, contiguous=True)
    if window is not None and window < 1:
        raise ValueError(f"{_OP}: window must be at least 1, or None, got {window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{_OP}: soft_cap must be above 0, or None, got {soft_cap}")
    if arrivals is not None:
        exactly(
            _OP, "arrivals", arrivals, torch.int32, arrivals.shape, query.device, contiguous=True
        )
        least = num_arrivals(query)
        if arrivals.numel() < least:
            raise ValueError(
                f"{_OP}: arrivals must be int32 zeros, at least {least}, got {arrivals.numel()}"
            )


def num_arrivals(query: Tensor) -> int:
    """How many zeros ``arrivals`` must have at least, for a query [B, heads, q, D]."""
    rows, heads, queries, _ = query.shape
    return rows * heads * -(-queries // 16)


def _empty(query: Tensor, values: Tensor) -> Tensor:
    rows, heads, queries, _ = query.shape
    return query.new_empty(rows, queries, heads, values.shape[3])


def _triton(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, scale: float,
    window: int | None = None, soft_cap: float | None = None, arrivals: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(query, keys, values, seq_lens, window, soft_cap, arrivals)
    if query.stride(3) != 1:
        query = query.contiguous()
    out = _empty(query, values)
    operators = import_module("proxytune_kernels.ops.backends.triton_operators")
    operators.decode_attention(
        query, keys, values, seq_lens, out, scale, window, soft_cap, arrivals
    )
    return out


def _cpu(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, scale: float,
    window: int | None = None, soft_cap: float | None = None, arrivals: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if kernels.interpreted():
        return _triton(query, keys, values, seq_lens, scale, window, soft_cap, arrivals)
    _check(query, keys, values, seq_lens, window, soft_cap, arrivals)
    return reference(query, keys, values, seq_lens, scale, window, soft_cap)


def _fake(query: Tensor, keys: Tensor, values: Tensor, *given: object, **named: object) -> Tensor:
    return _empty(query, values)


LIBRARY.impl(_OP, _triton, "CUDA")
LIBRARY.impl(_OP, _cpu, "CPU")
torch.library.register_fake(f"proxytune::{_OP}", _fake, lib=LIBRARY)


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel can't run on tensors of a device, as a sentence; None where it can."""
    if device.type != "cuda":  # the interpreter is for tests
        return f"{_OP} runs on CUDA devices, and this model is on {device}"
    if dtype not in DTYPES:
        return f"{_OP} takes bfloat16, float16 and float32, and this model has {dtype}"
    return kernels.unusable() or kernels.device_unusable(device.index or 0)
