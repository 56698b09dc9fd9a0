"""The backends: which can run here, for each that can't the reason, and which is the default."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from proxytune_kernels.ops.backends.backend import Backend, Implementation
from proxytune_kernels.ops.backends.cpu import Cpu
from proxytune_kernels.ops.backends.cuda import Cuda, device_name
from proxytune_kernels.ops.backends.reference import Reference
from proxytune_kernels.ops.backends.triton import Triton

F = TypeVar("F", bound=Callable[..., Any])

ALL: tuple[Backend, ...] = (Cpu(), Triton(), Cuda(), Reference())
"""Of those for one kind of device the first is its default, but for what :data:`CHOICES` says."""

BY_NAME = {backend.name: backend for backend in ALL}


def backends() -> dict[str, str | None]:
    """Backends by name: None where usable, else why not.

    ``cpu`` is the C++ extension; ``triton`` runs on NVIDIA devices of compute capability 8.0 and
    later; ``cuda``, CUDA C++, on those of 9.0 and later (``sample`` and ``verify``); ``reference``
    is plain PyTorch, exact and slow, on any device.

    Example:
        >>> backends()["reference"] is None
        True
    """
    return {backend.name: backend.unusable() for backend in ALL}


class Choice(NamedTuple):
    """A measurement: the backend that is fastest on a CUDA device within a range of shapes."""

    device: str
    """How the driver's name of the device begins: ``NVIDIA H100``."""
    op: str
    vocab_sizes: tuple[int, int]
    """From, to: both included."""
    rows: tuple[int, int]
    """Rows of logits of each role, likewise: requests for ``sample``, requests times positions for
    ``verify``."""
    backend: str
    source: str
    """The measurement: a file in benchmarks/results."""


CHOICES: tuple[Choice, ...] = ()
"""Which backend is the default on a CUDA device. Where no line fits, nothing was measured, and
:data:`UNMEASURED` runs."""

UNMEASURED = "triton"


def choose(
    device: str, op: str, vocab_size: int, rows: int, choices: Sequence[Choice] | None = None
) -> str:
    """The backend of the first line that fits, else :data:`UNMEASURED`.

    Args:
        device: as the driver calls it.
        op: name of the public operator.
        vocab_size: agreed width.
        rows: rows of logits of each role.
        choices: lines to look in; None for :data:`CHOICES`.

    Example:
        >>> line = Choice("NVIDIA H", "sample", (1, 65_536), (1, 8), "cuda", "gpu-h200.jsonl")
        >>> choose("NVIDIA H200", "sample", 32_000, 8, [line])
        'cuda'
        >>> choose("NVIDIA H200", "sample", 32_000, 9, [line])
        'triton'
    """
    for choice in CHOICES if choices is None else choices:
        if (
            device.startswith(choice.device)
            and op == choice.op
            and choice.vocab_sizes[0] <= vocab_size <= choice.vocab_sizes[1]
            and choice.rows[0] <= rows <= choice.rows[1]
        ):
            return choice.backend
    return UNMEASURED


def _traced_as_constant(function: F) -> F:
    # torch.compile takes the result for a constant and does not trace how it is found: what
    # torch.compiler.assume_constant_result does, but for the import of the compiler.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_traced_as_constant
def _refusal(backend: str, op: str, device: torch.device) -> str | None:
    return BY_NAME[backend].refusal(op, device)


@_traced_as_constant
def _max_vocab_size(backend: str, device: torch.device, rejection: bool) -> int | None:
    return BY_NAME[backend].max_vocab_size(device.index or 0, rejection)


@_traced_as_constant
def _candidates(device_type: str) -> list[str]:
    return [backend.name for backend in ALL if backend.device_type == device_type]


@_traced_as_constant
def _device_name(device: torch.device) -> str:
    return device_name(device.index or 0)


def _unusable(
    backend: str, device: torch.device, op: str, vocab_size: int, rejection: bool, edited: bool
) -> str | None:
    reason = _refusal(backend, op, device)
    if reason is None and edited and not BY_NAME[backend].edits:
        reason = "it takes no edits, backend 'triton' does"
    if reason is not None:
        return reason
    widest = _max_vocab_size(backend, device, rejection)
    if widest is None or vocab_size <= widest:
        return None
    return (
        f"its clusters hold rows of at most {widest} tokens on {device}, vocab_size is {vocab_size}"
    )


@cache
def _warn_reference(device: str, reason: str) -> None:
    warnings.warn(
        f"proxytune_kernels runs its slow reference backend on {device}: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


_CPU_RUNS = BY_NAME["cpu"].unusable() is None


def resolve(
    backend: str | None, base: Tensor, op: str, vocab_size: int, rejection: bool = False,
    edited: bool = False,
) -> str:  # fmt: skip
    """Name of the backend that runs ``op`` on these logits: as asked for, or the fastest usable.

    Args:
        backend: a name, or None.
        base: logits [B, V] or [B, T, V].
        op: the public operator.
        vocab_size: agreed width.
        rejection: for ``verify``, whether that is its mode.
        edited: whether rows have :class:`~proxytune_kernels.Edits`.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that can't run here, with the reason.
    """
    device = base.device
    if backend is None and device.type == "cpu" and _CPU_RUNS:
        return "cpu"  # at once: a small call takes a few microseconds
    if backend is None:
        names = _candidates(device.type)
        if device.type == "cuda":
            rows = base.shape[:-1].numel()
            fastest = choose(_device_name(device), op, vocab_size, rows)
            names = [fastest, *(name for name in names if name != fastest)]
        reasons = []
        for name in names:
            reason = _unusable(name, device, op, vocab_size, rejection, edited)
            if reason is None:
                return name
            reasons.append(reason)
        _warn_reference(device.type, reasons[0] if reasons else "no kernel is built for it")
        return "reference"
    if backend not in BY_NAME:
        names = sorted(known.name for known in ALL)
        raise ValueError(f"{op}: backend must be one of {names} or None, got {backend!r}")
    reason = _unusable(backend, device, op, vocab_size, rejection, edited)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} can't run: {reason}")
    return backend


def implementation(backend: str, name: str, base: Tensor) -> Implementation:
    """What a backend runs an operator with, or its ``_out`` twin, on the device of ``base``."""
    return BY_NAME[backend].implementation(name, base.device)
