"""Every backend that runs here, and every instruction set of the CPU's, as fixtures.

A new backend joins by its name in ``proxytune_kernels.backends()``. With TRITON_INTERPRET=1 in the
environment (``make interpret``) Triton's interpreter is the only one: the same tests again, on the
kernels as they are written, at the sizes that ``sized`` gives them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import proxytune_kernels as ptk
from proxytune_kernels import kernels
from proxytune_kernels.ops.backends import BY_NAME
from tests.cluster import build
from tests.cluster.model import Model

try:
    from proxytune_kernels import _cpu as cpu_extension
except ImportError:  # built without it: the reference alone is tested
    cpu_extension = None

T = TypeVar("T")


def _whole(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of, as one row."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((elements,), (1,), 0)


def move(value: Any, device: str) -> Any:
    """Tensors on another device, with the same strides and misalignment, what lies around included.

    Tuples too; anything else is left as it is, and so are tensors that are there already.
    """
    if isinstance(value, Tensor) and value.device.type != device and value.device.type != "meta":
        whole = _whole(value).to(device)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, tuple):
        moved = [move(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def _copy_whole(source: Any, target: Any) -> None:
    """Copy all that the tensors are views of, guards around them too."""
    if isinstance(source, Tensor):
        _whole(target).copy_(_whole(source))
    elif isinstance(source, tuple):
        for one, other in zip(source, target, strict=True):
            _copy_whole(one, other)


@dataclass(frozen=True)
class Backend:
    """One way to run the operators: tensors come and go on the CPU.

    Where it lacks an operator, tests that need it too get the CPU's.
    """

    name: str
    isa: str | None = None

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs it: at 0.1 s a row and more."""
        return self.name == "triton" and kernels.interpreted()

    @property
    def device(self) -> str:
        return "cpu" if self.interpreted else BY_NAME[self.name].device_type or "cpu"

    @property
    def tile_error(self) -> float:
        """What sums of tiles add to the bound of a raw logprob, or a logprob without filters.

        Triton takes the tiles' sums for the row's mass there (docs/gpu.md), the cluster kernels for
        raw logprobs (docs/cuda.md); the others add up integers.
        """
        return {"triton": 4.2e-6, "cuda": 4.5e-6}.get(self.name, 0.0)

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in ("sample", "sample_hidden", "combine", "score", "verify"):
            raise AttributeError(op)
        if op not in BY_NAME[self.name].operators:
            return getattr(Backend("cpu"), op)
        return functools.partial(self._run, getattr(ptk, op))

    def _run(self, op: Callable[..., Any], *args: Any, out: Any = None, **kwargs: Any) -> Any:
        args = move(args, self.device)
        kwargs = {n: move(v, self.device) for n, v in kwargs.items()}
        if out is None:
            return move(op(*args, backend=self.name, **kwargs), "cpu")
        written = move(out, self.device)
        assert op(*args, backend=self.name, out=written, **kwargs) is written
        if written is not out:
            _copy_whole(written, out)
        return out

    def operator(self, name: str) -> Callable[..., Any]:
        """An operator as direct callers of torch.ops get it; tensors come and go on the CPU."""
        run = BY_NAME[self.name].implementation(name, torch.device(self.device))

        def call(*args: Any, **kwargs: Any) -> Any:
            moved = {n: move(v, self.device) for n, v in kwargs.items()}
            return move(run(*move(args, self.device), **moved), "cpu")

        return call

    def use(self) -> None:
        if self.isa is not None:
            cpu_extension.set_isa(self.isa)


@dataclass(frozen=True)
class ClusterModel(Backend):
    """The cluster kernels' source on a CPU (tests/cluster), with clusters of so many blocks.

    They are ``sample`` and ``verify``; tests that need ``combine`` or ``score`` too get the CPU's.
    """

    blocks: int = 1

    @property
    def tile_error(self) -> float:
        return 4.5e-6  # of raw logprobs alone: docs/cuda.md, Selection

    def __str__(self) -> str:
        return f"{self.name}-{self.blocks}"

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op in ("sample", "verify"):
            return getattr(Model(self.blocks), op)
        return getattr(Backend("cpu"), op)


def instruction_sets() -> list[str]:
    """The CPU's instruction sets that run here, widest last."""
    if cpu_extension is None:
        return []
    found = []
    for name in ("scalar", "avx2", "avx512", "neon"):
        try:
            cpu_extension.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    cpu_extension.set_isa(None)
    return found


USABLE = [name for name, reason in ptk.backends().items()
          if reason is None and (name == "triton" or not kernels.interpreted())]  # fmt: skip
KERNELS = [Backend(n, i) for n in USABLE if n != "reference"
           for i in (instruction_sets() if n == "cpu" else [None])]  # fmt: skip
BACKENDS = [*KERNELS, *(Backend(n) for n in USABLE if n == "reference")]
WIDEST = list({backend.name: backend for backend in KERNELS}.values())
CLUSTERS = [ClusterModel("cluster", blocks=blocks) for blocks in (1, 2, 4, 8, 16)
            if build.COMPILER and "cpu" in USABLE]  # fmt: skip

# Triton's kernels know nothing of torch's threads.
on_threads = pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b.name != "triton"], ids=str, indirect=True
)
# Not the model of a cluster: for what is about combine and score, or compares bits with them.
registered = pytest.mark.parametrize("backend", BACKENDS, ids=str, indirect=True)

_TOO_SLOW = pytest.mark.skip(
    reason="10^5 draws and more, too many for Triton's interpreter: that its draws are the other "
    "backends', test_agreement.py shows"
)


NEEDS_TRITON = [
    pytest.mark.triton,
    pytest.mark.skipif(
        "triton" not in USABLE,
        reason="Triton kernels run on a CUDA device, or in Triton's interpreter (make interpret)",
    ),
]
"""Marks of tests of Triton's kernels that no fixture names: ``-k triton`` selects them too."""

NEEDS_CUDA = pytest.mark.skipif(
    "cuda" not in USABLE, reason=f"needs the CUDA C++ kernels: {ptk.backends()['cuda']}"
)


def sized(backend: Backend, full: T, interpreted: T) -> T:
    """Rows, draws or cases for a backend: ``interpreted`` ones keep `make interpret` in minutes.

    They are fewer, never less exact: a bound that depends on a size is part of it. The model of a
    cluster gets them too; tests/cluster has more for it.
    """
    return interpreted if backend.interpreted or backend in CLUSTERS else full


def _use(backend: Backend) -> Iterator[Backend]:
    backend.use()
    yield backend
    if cpu_extension is not None:
        cpu_extension.set_isa(None)


@pytest.fixture(params=[*BACKENDS, *CLUSTERS], ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend, every instruction set, and clusters of every size."""
    yield from _use(request.param)


@pytest.fixture(params=[*KERNELS, *CLUSTERS], ids=str)
def kernel(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend but the reference, every instruction set, and clusters of every size."""
    yield from _use(request.param)


@pytest.fixture(params=WIDEST, ids=str)
def widest(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend but the reference, the CPU at its widest."""
    yield from _use(request.param)


@pytest.fixture(
    params=[pytest.param(k, marks=_TOO_SLOW) if k.interpreted else k for k in WIDEST], ids=str
)
def fast(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The same for what needs many draws."""
    yield from _use(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, whatever ran before: the test runner has a process for each core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
