"""CUDA C++ kernels, ``torch.ops.proxytune_cuda``. The extension is loaded when one is asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from proxytune_kernels.ops.backends.backend import Backend, Implementation, registered
from proxytune_kernels.ops.table import OPERATORS, define

_OLDEST = (9, 0)
_MODULE = "proxytune_kernels._cuda"
_NAMES = ("sample", "verify")

LIBRARY = define("proxytune_cuda", [OPERATORS[name] for name in _NAMES])
_IMPLEMENTATIONS = registered("proxytune_cuda", _NAMES)


class Cuda(Backend):
    """The CUDA C++ extension."""

    name = device_type = "cuda"
    operators = _NAMES
    edits = False

    @override
    def missing(self) -> str | None:
        return missing()

    @override
    def unusable(self) -> str | None:
        return missing() or device_unusable(torch.cuda.current_device())

    @override
    def device_unusable(self, index: int) -> str | None:
        return device_unusable(index)

    @override
    def max_vocab_size(self, index: int, rejection: bool) -> int | None:
        return max_vocab_size(rejection, index)

    @override
    def implementation(self, name: str, device: torch.device) -> Implementation:
        return _IMPLEMENTATIONS[name]


@cache
def missing() -> str | None:
    """What they lack on every device; None where it is all there."""
    try:
        found = find_spec(_MODULE)
    except ModuleNotFoundError:  # what keeps a module from being found may raise instead
        found = None
    if found is None:
        note = Path(__file__).parents[2] / "_cuda_not_built.txt"  # by setup.py
        why = f" ({note.read_text()})" if note.exists() else ""
        return (
            f"the CUDA C++ extension is not built{why}: install nvcc 12.8 or later, then run `pip "
            "install --no-build-isolation .` without PROXYTUNE_SKIP_CUDA_BUILD"
        )
    if torch.version.cuda is None:
        return (
            "the CUDA C++ extension is built, but can't be loaded: it launches on torch's streams, "
            f"and torch {torch.__version__} is built without CUDA"
        )
    return None if torch.cuda.is_available() else "no CUDA device"


@cache
def device_unusable(index: int) -> str | None:
    """Why the kernels can't run on this CUDA device; None where they can."""
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        found, wanted = (".".join(map(str, c)) for c in (capability, _OLDEST))
        return f"CUDA device {index} has compute capability {found}, {wanted} or later is needed"
    try:
        max_vocab_size(False, index)
    except ImportError as error:
        return f"the CUDA C++ extension does not load: {error}"
    except RuntimeError as error:
        return f"CUDA device {index}: {error}"
    return None


@cache
def max_vocab_size(rejection: bool, index: int) -> int:
    """The widest rows that a CUDA device can hold on chip, in tokens.

    Args:
        rejection: for ``verify`` in that mode, which holds the drafter's row too.
        index: of the device.

    Raises:
        RuntimeError: it can't run the kernels at all; says why.
    """
    return int(_extension().max_vocab_size(rejection, index))


@cache
def device_name(index: int) -> str:
    """What the driver calls a CUDA device."""
    return torch.cuda.get_device_name(index)


def _extension() -> Any:
    return import_module(_MODULE)
