"""Argument checks of the operators: an error names op, argument, what it got and what it wanted.

Each operator's check takes its arguments as the public function gets them or as its schema has
them. Every backend checks once a call: those in Python run these, the C++ bindings have plainer
ones of their own, and the public functions find the words here when a binding refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.heads import Head
from proxytune_kernels.ops.table import NUM_PARAMS, OPERATORS
from proxytune_kernels.params import ROW_FIELDS, Edits, RowParams, SamplingParams
from proxytune_kernels.rng import STREAMS

MAX_VOCAB_SIZE = 2**19
"""Masses are up to 2^44 a token and their sum stays below 2^63."""

MAX_TOP_LOGPROBS = 128
"""A kernel sorts a row's likeliest tokens in one piece of fixed size."""

VERIFY_MODES = ("coupled", "rejection")
"""Modes of ``verify`` by their number in its operator."""

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _tensor(op: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    return value


def _on_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like base, got {tensor.device}")


def _contiguous_columns(op: str, name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{op}: {name} must be contiguous in its last dimension, got stride {tensor.stride(-1)}"
        )


def _floats(op: str, name: str, value: Any, shape: str) -> Tensor:
    """Check a tensor of logits, hidden states or weights; ``shape`` as ``[B, V]``."""
    tensor = _tensor(op, name, value)
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {list(tensor.shape)}")
    if tensor.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    _contiguous_columns(op, name, tensor)
    return tensor


def exactly(
    op: str, name: str, value: Any, dtype: torch.dtype, shape: Sequence[int], device: torch.device,
    *, contiguous: bool = False,
) -> None:  # fmt: skip
    """Check a tensor of one dtype and shape on the logits' device."""
    tensor = _tensor(op, name, value)
    wrong = tensor.dtype != dtype or list(tensor.shape) != list(shape)
    if wrong or (contiguous and not tensor.is_contiguous()):
        wanted = f"{'contiguous ' if contiguous else ''}{dtype} of shape {list(shape)}"
        raise ValueError(
            f"{op}: {name} must be {wanted}, got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    _on_device(op, name, tensor, device)


def _pair(op: str, expert: Any, anti: Any) -> None:
    if (expert is None) != (anti is None):
        missing = "expert" if expert is None else "anti"
        raise ValueError(f"{op}: {missing} must be given with the other of the pair, got None")


def logits(op: str, base: Any, expert: Any, anti: Any, dims: int, vocab_size: int | None) -> int:
    """Check the three roles' logits; returns the width in use."""
    shape = "[B, V]" if dims == 2 else "[B, T, V]"
    narrowest = _floats(op, "base", base, shape).shape[-1]
    _pair(op, expert, anti)
    if expert is not None:
        for name, value in (("expert", expert), ("anti", anti)):
            tensor = _floats(op, name, value, shape)
            _on_device(op, name, tensor, base.device)
            if tensor.shape[:-1] != base.shape[:-1]:
                raise ValueError(
                    f"{op}: {name} must have shape {[*base.shape[:-1], 'V']} like base, "
                    f"got {list(tensor.shape)}"
                )
            narrowest = min(narrowest, tensor.shape[-1])
    if dims == 3 and base.shape[1] < 1:
        raise ValueError(f"{op}: base must have at least one position, got {list(base.shape)}")
    return _width(op, narrowest, vocab_size)


def _width(op: str, narrowest: int, vocab_size: Any) -> int:
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


def row_params(op: str, params: Any, batch_size: int, device: torch.device) -> None:
    """Check what stands for the rows' parameters.

    Of :class:`RowParams` each must be a contiguous [B] tensor of its dtype on the logits' device.
    """
    if params is None or isinstance(params, SamplingParams):
        return
    if not isinstance(params, RowParams):
        _requests(op, params, batch_size)
        return
    for (name, field), value in zip(ROW_FIELDS.items(), params, strict=True):
        argument = f"params.{name}"
        exactly(op, argument, value, field.dtype, [batch_size], device)
        if not value.is_contiguous():
            raise ValueError(f"{op}: {argument} must be contiguous, got stride {value.stride(0)}")


def _requests(op: str, params: Any, batch_size: int) -> None:
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise TypeError(
            f"{op}: params must be RowParams, SamplingParams or a sequence of the latter, "
            f"got {type(params).__name__}"
        )
    if len(params) != batch_size:
        raise ValueError(
            f"{op}: params must have one entry per row ({batch_size}), got {len(params)}"
        )


def constraints(
    op: str, base: Tensor, bias: Any, allowed_mask: Any, edits: Any, vocab_size: int
) -> None:
    """Check the optional additive bias, packed mask and edits."""
    for name, value, dtype, width in (
        ("bias", bias, torch.float32, vocab_size),
        ("allowed_mask", allowed_mask, torch.int32, -(-vocab_size // 32)),
    ):
        if value is not None:
            exactly(op, name, value, dtype, [*base.shape[:-1], width], base.device)
            _contiguous_columns(op, name, value)
    if edits is not None:
        _edits(op, base, edits)


def _edits(op: str, base: Tensor, edits: Any) -> None:
    _is_a(op, "edits", edits, Edits)
    entries = _tensor(op, "edits.entries", edits.entries)
    shape = [*base.shape[:-1], entries.shape[-2] if entries.dim() > 1 else "M", 4]
    exactly(op, "edits.entries", entries, torch.int32, shape, base.device, contiguous=True)
    shape = [base.shape[0], 3]
    name = "edits.penalties"
    exactly(op, name, edits.penalties, torch.float32, shape, base.device, contiguous=True)


def no_edits(op: str, instead: str) -> ValueError:
    """What to raise where edits are given to an operator that takes none."""
    return ValueError(f"{op}: edits must be None: it takes none; {instead}")


def noise_stream(op: str, value: Any, known: Collection[Any] = tuple(STREAMS)) -> None:
    """Check a noise stream, by name or, of an operator, by number."""
    if value not in known:
        raise ValueError(f"{op}: noise_stream must be one of {[*known]}, got {value!r}")


def _top_logprobs(op: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: top_logprobs must be an integer, got {value!r}")
    if not 0 <= value <= MAX_TOP_LOGPROBS:
        raise ValueError(f"{op}: top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {value}")


def _sampling(
    op: str, base: Tensor, width: int, params: Any, bias: Any, allowed_mask: Any, edits: Any,
    stream: Any, top: Any, streams: Collection[Any],
) -> None:  # fmt: skip
    row_params(op, params, base.shape[0], base.device)
    constraints(op, base, bias, allowed_mask, edits, width)
    noise_stream(op, stream, streams)
    _top_logprobs(op, top)


def sample(
    base: Any, expert: Any, anti: Any, params: Any, bias: Any, allowed_mask: Any, edits: Any,
    vocab_size: Any, stream: Any, top: Any, attributed: Any = None,
    streams: Collection[Any] = tuple(STREAMS),
) -> None:  # fmt: skip
    """Check the arguments of ``sample``."""
    width = logits("sample", base, expert, anti, 2, vocab_size)
    _sampling("sample", base, width, params, bias, allowed_mask, edits, stream, top, streams)
    if attributed is not None:
        shape = base.shape[:1]
        exactly("sample", "attribution", attributed, torch.int64, shape, base.device)
        if not attributed.is_contiguous():
            stride = attributed.stride(0)
            raise ValueError(f"sample: attribution must be contiguous, got stride {stride}")


def attribution(asked: Any, out: Any) -> None:
    """Refuse outputs of the caller's with attribution: it has none of its own there."""
    if asked is not False and out is not None:
        raise ValueError("sample: out must be None with attribution, got a SampleOutput")


def sample_hidden(
    base: Any, expert: Any, anti: Any, params: Any, bias: Any, allowed_mask: Any, vocab_size: Any,
    stream: Any, top: Any, streams: Collection[Any] = tuple(STREAMS),
) -> None:  # fmt: skip
    """Check the arguments of ``sample_hidden``."""
    op = "sample_hidden"
    width = heads(op, base, expert, anti, vocab_size)
    _sampling(op, base.hidden, width, params, bias, allowed_mask, None, stream, top, streams)


def combine(
    base: Any, expert: Any, anti: Any, alphas: Any, bias: Any, allowed_mask: Any, edits: Any,
    vocab_size: Any,
) -> None:  # fmt: skip
    """Check the arguments of ``combine``."""
    width = logits("combine", base, expert, anti, 2, vocab_size)
    alpha("combine", alphas, base)
    constraints("combine", base, bias, allowed_mask, edits, width)


def score(base: Any, expert: Any, anti: Any, token_ids: Any, alphas: Any, vocab_size: Any) -> None:
    """Check the arguments of ``score``."""
    logits("score", base, expert, anti, 3, vocab_size)
    alpha("score", alphas, base)
    exactly("score", "token_ids", token_ids, torch.int64, base.shape[:2], base.device)


def verify(
    base: Any, expert: Any, anti: Any, draft_token_ids: Any, draft_logits: Any, params: Any,
    bias: Any, allowed_mask: Any, edits: Any, vocab_size: Any, mode: Any,
) -> None:  # fmt: skip
    """Check the arguments of ``verify``."""
    width = logits("verify", base, expert, anti, 3, vocab_size)
    row_params("verify", params, base.shape[0], base.device)
    constraints("verify", base, bias, allowed_mask, edits, width)
    drafts("verify", base, draft_token_ids, draft_logits, mode, width)


def drafts(
    op: str, base: Tensor, draft_token_ids: Any, draft_logits: Any, mode: Any, vocab_size: int
) -> None:
    """Check drafted tokens, and the drafter's logits: for rejection needed, for coupled refused."""
    batch_size, positions = base.shape[:2]
    shape = [batch_size, positions - 1]
    exactly(op, "draft_token_ids", draft_token_ids, torch.int64, shape, base.device)
    if mode not in VERIFY_MODES:
        raise ValueError(f"{op}: mode must be one of {list(VERIFY_MODES)}, got {mode!r}")
    if mode == "coupled":
        if draft_logits is not None:
            raise ValueError(f"{op}: draft_logits must be None in mode 'coupled', got a tensor")
        return
    if draft_logits is None:
        raise ValueError(f"{op}: draft_logits must be given in mode 'rejection', got None")
    _floats(op, "draft_logits", draft_logits, "[B, T, V]")
    if list(draft_logits.shape[:2]) != shape or draft_logits.shape[2] < vocab_size:
        raise ValueError(
            f"{op}: draft_logits must have shape {[*shape, 'V']} with V at least {vocab_size}, "
            f"got {list(draft_logits.shape)}"
        )
    _on_device(op, "draft_logits", draft_logits, base.device)


def alpha(op: str, value: Any, base: Tensor) -> Tensor:
    """alpha as contiguous fp32 [B] on the logits' device."""
    batch_size = base.shape[0]
    if isinstance(value, Tensor):
        if value.shape != (batch_size,) or value.dtype != torch.float32:
            raise ValueError(
                f"{op}: alpha must be a number or torch.float32 of shape [{batch_size}], "
                f"got {value.dtype} of shape {list(value.shape)}"
            )
        _on_device(op, "alpha", value, base.device)
        return value.contiguous()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{op}: alpha must be a finite number, got {value!r}")
    return torch.full((batch_size,), value, dtype=torch.float32, device=base.device)


def _head(op: str, role: str, head: Any) -> Head:
    if not isinstance(head, Head):
        raise TypeError(f"{op}: {role} must be a Head, got {type(head).__name__}")
    for name, shape in (("hidden", "[B, H]"), ("weight", "[V, H]")):
        value = _tensor(op, f"{role}.{name}", getattr(head, name))
        if value.dim() == 2 and value.shape[1] < 1:
            raise ValueError(
                f"{op}: {role}.{name} must have shape {shape}, got {list(value.shape)}"
            )
        _floats(op, f"{role}.{name}", value, shape)
    hidden, weight = head.hidden, head.weight
    if weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"{op}: {role}.weight must be {hidden.dtype} of shape ['V', {hidden.shape[1]}] like "
            f"{role}.hidden, got {weight.dtype} of shape {list(weight.shape)}"
        )
    _on_device(op, f"{role}.weight", weight, hidden.device)
    if head.bias is not None:
        bias = _tensor(op, f"{role}.bias", head.bias)
        if bias.shape != weight.shape[:1] or bias.dtype not in LOGIT_DTYPES:
            raise ValueError(
                f"{op}: {role}.bias must be float32, bfloat16 or float16 of shape "
                f"[{weight.shape[0]}], got {bias.dtype} of shape {list(bias.shape)}"
            )
        if bias.stride(0) != 1 and bias.shape[0] > 1:
            raise ValueError(f"{op}: {role}.bias must be contiguous, got stride {bias.stride(0)}")
        _on_device(op, f"{role}.bias", bias, hidden.device)
    for name, wanted, positive in (
        ("logit_scale", "a finite number", False),
        ("soft_cap", "a positive finite number", True),
    ):
        value = getattr(head, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        finite = number and math.isfinite(value)
        if value is not None and (not finite or (positive and value <= 0)):
            raise ValueError(f"{op}: {role}.{name} must be {wanted} or None, got {value!r}")
    return head


def heads(op: str, base: Any, expert: Any, anti: Any, vocab_size: Any) -> int:
    """Check the three roles' heads; returns the width in use."""
    hidden, narrowest = _head(op, "base", base).hidden, base.weight.shape[0]
    _pair(op, expert, anti)
    for role, head in (("expert", expert), ("anti", anti)):
        if head is None:
            continue
        own = _head(op, role, head).hidden
        _on_device(op, f"{role}.hidden", own, hidden.device)
        if own.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"{op}: {role}.hidden must have shape [{hidden.shape[0]}, 'H'] like base.hidden, "
                f"got {list(own.shape)}"
            )
        narrowest = min(narrowest, head.weight.shape[0])
    return _width(op, narrowest, vocab_size)


def _is_a(op: str, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{op}: {name} must be a {kind.__name__}, got {type(value).__name__}")


def no_gradient(op: str, read: Mapping[str, Any]) -> None:
    """Refuse tensors that want a gradient, which no operator has, where gradients are recorded.

    Weights of heads are parameters: they may want one.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in _tensors(read):
        if tensor.requires_grad and not name.endswith(("weight", "_bias", ".bias")):
            raise ValueError(
                f"{op}: {name} must not require grad: no operator has a gradient; call it under "
                "torch.no_grad(), or give it a detached tensor"
            )


def _meets(tensor: Tensor, first: int, end: int) -> bool:
    """Whether the tensor has a byte with an address in [first, end)."""
    start = tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = start + (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()
    if tensor.numel() == 0 or last <= first or end <= start:
        return False
    return tensor.is_contiguous() or any(_meets(part, first, end) for part in tensor)


def _tensors(named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in named.items():
        if isinstance(value, Tensor):
            yield name, value
        elif hasattr(value, "_asdict"):
            yield from ((f"{name}.{field}", t) for field, t in _tensors(value._asdict()))


def apart(op: str, written: Mapping[str, Tensor], read: Mapping[str, Any]) -> None:
    """Refuse outputs that share memory with an argument, or with one another."""
    held = dict(_tensors(read))
    storages = {tensor.untyped_storage().data_ptr() for tensor in written.values()}
    others = (tensor.untyped_storage().data_ptr() for tensor in held.values())
    if len(storages) == len(written) and storages.isdisjoint(others):
        return  # nearly always
    for name, tensor in written.items():
        first = tensor.data_ptr()
        for other, value in held.items():
            if _meets(value, first, first + tensor.nbytes):
                raise ValueError(f"{op}: {name} must not overlap {other} in memory")
        held[name] = tensor


def out(op: str, given: Any, like: Tensor, read: Mapping[str, Any], **sizes: Any) -> None:
    """Check caller-owned outputs of a call of a public function, if any.

    Nested ones count only where they are written, and have a column.

    Args:
        op: its name.
        given: what it would return.
        like: a tensor of its arguments, base's.
        read: its arguments by name.
        sizes: the integers among its operator's arguments that sizes depend on.
    """
    if given is None:
        return
    operator = OPERATORS[op]
    if isinstance(operator.returns, type):
        _is_a(op, "out", given, operator.returns)
    arguments = {operator.argument_names[0]: like, **sizes}
    written: dict[str, Tensor] = {}
    for output, shape in zip(operator.outputs, operator.shapes(arguments), strict=True):
        holder, _, field = output.field.rpartition(".")
        value, name = given, "out"
        if output.optional and shape[-1] == 0:
            continue
        if holder:
            value, name = getattr(value, holder), f"out.{holder}"
            _is_a(op, name, value, output.kind)
        if isinstance(operator.returns, type):
            value, name = getattr(value, field), f"{name}.{field}"
        exactly(op, name, value, output.dtype, shape, like.device, contiguous=True)
        written[name] = value
    apart(op, written, read)


def operator_out(op: str, given: Mapping[str, Tensor], arguments: Sequence[Any]) -> None:
    """Check the tensors that an operator's ``_out`` twin writes into."""
    operator = OPERATORS[op]
    read = operator.named(arguments)
    written: dict[str, Any] = {}
    for output, shape in zip(operator.outputs, operator.shapes(read), strict=True):
        if 0 in shape[1:]:
            continue  # nothing is written
        name, tensor = f"out.{output.field}", given.get(f"out_{output.name}")
        exactly(op, name, tensor, output.dtype, shape, arguments[0].device, contiguous=True)
        written[name] = tensor
    apart(op, written, read)


def operator_arguments(op: str, arguments: Sequence[Any]) -> list[Any]:
    """Check an operator's arguments; gives them with heads and row parameters in one piece each.

    A mode comes as its name.
    """
    given = list(arguments)
    names = list(OPERATORS[op].argument_names)
    no_gradient(op, OPERATORS[op].named(arguments))
    if "seed" in names:
        at = names.index("alpha")
        given[at : at + NUM_PARAMS] = [RowParams(*given[at : at + NUM_PARAMS])]
    if "entries" in names:  # from behind: heads and parameters before them are in one piece
        at = names.index("entries") - len(names) + len(given)
        pair = given[at : at + 2]
        given[at : at + 2] = [None if pair == [None, None] else Edits(*pair)]
    if names[-1] == "verify_mode" and given[-1] in range(len(VERIFY_MODES)):
        given[-1] = VERIFY_MODES[given[-1]]
    if op == "sample_hidden":
        size = len(Head._fields)
        fields = [given[i * size : (i + 1) * size] for i in range(3)]
        given[: 3 * size] = [None if all(f is None for f in own) else Head(*own) for own in fields]
    _CHECKS[op](*given)
    return given


_STREAM_NUMBERS = tuple(STREAMS.values())
_CHECKS: dict[str, Callable[..., None]] = {
    "sample": partial(sample, streams=_STREAM_NUMBERS),
    "sample_hidden": partial(sample_hidden, streams=_STREAM_NUMBERS),
    "combine": combine,
    "score": score,
    "verify": verify,
}
