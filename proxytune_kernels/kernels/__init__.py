"""Triton kernels, ``torch.ops.proxytune`` on CUDA tensors. Triton is imported when one runs."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

_OLDEST = (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def unusable() -> str | None:
    """Why the kernels can't run here, as a sentence; None where they can."""
    try:
        found = find_spec("triton")
    except ModuleNotFoundError:  # what keeps a module from being found may raise instead
        found = None
    if found is None:
        return "Triton is not installed: run `pip install 'proxytune_kernels[triton]'` (Linux)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, very slowly)"
    if torch.version.hip is not None:
        return "the device is not NVIDIA's; the kernels were never tried on another"
    return device_unusable(torch.cuda.current_device())


@cache
def device_unusable(index: int) -> str | None:
    """Why the kernels can't run on this CUDA device; None where they can."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= _OLDEST:
        return None
    found, wanted = (".".join(map(str, c)) for c in (capability, _OLDEST))
    return f"CUDA device {index} has compute capability {found}, {wanted} or later is needed"
