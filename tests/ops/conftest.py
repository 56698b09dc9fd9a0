"""Every backend that runs here, and every instruction set of the CPU's, as fixtures.

A new backend joins by its name in ``proxytune_kernels.backends()``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels import kernels

try:
    from proxytune_kernels import _cpu as cpu_extension
except ImportError:  # built without it: the reference alone is tested
    cpu_extension = None


def _move(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [_move(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


@dataclass(frozen=True)
class Backend:
    """One way to run the operators: tensors come and go on the CPU."""

    name: str
    isa: str | None = None

    @property
    def device(self) -> str:
        on_cpu = self.name != "triton" or kernels.interpreted()
        return "cpu" if on_cpu else "cuda"

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in ("sample", "combine", "score", "verify"):
            raise AttributeError(op)
        return functools.partial(self._run, getattr(ptk, op))

    def _run(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = (
            _move(args, self.device),
            {n: _move(v, self.device) for n, v in kwargs.items()},
        )
        return _move(op(*args, backend=self.name, **kwargs), "cpu")

    def use(self) -> None:
        if self.isa is not None:
            cpu_extension.set_isa(self.isa)


def instruction_sets() -> list[str]:
    """The CPU's instruction sets that run here, widest last."""
    if cpu_extension is None:
        return []
    found = []
    for name in ("scalar", "avx2", "avx512"):
        try:
            cpu_extension.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    cpu_extension.set_isa(None)
    return found


USABLE = [name for name, reason in ptk.backends().items() if reason is None]
KERNELS = [Backend(n, i) for n in USABLE if n != "reference"
           for i in (instruction_sets() if n == "cpu" else [None])]  # fmt: skip
WIDEST = list({backend.name: backend for backend in KERNELS}.values())


def _use(backend: Backend) -> Iterator[Backend]:
    backend.use()
    yield backend
    if cpu_extension is not None:
        cpu_extension.set_isa(None)


@pytest.fixture(params=[*KERNELS, Backend("reference")], ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend, and every instruction set."""
    yield from _use(request.param)


@pytest.fixture(params=KERNELS, ids=str)
def kernel(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend but the reference, and every instruction set."""
    yield from _use(request.param)


@pytest.fixture(params=WIDEST, ids=str)
def widest(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend but the reference, the CPU at its widest: for what needs many draws."""
    yield from _use(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, whatever ran before: the test runner has a process for each core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
