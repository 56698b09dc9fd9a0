"""Triton kernels, ``torch.ops.proxytune`` on CUDA tensors. Triton is imported when one runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from typing_extensions import override

from proxytune_kernels import kernels
from proxytune_kernels.ops.backends.backend import Backend, Implementation, registered
from proxytune_kernels.ops.table import LIBRARY, OPERATORS

_REGISTERED = registered("proxytune", list(OPERATORS))


class Triton(Backend):
    """The Triton kernels; in Triton's interpreter, on CPU tensors too."""

    name = "triton"
    device_type = "cuda"
    compiles = True

    @override
    def missing(self) -> str | None:
        return kernels.unusable()

    @override
    def device_unusable(self, index: int) -> str | None:
        return None if kernels.interpreted() else kernels.device_unusable(index)

    @override
    def runs_on(self, device: torch.device) -> bool:
        return super().runs_on(device) or kernels.interpreted()

    @override
    def implementation(self, name: str, device: torch.device) -> Implementation:
        # torch.ops has the CPU's own for tensors that the interpreter is asked to take.
        return (_REGISTERED if device.type == "cuda" else _DIRECT)[name]


def _direct(name: str) -> Implementation:
    def run(*arguments: Any, **out: Any) -> Any:
        operators = import_module("proxytune_kernels.ops.backends.triton_operators")
        return operators.IMPLEMENTATIONS[name](*arguments, **out)

    return run


_DIRECT = {name: _direct(name) for name in _REGISTERED}

for _name, _implementation in _DIRECT.items():
    LIBRARY.impl(_name, _implementation, "CUDA")
