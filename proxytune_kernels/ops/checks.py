"""Argument checks of the public operators: an error names op, argument, what it got and wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.ops.table import SAMPLE_OUTPUTS
from proxytune_kernels.params import DTYPES, RowParams, SamplingParams
from proxytune_kernels.reference import SampleOutput, TopLogprobs, VerifyOutput
from proxytune_kernels.rng import STREAMS

MAX_VOCAB_SIZE = 2**19
"""Masses are up to 2^44 a token and their sum stays below 2^63."""

MAX_TOP_LOGPROBS = 128
"""A kernel sorts a row's likeliest tokens in one piece of fixed size."""

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensor_of(op: str, name: str, value: Any) -> Tensor:
    """Check that an argument is a tensor; returns it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    return value


def on_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Check that a tensor is on the logits' device."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like base, got {tensor.device}")


def _role(op: str, name: str, tensor: Any, dims: int) -> Tensor:
    tensor_of(op, name, tensor)
    if tensor.dim() != dims:
        wanted = "[B, V]" if dims == 2 else "[B, T, V]"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {list(tensor.shape)}")
    if tensor.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{op}: {name} must be contiguous in its last dimension, got stride {tensor.stride(-1)}"
        )
    return tensor


def logits(op: str, base: Any, expert: Any, anti: Any, dims: int, vocab_size: int | None) -> int:
    """Check the three roles' logits; returns the width in use."""
    _role(op, "base", base, dims)
    narrowest = base.shape[-1]
    if (expert is None) != (anti is None):
        missing = "expert" if expert is None else "anti"
        raise ValueError(f"{op}: {missing} must be given with the other of the pair, got None")
    if expert is not None:
        for name, tensor in (("expert", expert), ("anti", anti)):
            _role(op, name, tensor, dims)
            on_device(op, name, tensor, base.device)
            if tensor.shape[:-1] != base.shape[:-1]:
                raise ValueError(
                    f"{op}: {name} must have shape {[*base.shape[:-1], 'V']} like base, "
                    f"got {list(tensor.shape)}"
                )
            narrowest = min(narrowest, tensor.shape[-1])
    if dims == 3 and base.shape[1] < 1:
        raise ValueError(f"{op}: base must have at least one position, got {list(base.shape)}")
    return width(op, narrowest, vocab_size)


def width(op: str, narrowest: int, vocab_size: Any) -> int:
    """The width in use: ``vocab_size`` if given, at most the narrowest role's."""
    if vocab_size is None:
        vocab_size = narrowest
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"{op}: vocab_size must be an integer, got {vocab_size!r}")
    elif vocab_size > narrowest:
        raise ValueError(
            f"{op}: vocab_size must be at most the narrowest role's width {narrowest}, "
            f"got {vocab_size}"
        )
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"{op}: vocab_size must be in [1, 2^19], got {vocab_size}")
    return int(vocab_size)


def params(op: str, value: Any, values: dict[str, Any]) -> None:
    """Check what stands for the row parameters, before it is turned into tensors."""
    if value is None:
        return
    if values:
        raise TypeError(
            f"{op}: give params or single parameters, not both; got params and {sorted(values)}"
        )
    requests = (value,) if isinstance(value, SamplingParams) else value
    if isinstance(value, RowParams):
        return
    if not isinstance(requests, Sequence) or not all(
        isinstance(p, SamplingParams) for p in requests
    ):
        raise TypeError(
            f"{op}: params must be RowParams, SamplingParams or a sequence of the latter, "
            f"got {type(value).__name__}"
        )


def row_params(op: str, value: RowParams, base: Tensor) -> None:
    """Check that each parameter is a contiguous [B] tensor of its dtype on the logits' device."""
    batch_size = base.shape[0]
    for name, dtype in DTYPES.items():
        tensor = tensor_of(op, f"params.{name}", getattr(value, name))
        if tensor.dtype != dtype or tensor.shape != (batch_size,):
            raise ValueError(
                f"{op}: params.{name} must be {dtype} of shape [{batch_size}], "
                f"got {tensor.dtype} of shape {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{op}: params.{name} must be contiguous, got stride {tensor.stride(0)}"
            )
        on_device(op, f"params.{name}", tensor, base.device)


def sample(
    base: Any, expert: Any, anti: Any, value: Any, values: dict[str, Any],
    bias: Any, allowed_mask: Any, vocab_size: Any, stream: Any,
) -> None:  # fmt: skip
    """Check the arguments of ``sample``."""
    width = logits("sample", base, expert, anti, 2, vocab_size)
    params("sample", value, values)
    if isinstance(value, RowParams):
        row_params("sample", value, base)
    elif isinstance(value, Sequence) and len(value) != base.shape[0]:
        raise ValueError(
            f"sample: params must have one entry per row ({base.shape[0]}), got {len(value)}"
        )
    constraints("sample", base, bias, allowed_mask, width)
    if stream not in STREAMS:
        raise ValueError(f"sample: stream must be one of {list(STREAMS)}, got {stream!r}")


