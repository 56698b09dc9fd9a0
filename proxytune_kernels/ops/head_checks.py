"""Checks of heads: hidden states, lm_head weights, and what a role does to its logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from proxytune_kernels.heads import Head
from proxytune_kernels.ops import checks
from proxytune_kernels.ops.table import SAMPLE_OUTPUTS, TOP_OUTPUTS
from proxytune_kernels.params import RowParams
from proxytune_kernels.reference import SampleOutput, TopLogprobs
from proxytune_kernels.rng import STREAMS


def _head_matrix(op: str, name: str, value: Any, shape: tuple[str, str]) -> Tensor:
    tensor = checks.tensor_of(op, name, value)
    if tensor.dim() != 2 or tensor.shape[1] < 1:
        wanted = f"[{', '.join(shape)}]"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {list(tensor.shape)}")
    if tensor.dtype not in checks.LOGIT_DTYPES:
        raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError(
            f"{op}: {name} must be contiguous in its last dimension, got stride {tensor.stride(1)}"
        )
    return tensor


def _factor(op: str, name: str, value: Any, *, positive: bool) -> None:
    wanted = "a positive finite number" if positive else "a finite number"
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be {wanted} or None, got {value!r}")
    if positive and value <= 0:
        raise ValueError(f"{op}: {name} must be {wanted} or None, got {value!r}")


def _head(op: str, role: str, head: Any) -> Head:
    if not isinstance(head, Head):
        raise TypeError(f"{op}: {role} must be a Head, got {type(head).__name__}")
    hidden = _head_matrix(op, f"{role}.hidden", head.hidden, ("B", "H"))
    weight = _head_matrix(op, f"{role}.weight", head.weight, ("V", "H"))
    if weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"{op}: {role}.weight must be {hidden.dtype} of shape ['V', {hidden.shape[1]}] like "
            f"{role}.hidden, got {weight.dtype} of shape {list(weight.shape)}"
        )
    checks.on_device(op, f"{role}.weight", weight, hidden.device)
    if head.bias is not None:
        bias = checks.tensor_of(op, f"{role}.bias", head.bias)
        if bias.shape != weight.shape[:1] or bias.dtype not in checks.LOGIT_DTYPES:
            raise ValueError(
                f"{op}: {role}.bias must be float32, bfloat16 or float16 of shape "
                f"[{weight.shape[0]}], got {bias.dtype} of shape {list(bias.shape)}"
            )
        if bias.stride(0) != 1 and bias.shape[0] > 1:
            raise ValueError(f"{op}: {role}.bias must be contiguous, got stride {bias.stride(0)}")
        checks.on_device(op, f"{role}.bias", bias, hidden.device)
    _factor(op, f"{role}.logit_scale", head.logit_scale, positive=False)
    _factor(op, f"{role}.soft_cap", head.soft_cap, positive=True)
    return head


def heads(op: str, base: Any, expert: Any, anti: Any, vocab_size: Any) -> int:
    """Check the three roles' heads; returns the width in use."""
    hidden, narrowest = _head(op, "base", base).hidden, base.weight.shape[0]
    if (expert is None) != (anti is None):
        missing = "expert" if expert is None else "anti"
        raise ValueError(f"{op}: {missing} must be given with the other of the pair, got None")
    for role, head in (("expert", expert), ("anti", anti)):
        if head is None:
            continue
        own = _head(op, role, head).hidden
        checks.on_device(op, f"{role}.hidden", own, hidden.device)
        if own.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"{op}: {role}.hidden must have shape [{hidden.shape[0]}, 'H'] like base.hidden, "
                f"got {list(own.shape)}"
            )
        narrowest = min(narrowest, head.weight.shape[0])
    return checks.width(op, narrowest, vocab_size)


class Arguments(NamedTuple):
    """Checked arguments of ``proxytune::sample_hidden``."""

    heads: tuple[Head, Head | None, Head | None]
    params: RowParams
    bias: Tensor | None
    allowed_mask: Tensor | None
    vocab_size: int
    stream: int
    num_top: int


def sample_hidden(*arguments: Any) -> Arguments:
    """Check the operator's arguments, in the order of its schema."""
    op, size = "sample_hidden", len(Head._fields)
    fields = [arguments[i * size : (i + 1) * size] for i in range(3)]
    base, expert, anti = (None if all(f is None for f in own) else Head(*own) for own in fields)
    rest = arguments[3 * size :]
    params = RowParams(*rest[: len(RowParams._fields)])
    bias, allowed_mask, vocab_size, stream, num_top = rest[len(RowParams._fields) :]
    heads(op, base, expert, anti, vocab_size)
    assert base is not None  # the schema has its tensors
    checks.row_params(op, params, base.hidden)
    checks.constraints(op, base.hidden, bias, allowed_mask, vocab_size)
    if stream not in STREAMS.values():
        raise ValueError(f"{op}: stream must be one of {[*STREAMS.values()]}, got {stream!r}")
    checks.top_logprobs(num_top, op)
    return Arguments((base, expert, anti), params, bias, allowed_mask, vocab_size, stream, num_top)


def outputs(arguments: Arguments, out: dict[str, Tensor]) -> SampleOutput:
    """Check the tensors of the caller's that ``proxytune::sample_hidden_out`` writes into."""
    drawn = {name: out[f"out_{name}"] for name in SAMPLE_OUTPUTS}
    results = SampleOutput(**drawn, top=TopLogprobs(*(out[f"out_{name}"] for name in TOP_OUTPUTS)))
    checks.sample_out(results, arguments.heads[0].hidden, arguments.num_top, "sample_hidden")
    return results
