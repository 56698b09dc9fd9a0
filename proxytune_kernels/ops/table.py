"""Schemas and fake versions of the ``torch.ops.proxytune`` operators, the same for every backend.

A backend registers its implementation for its dispatch key: the C++ extension for CPU, Triton for
CUDA. The CUDA C++ extension, which shares that key with Triton, has operators of its own in
``torch.ops.proxytune_cuda``, so that a graph says which of the two it was made with.
Each operator has an ``_out`` twin that writes into tensors of the caller and returns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_LOGITS = "Tensor base, Tensor? expert, Tensor? anti"
_PARAMS = (
    "Tensor alpha, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor filter_order, Tensor seed, Tensor position"
)
_CONSTRAINTS = "Tensor? bias, Tensor? allowed_mask, int vocab_size"

_SAMPLE = f"{_LOGITS}, {_PARAMS}, {_CONSTRAINTS}, int noise_stream, int top_logprobs"
_HEADS = ", ".join(
    f"Tensor{o} {r}_hidden, Tensor{o} {r}_weight, Tensor? {r}_bias, float? {r}_logit_scale, "
    f"float? {r}_soft_cap"
    for r, o in (("base", ""), ("expert", "?"), ("anti", "?"))
)
"""The fields of three :class:`proxytune_kernels.heads.Head`, those of an absent role all None."""

SAMPLE_OUTPUTS = ("token_ids", "logprobs", "raw_logprobs", "num_kept", "status")
TOP_OUTPUTS = ("top_token_ids", "top_logprobs")
VERIFY_OUTPUTS = ("token_ids", "num_accepted", "logprobs", "raw_logprobs", "status")

_ARGUMENTS = {
    "sample": _SAMPLE,
    # num_top may be 0: top outputs are then [B, 0]
    "sample_hidden": f"{_HEADS}, {_PARAMS}, {_CONSTRAINTS}, int stream, int num_top",
    "combine": f"{_LOGITS}, Tensor alpha, {_CONSTRAINTS}",
    "score": f"{_LOGITS}, Tensor token_ids, Tensor alpha, int vocab_size",
    "verify": f"{_LOGITS}, Tensor draft_token_ids, Tensor? draft_logits, {_PARAMS}, "
    # not "mode": torch.compile passes arguments on by name, beside one of its own so called
    f"{_CONSTRAINTS}, int verify_mode",
}
_OUTPUTS = {
    "sample": (*SAMPLE_OUTPUTS, *TOP_OUTPUTS),
    "sample_hidden": (*SAMPLE_OUTPUTS, *TOP_OUTPUTS),
    "combine": ("x",),
    "score": ("logprobs",),
    "verify": VERIFY_OUTPUTS,
}

_CLUSTER = ("sample", "verify")


def _with_twins(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}{twin}" for name in names for twin in ("", "_out"))


OPERATORS = _with_twins(_ARGUMENTS)
CUDA_OPERATORS = _with_twins(_CLUSTER)
"""Those that the CUDA C++ extension has."""

LIBRARY = torch.library.Library("proxytune", "DEF")
CUDA_LIBRARY = torch.library.Library("proxytune_cuda", "DEF")


def _define(library: torch.library.Library, name: str) -> None:
    outputs, arguments = _OUTPUTS[name], _ARGUMENTS[name]
    returns = f"({', '.join(['Tensor'] * len(outputs))})" if len(outputs) > 1 else "Tensor"
    written = ", ".join(f"Tensor({chr(97 + i)}!) out_{n}" for i, n in enumerate(outputs))
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(f"{name}({arguments}) -> {returns}", tags=tags)
    library.define(f"{name}_out({arguments}, *, {written}) -> ()", tags=tags)


LIBRARY.define(
    "head_logits_out(Tensor hidden, Tensor weight, int begin, int end, *, Tensor(a!) out_logits) "
    "-> ()"
)
"""The CPU's part of ``sample_hidden``: fp32 hidden [B, H] by the weights of tokens [begin, end)."""


def empty_sample(base: Tensor) -> tuple[Tensor, ...]:
    """Unwritten outputs of ``sample`` for logits [B, V]."""
    rows = base.shape[:1]
    return (
        base.new_empty(rows, dtype=torch.int64),
        base.new_empty(rows, dtype=torch.float32),
        base.new_empty(rows, dtype=torch.float32),
        base.new_empty(rows, dtype=torch.int32),
        base.new_empty(rows, dtype=torch.int32),
    )


def empty_top(base: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """Unwritten likeliest tokens and their logprobs, for logits [B, V]."""
    shape = (base.shape[0], num_top)
    return base.new_empty(shape, dtype=torch.int64), base.new_empty(shape, dtype=torch.float32)


def empty_verify(base: Tensor) -> tuple[Tensor, ...]:
    """Unwritten outputs of ``verify`` for logits [B, k + 1, V]."""
    rows = base.shape[:1]
    return (
        base.new_empty(base.shape[:2], dtype=torch.int64),
        base.new_empty(rows, dtype=torch.int32),
        base.new_empty(base.shape[:2], dtype=torch.float32),
        base.new_empty(base.shape[:2], dtype=torch.float32),
        base.new_empty(rows, dtype=torch.int32),
    )


def _one_device(base: Tensor, *arguments: object) -> None:
    # A meta tensor among real ones brings the call here: its outputs would never be written.
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.device != base.device:
            raise ValueError(f"proxytune: tensors on {base.device} and {argument.device}")


def _fake_sample(base: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _one_device(base, *arguments)
    *_, num_top = arguments
    return (*empty_sample(base), *empty_top(base, num_top))


def _fake_combine(base: Tensor, expert: object, anti: object, alpha: object, bias: object,
                  allowed_mask: object, vocab_size: int) -> Tensor:  # fmt: skip
    _one_device(base, expert, anti, alpha, bias, allowed_mask)
    return base.new_empty((base.shape[0], vocab_size), dtype=torch.float32)


def _fake_score(base: Tensor, *arguments: object) -> Tensor:
    _one_device(base, *arguments)
    return base.new_empty(base.shape[:2], dtype=torch.float32)


def _fake_verify(base: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    _one_device(base, *arguments)
    return empty_verify(base)


def _fake_out(base: Tensor, *arguments: object, **outputs: Tensor) -> None:
    _one_device(base, *arguments, *outputs.values())


_FAKES: dict[str, Callable[..., Any]] = {
    "sample": _fake_sample,
    "sample_hidden": _fake_sample,
    "combine": _fake_combine,
    "score": _fake_score,
    "verify": _fake_verify,
}

for _library, _names in ((LIBRARY, _ARGUMENTS), (CUDA_LIBRARY, _CLUSTER)):
    for _name in _names:
        _define(_library, _name)
        _operator = f"{_library.ns}::{_name}"
        torch.library.register_fake(_operator, _FAKES[_name], lib=_library)
        torch.library.register_fake(f"{_operator}_out", _fake_out, lib=_library)
