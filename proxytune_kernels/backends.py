"""Which backends can run here, and for each that can't, the reason as a sentence."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from proxytune_kernels import (
    _library,  # noqa: F401  (defines the operators the backends implement)
    kernels,
)


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


_NAMES = ("cpu", "triton", "reference")

# At import, so that exported and compiled graphs find torch.ops.proxytune's kernels.
_CPU_REASON = _cpu()


def backends() -> dict[str, str | None]:
    """Backends by name: None where usable, else why not.

    ``cpu`` is the C++ extension; ``triton`` runs on NVIDIA devices of compute capability 8.0 and
    later; ``reference`` is plain PyTorch, exact and slow, on any device.

    Example:
        >>> backends()["reference"] is None
        True
    """
    return dict(zip(_NAMES, (_CPU_REASON, kernels.unusable(), None), strict=True))


def _reason(backend: str, device: torch.device) -> str | None:
    """Why a backend can't run on a device."""
    if backend == "cpu":
        return _CPU_REASON or (None if device.type == "cpu" else _elsewhere(device, "cpu"))
    if backend == "triton":
        if kernels.unusable() is not None or kernels.interpreted():
            return kernels.unusable()
        if device.type != "cuda":
            return _elsewhere(device, "cuda")
        return kernels.device_unusable(device.index or 0)
    return None


# torch.compile takes the reason for a constant, and does not trace how it is found: what
# torch.compiler.assume_constant_result does, but for the import of the compiler.
_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _elsewhere(device: torch.device, wanted: str) -> str:
    return f"the logits are on {device}, it runs on {wanted} tensors"


_DEFAULTS: dict[str, str] = {"cpu": "cpu", "cuda": "triton"}
"""The fastest backend of each kind of device."""


@cache
def _warn_reference(device: str, reason: str) -> None:
    warnings.warn(
        f"proxytune_kernels runs its slow reference backend on {device}: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


def resolve(backend: str | None, base: Tensor, op: str) -> str:
    """Name of the backend that runs ``op`` on these logits: as asked for, or the fastest usable.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that can't run here, with the reason.
    """
    device = base.device
    if backend is None:
        name = _DEFAULTS.get(device.type)
        reason = "no kernel is built for it" if name is None else _reason(name, device)
        if name is not None and reason is None:
            return name
        assert reason is not None
        _warn_reference(device.type, reason)
        return "reference"
    if backend not in _NAMES:
        raise ValueError(f"{op}: backend must be one of {sorted(_NAMES)} or None, got {backend!r}")
    reason = _reason(backend, device)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} can't run: {reason}")
    return backend
