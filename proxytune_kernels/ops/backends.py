"""Which backends can run here, and for each that can't, the reason as a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from proxytune_kernels import extensions, kernels
from proxytune_kernels.ops import choices
from proxytune_kernels.ops.shard_table import SHARD_OPERATORS
from proxytune_kernels.ops.table import CUDA_OPERATORS, LIBRARY, OPERATORS

F = TypeVar("F", bound=Callable[..., Any])


def _cpu() -> str | None:
    try:
        import_module("proxytune_kernels._cpu")  # registers the CPU kernels
    except ModuleNotFoundError:
        return (
            "the C++ extension is not built: install a C++20 compiler, then run "
            "`pip install --no-build-isolation .` without PROXYTUNE_SKIP_EXT"
        )
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


def operator(name: str) -> Callable[..., Any]:
    """The Triton implementation of an operator, by its name in ``torch.ops.proxytune``."""
    module = "sharded.triton_backend" if name in SHARD_OPERATORS else "triton_backend"

    def run(*args: Any, **kwargs: Any) -> Any:
        operators = import_module(f"proxytune_kernels.ops.{module}")
        return getattr(operators, name)(*args, **kwargs)

    return run


IMPLEMENTATIONS = {name: operator(name) for name in (*OPERATORS, *SHARD_OPERATORS)}
"""What runs each operator."""

for _name, _implementation in IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _implementation, "CUDA")


_NAMES = ("cpu", "triton", "cuda", "reference")

# At import, so that exported and compiled graphs find torch.ops.proxytune's kernels.
_CPU_REASON = _cpu()


def backends() -> dict[str, str | None]:
    """Backends by name: None where usable, else why not.

    ``cpu`` is the C++ extension; ``triton`` runs on NVIDIA devices of compute capability 8.0 and
    later; ``cuda``, CUDA C++, on those of 9.0 and later (``sample`` and ``verify``); ``reference``
    is plain PyTorch, exact and slow, on any device.

    Example:
        >>> backends()["reference"] is None
        True
    """
    reasons = (_CPU_REASON, kernels.unusable(), extensions.unusable(), None)
    return dict(zip(_NAMES, reasons, strict=True))


def _traced_as_constant(function: F) -> F:
    # torch.compile takes the result for a constant and does not trace how it is found: what
    # torch.compiler.assume_constant_result does, but for the import of the compiler.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_traced_as_constant
def _reason(backend: str, device: torch.device, op: str) -> str | None:
    """Why a backend can't run an operator on a device."""
    if backend == "cpu":
        return _CPU_REASON or (None if device.type == "cpu" else _elsewhere(device, "cpu"))
    if backend == "cuda":
        missing = _lacks(op) or extensions.missing()
        if missing is not None or device.type != "cuda":
            return missing or _elsewhere(device, "cuda")
        return extensions.device_unusable(device.index or 0)
    if backend == "triton":
        if kernels.unusable() is not None or kernels.interpreted():
            return kernels.unusable()
        if device.type != "cuda":
            return _elsewhere(device, "cuda")
        return kernels.device_unusable(device.index or 0)
    return None


@_traced_as_constant
def _max_vocab_size(device: torch.device, rejection: bool) -> int:
    return extensions.max_vocab_size(rejection, device.index or 0)


@_traced_as_constant
def _device_name(device: torch.device) -> str:
    return extensions.device_name(device.index or 0)


def _unusable(
    backend: str, device: torch.device, op: str, vocab_size: int, rejection: bool
) -> str | None:
    reason = _reason(backend, device, op)
    if backend != "cuda" or reason is not None:
        return reason
    widest = _max_vocab_size(device, rejection)
    if vocab_size <= widest:
        return None
    return (
        f"its clusters hold rows of at most {widest} tokens on {device}, vocab_size is {vocab_size}"
    )


def _lacks(op: str) -> str | None:
    """Why there is no such CUDA C++ kernel; None where there is."""
    return None if op in CUDA_OPERATORS else f"it has no kernel for {op}, backend 'triton' has one"


def _elsewhere(device: torch.device, wanted: str) -> str:
    return f"the logits are on {device}, it runs on {wanted} tensors"


def _candidates(base: Tensor, op: str, vocab_size: int) -> tuple[str, ...]:
    """Backends for the device of these logits, the fastest first."""
    device = base.device
    if device.type == "cpu":
        return ("cpu",)
    if device.type != "cuda":
        return ()
    rows = base.shape[:-1].numel()
    chosen = choices.choose(_device_name(device), op, vocab_size, rows)
    return ("cuda", "triton") if chosen == "cuda" else ("triton", "cuda")


@cache
def _warn_reference(device: str, reason: str) -> None:
    warnings.warn(
        f"proxytune_kernels runs its slow reference backend on {device}: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


def resolve(
    backend: str | None, base: Tensor, op: str, vocab_size: int, rejection: bool = False
) -> str:
    """Name of the backend that runs ``op`` on these logits: as asked for, or the fastest usable.

    Args:
        backend: a name, or None.
        base: logits [B, V] or [B, T, V].
        op: the public operator.
        vocab_size: agreed width.
        rejection: for ``verify``, whether that is its mode.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that can't run here, with the reason.
    """
    device = base.device
    if backend is None and device.type == "cpu" and _CPU_REASON is None:
        return "cpu"  # at once: a small call takes a few microseconds
    if backend is None:
        reasons = []
        for name in _candidates(base, op, vocab_size):
            reason = _unusable(name, device, op, vocab_size, rejection)
            if reason is None:
                return name
            reasons.append(reason)
        _warn_reference(device.type, reasons[0] if reasons else "no kernel is built for it")
        return "reference"
    if backend not in _NAMES:
        raise ValueError(f"{op}: backend must be one of {sorted(_NAMES)} or None, got {backend!r}")
    reason = _unusable(backend, device, op, vocab_size, rejection)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} can't run: {reason}")
    return backend