def top_logprobs(value: Any, op: str = "sample") -> None:
    """Check how many of the likeliest tokens a sampling operator reports."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: top_logprobs must be an integer, got {value!r}")
    if not 0 <= value <= MAX_TOP_LOGPROBS:
        raise ValueError(f"{op}: top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {value}")


def _constraint(
    op: str, name: str, tensor: Any, base: Tensor, dtype: torch.dtype, width: int
) -> None:
    tensor_of(op, name, tensor)
    shape = [*base.shape[:-1], width]
    if list(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{op}: {name} must be {dtype} of shape {shape}, "
            f"got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    if tensor.stride(-1) != 1 and width > 1:
        raise ValueError(
            f"{op}: {name} must be contiguous in its last dimension, got stride {tensor.stride(-1)}"
        )
    on_device(op, name, tensor, base.device)


def constraints(op: str, base: Tensor, bias: Any, allowed_mask: Any, vocab_size: int) -> None:
    """Check the optional additive bias and packed mask."""
    if bias is not None:
        _constraint(op, "bias", bias, base, torch.float32, vocab_size)
    if allowed_mask is not None:
        _constraint(op, "allowed_mask", allowed_mask, base, torch.int32, -(-vocab_size // 32))


def alpha(op: str, value: Any, base: Tensor) -> Tensor:
    """alpha as fp32 [B] on the logits' device."""
    batch_size = base.shape[0]
    if isinstance(value, Tensor):
        if value.shape != (batch_size,) or value.dtype != torch.float32:
            raise ValueError(
                f"{op}: alpha must be a number or torch.float32 of shape [{batch_size}], "
                f"got {value.dtype} of shape {list(value.shape)}"
            )
        on_device(op, "alpha", value, base.device)
        return value.contiguous()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{op}: alpha must be a finite number, got {value!r}")
    return torch.full((batch_size,), value, dtype=torch.float32, device=base.device)


def ids(op: str, name: str, tensor: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Check a tensor of token ids."""
    tensor_of(op, name, tensor)
    if tuple(tensor.shape) != shape or tensor.dtype != torch.int64:
        raise ValueError(
            f"{op}: {name} must be torch.int64 of shape {list(shape)}, "
            f"got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    on_device(op, name, tensor, device)


def draft_logits(
    value: Any, mode: str, drafts: tuple[int, int], vocab_size: int, device: torch.device,
    op: str = "verify",
) -> None:  # fmt: skip
    """Check the drafter's logits: needed for rejection, refused for coupled."""
    if mode == "coupled":
        if value is not None:
            raise ValueError(f"{op}: draft_logits must be None in mode 'coupled', got a tensor")
        return
    if value is None:
        raise ValueError(f"{op}: draft_logits must be given in mode 'rejection', got None")
    _role(op, "draft_logits", value, 3)
    if tuple(value.shape[:2]) != drafts or value.shape[2] < vocab_size:
        raise ValueError(
            f"{op}: draft_logits must have shape {[*drafts, 'V']} with V at least {vocab_size}, "
            f"got {list(value.shape)}"
        )
    on_device(op, "draft_logits", value, device)


def matrix_out(op: str, out: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Check a caller-owned fp32 result."""
    tensor_of(op, "out", out)
    if tuple(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"{op}: out must be contiguous torch.float32 of shape {list(shape)}, "
            f"got {out.dtype} of shape {list(out.shape)}"
        )
    on_device(op, "out", out, device)


_OUT_DTYPES = {"token_ids": torch.int64, "num_kept": torch.int32, "status": torch.int32,
               "num_accepted": torch.int32}  # fmt: skip


def _outputs(
    op: str, out: Any, kind: type, shapes: Mapping[str, tuple[int, ...]], device: torch.device,
    argument: str = "out",
) -> None:  # fmt: skip
    if not isinstance(out, kind):
        raise TypeError(f"{op}: {argument} must be a {kind.__name__}, got {type(out).__name__}")
    for name, shape in shapes.items():
        tensor, dtype = getattr(out, name), _OUT_DTYPES.get(name, torch.float32)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {argument}.{name} must be contiguous {dtype} of shape {list(shape)}, "
                f"got {tensor.dtype} of shape {list(tensor.shape)}"
            )
        on_device(op, f"{argument}.{name}", tensor, device)


def sample_out(out: Any, base: Tensor, num_top: int, op: str = "sample") -> None:
    """Check caller-owned outputs of ``sample`` and its like, if any; ``top`` only if written."""
    if out is None:
        return
    rows = (base.shape[0],)
    _outputs(op, out, SampleOutput, dict.fromkeys(SAMPLE_OUTPUTS, rows), base.device)
    if num_top:
        shapes = dict.fromkeys(TopLogprobs._fields, (*rows, num_top))
        _outputs(op, out.top, TopLogprobs, shapes, base.device, "out.top")


def verify_out(out: Any, base: Tensor) -> None:
    """Check caller-owned outputs of ``verify``."""
    rows, grid = (base.shape[0],), tuple(base.shape[:2])
    shapes = dict.fromkeys(VerifyOutput._fields, grid) | {"num_accepted": rows, "status": rows}
    _outputs("verify", out, VerifyOutput, shapes, base.device)
