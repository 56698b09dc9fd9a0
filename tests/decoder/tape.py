"""CUDA graphs without a GPU: a tape of the operators of one step, played again and again.

A replay of a CUDA graph runs no Python: the same kernels run on the same addresses, with the same
numbers. So does a tape. It keeps each operator with the very tensors that it got, and writes what
it gives over the tensors that it gave first. What a step takes from the host (a length, the end of
a slice, a mask made in Python) stays as it was when the step was recorded, and the tokens show it.

A tape also refuses what a capture refuses, with a RuntimeError as torch raises: to read a value
back to the host, an output whose shape depends on values, a tensor that is made on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_leaves

from proxytune_kernels.decoder import Decoder, decoder, transfer
from proxytune_kernels.decoder.graphs import Capture, Replay
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.decoder.sampler import StepResult
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import BACKEND

# Operators that wait for the device, or have outputs of a shape that only the device knows.
_WAITING = set(
    "_local_scalar_dense equal is_nonzero item masked_select nonzero repeat_interleave.Tensor "
    "unique_dim _unique2".split()
)
# torch.tensor and its like: on a GPU a copy from memory that is not pinned.
_MADE_ON_THE_HOST = {"lift", "lift_fresh", "lift_fresh_copy"}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Reads of a CPU tensor's memory that go through no operator.
_READS = {"__array__", "cpu", "numpy", "tolist"}
_WAITS = "called a synchronizing CUDA operation"
_REFUSED = "operation not permitted when stream is capturing"


@dataclass
class _Call:
    operator: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    # What the operator made; not what it wrote in place, nor views of what it got.
    made: list[tuple[int, Tensor]]

    def play(self) -> None:
        given = tree_leaves(self.operator(*self.arguments, **self.keywords))
        for place, tensor in self.made:
            tensor.copy_(given[place])


class _Recorder(TorchDispatchMode):
    """Keeps the operators that run, and the storages that were there before them.

    ``refusal``: of the operators that wait; None lets them run.
    """

    def __init__(self, refusal: str | None = _REFUSED) -> None:
        super().__init__()
        self._refusal = refusal
        self.calls: list[_Call] = []
        self.found: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def whole(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        """Run and keep what torch.compile made, as one operator: it runs under no recorder."""
        with _disable_current_modes():
            result = function(*arguments)
        self._look(arguments)
        self._made.add(_place(result))
        self.calls.append(_Call(function, arguments, {}, [(0, result)]))
        return result

    def _look(self, tree: Any) -> None:
        for tensor in _tensors(tree):
            if _place(tensor) not in self._made:
                self.found[_place(tensor)] = tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        keywords = kwargs or {}
        if self._refusal is not None:
            _refuse(func, args, self._refusal)
        self._look((args, keywords))
        result = func(*args, **keywords)
        got = {_place(tensor) for tensor in _tensors((args, keywords))}
        made = [
            (i, leaf)
            for i, leaf in enumerate(tree_leaves(result))
            if isinstance(leaf, Tensor) and _place(leaf) not in got
        ]
        self._made |= {_place(tensor) for _, tensor in made}
        if made or func._schema.is_mutable:
            self.calls.append(_Call(func, args, keywords, made))
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _refuse(operator: Any, arguments: tuple[Any, ...], refusal: str) -> None:
    name = operator._schema.name.split("::")[1]
    full = f"{name}.{operator._overloadname}"
    if name in _WAITING or full in _WAITING:
        raise RuntimeError(f"{refusal}: {name}")
    if name in _MADE_ON_THE_HOST:
        raise RuntimeError(f"{refusal}: a copy of memory that is not pinned")
    if name in _BY_INDEX and any(t.dtype == torch.bool for t in _tensors(arguments[1])):
        raise RuntimeError(f"{refusal}: {name} by a mask")


@contextmanager
def _no_reads(refusal: str = _REFUSED) -> Iterator[None]:
    """Refuses to read tensors as lists and arrays. No mode: what is compiled asks for those."""

    def refuse(name: str) -> Callable[..., Any]:
        def read(*given: Any, **named: Any) -> Any:
            raise RuntimeError(f"{refusal}: {name}")

        return read

    to = torch.Tensor.to

    def moved(tensor: Tensor, *given: Any, **named: Any) -> Any:
        if "cpu" in given:
            raise RuntimeError(f"{refusal}: to")
        return to(tensor, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name in _READS:
            patch.setattr(torch.Tensor, name, refuse(name))
        patch.setattr(torch.Tensor, "to", moved)
        yield


_COMPILE = torch.compile


def compile_with(backend: Any) -> Callable[..., Any]:
    """A torch.compile of a quick backend, for what may run in a recorder."""

    def replacement(function: Any, **options: Any) -> Any:
        compiled: Any = _COMPILE(function, backend=backend, **options)

        def call(*arguments: Any) -> Any:
            recorder = _get_current_dispatch_mode()
            if isinstance(recorder, _Recorder):
                return recorder.whole(compiled, arguments)
            return compiled(*arguments)

        return call

    return replacement


class Tape(Capture):
    """Records steps on a CPU, to be run again without their Python.

    It has the limits of a capture, and a replay has a capture's results: what is refused, and why,
    is in this module's docstring.
    """

    def __init__(self) -> None:
        self.replays = self.records = 0
        self._found: dict[int, Tensor] = {}

    def warm_up(self, step: Replay) -> None:
        step()

    def rehearse(self, step: Replay) -> None:
        # A step may make what it keeps at its first run; from then on it must find it there.
        recorder = _Recorder(_WAITS)
        with _no_reads(_WAITS), recorder:
            step()
        self._found = recorder.found

    def record(self, step: Replay) -> Replay:
        self.records += 1
        recorder = _Recorder()
        with _no_reads(), recorder:
            result = step()
        new = [t for place, t in recorder.found.items() if place not in self._found]
        if new:
            shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in new)
            raise RuntimeError(f"a step got tensors that it had not got before: {shapes}")

        def replay() -> StepResult:
            self.replays += 1
            for call in recorder.calls:
                call.play()
            return result

        return replay


def mutations(run: Callable[[], object]) -> list[str]:
    """The operators that write: on a GPU each is a launch."""
    recorder = _Recorder(None)
    with recorder:
        run()
    return [call.operator.__name__ for call in recorder.calls]


class NeverWaits:
    """Runs functions of a decoder as a GPU would: they may send numbers, and wait for nothing.

    What :func:`~proxytune_kernels.decoder.transfer.to_device` makes and sends is counted; a tensor
    that is made on the host elsewhere, or read there, is refused.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[tuple[str, int]] = []
        """Each function's name, and how many copies it sent."""
        self._monkeypatch = monkeypatch
        self._recorder = _Recorder(_WAITS)
        self._sent = 0
        send = transfer.to_device

        def to_device(make: Any, device: torch.device) -> list[Tensor]:
            self._sent += 1
            refusal, self._recorder._refusal = self._recorder._refusal, None
            try:
                return send(make, device)
            finally:
                self._recorder._refusal = refusal

        monkeypatch.setattr(transfer, "to_device", to_device)

    def watch(self, owner: type, name: str) -> None:
        """Refuse what waits in a method."""
        method = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            before = self._sent
            with _no_reads(_WAITS), self._recorder:
                result = method(*arguments, **named)
            self.runs.append((name, self._sent - before))
            return result

        self._monkeypatch.setattr(owner, name, watched)


def make_decoder(
    monkeypatch: pytest.MonkeyPatch, trio: Trio, max_batch_size: int, *,
    taped: bool = False, ahead: int = 0, **options: Any,
) -> Decoder:  # fmt: skip
    """A decoder on the CPU whose steps are taped, or whose host runs ahead, as on a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "run_ahead", lambda device: ahead)
        if taped:
            patch.setattr(Runner, "cannot_capture", lambda self: None)
            patch.setattr(decoder, "CudaCapture", lambda device: Tape())
        return Decoder(trio, max_batch_size, **{"backend": BACKEND, **options})
