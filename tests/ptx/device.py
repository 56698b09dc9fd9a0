"""A device that executes PTX on this processor, in the place of Triton's driver.

    with Device(capability=90, order=Order(seed=1, in_flight=3, races=True)):
        ptk.sample(base, expert, anti, params, backend="triton")  # CPU tensors

The operators run up to their launches as on a GPU; Triton specialises and compiles what they pass,
down to the PTX that ptxas would get; the machine executes that on the tensors' memory.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from proxytune_kernels import kernels
from proxytune_kernels.kernels import common, launches
from proxytune_kernels.ops.backends import triton_operators  # noqa: F401  (before it is patched)
from tests.ptx import build
from tests.ptx.program import Memory, Order, Program, Report, launch

CAPABILITIES = (80, 90, 100, 120)

INPUTS = frozenset(
    "logits target draft row_params draft_ids alpha token_ids base expert anti constraints "
    "part draft_part summaries words candidates ordered given wanted cutoff keys temperature edges "
    "seeds positions query values seq_lens target_logprobs target_status draft_logprobs kept "
    "draft_kept".split()
)
"""Arguments of kernels that are not to be written."""

_PASSED = {"u64": "* i64 u64", "u32": "i32 u32", "f32": "fp32", "f64": "fp64"}
"""By the PTX type of a parameter the types that Triton passes so."""
RUN = JITFunction.run
"""Triton's own."""
_programs: dict[str, Program] = {}
IN_ORDER = Order()


class Race(Exception):
    """Two accesses that nothing orders."""


class Launched(NamedTuple):
    """One launch that has been carried out."""

    name: str  # "scan" of _scan_kernel
    grid: tuple[int, ...]
    shared: int  # bytes a program
    values: list[int]  # the parameters' bits
    program: Program
    report: Report


def _leaves(types: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """What Triton passes of an argument: the fields of tuples that are no constants."""
    if isinstance(types, tuple):
        for t, v in zip(types, value, strict=True):
            yield from _leaves(t, v)
    elif types != "constexpr":
        yield types, value


def _bits(t: str, value: Any) -> int:
    """A parameter as Triton's launcher packs it."""
    if t.startswith("*"):
        return 0 if value is None else int(value.data_ptr())
    if t in ("fp32", "fp64"):
        code = {"fp32": "<f", "fp64": "<d"}[t]
        return int.from_bytes(struct.pack(code, value), "little")
    width = int(t[1:])
    low = -(1 << (width - 1)) if t[0] == "i" else 0
    assert t[0] in "iu" and low <= value < low + (1 << width), f"{value} does not fit {t}"
    return int(value) & ((1 << width) - 1)


@dataclass
class Device:
    """What stands in for a GPU; a context manager.

    Args:
        capability: 90 for 9.0.
        order: of programs and warps, and what is checked.
        processors: number of multiprocessors, as launchers see it.
        poison: a seed of what unwritten memory holds; None: what was there.
        on_launch: called with each launch.
        executed: where a program's executions are added up, by instruction; None: nowhere.
    """

    capability: int = 90
    order: Order = IN_ORDER
    processors: int = 2
    poison: int | None = None
    on_launch: list[Callable[[Launched], None]] = field(default_factory=list)
    executed: Callable[[Program], Any] = lambda program: None
    launches: int = 0

    def __enter__(self) -> Device:
        assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set: nothing is compiled"
        target = SimpleNamespace(  # Triton's driver as far as compiling asks it
            get_current_device=lambda: self.capability,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", self.capability, 32),
        )
        with contextlib.ExitStack() as stack:
            patch = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
            stack.enter_context(triton.knobs.cache.scope())
            # Its kernels end with PTX, so they are no others': no ptxas runs.
            triton.knobs.cache.dir = str(build.BUILT / "cache")
            patch(CUDABackend, "make_cubin", lambda *_: b"none")
            patch(JITFunction, "run", lambda kernel, *a, **k: self._launch(kernel, *a, **k))
            patch(launches, "REMEMBERS", False)
            patch(common, "processors", lambda device: self.processors)
            patch(kernels, "interpreted", lambda: True)  # CPU tensors are taken
            before = driver._active
            stack.callback(setattr, driver, "_active", before)
            driver.set_active(target)
            if self.poison is not None:
                self._poison(patch)
            stack.callback(kernels.unusable.cache_clear)
            kernels.unusable.cache_clear()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *what: object) -> None:
        self._stack.close()

    def _poison(self, patch: Callable[..., object]) -> None:
        generator = torch.Generator().manual_seed(int(self.poison or 0))

        def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def made(*args: Any, **kwargs: Any) -> Tensor:
                t = make(*args, **kwargs)
                if type(t) is Tensor and t.device.type == "cpu" and t.numel():
                    memory = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
                    memory.random_(0, 256, generator=generator)
                return t

            return made

        for owner, name in ((torch, "empty"), (Tensor, "new_empty")):
            patch(owner, name, filling(getattr(owner, name)))

    def _launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        # Warming up compiles and stops where the code is there.
        compiled = RUN(kernel, *args, grid=grid, warmup=True, **options)
        if warmup:
            return compiled
        binder = kernel.device_caches[self.capability][-1]
        bound, specialization, _ = binder(*args, **options, debug=False, instrumentation_mode="")
        program = _programs.get(compiled.hash)
        if program is None:
            program = _programs[compiled.hash] = Program(compiled.asm["ptx"])
        values, memory = self._arguments(bound, specialization, program)
        grid = tuple(grid(bound) if callable(grid) else grid)
        assert all(1 <= n <= most for n, most in zip(grid, (2**31 - 1, 65535, 65535), strict=False))
        self.launches += 1
        shared = compiled.metadata.shared
        report = self._carry_out(program, grid, shared, values, memory)
        name = str(kernel.__name__).strip("_").removesuffix("_kernel")
        for hook in self.on_launch:
            hook(Launched(name, grid, shared, values, program, report))
        if report.races:
            told = (f"{r}: {program.lines[int(r.split(', line ')[1].split(',')[0]) - 1].strip()}"
                    for r in report.races)  # fmt: skip
            raise Race(f"{kernel.__name__}: " + "; ".join(told))
        return compiled

    def _carry_out(
        self, program: Program, grid: tuple[int, ...], shared: int, values: list[int],
        memory: list[Memory],
    ) -> Report:  # fmt: skip
        order = self.order
        if order.seed:
            order = order._replace(seed=order.seed * 1_000_003 + self.launches)
        return launch(program, grid, shared, values, memory, order, self.executed(program))

    def _arguments(
        self, bound: dict[str, Any], specialization: Sequence[Any], program: Program
    ) -> tuple[list[int], list[Memory]]:
        """Bits of the parameters, and the memory that they reach."""
        values: list[int] = []
        reached: dict[int, Memory] = {}
        types = program.parameter_types
        for (name, value), (t, _) in zip(bound.items(), specialization, strict=True):
            for leaf, one in _leaves(t, value):
                have = types[len(values)]
                given = "*" if leaf[0] == "*" else leaf
                assert given in _PASSED[have].split(), (name, have, leaf)
                values.append(_bits(leaf, one))
                if isinstance(one, Tensor) and one.untyped_storage().nbytes():
                    storage = one.untyped_storage()
                    first = storage.data_ptr()
                    known = reached.get(first)
                    writable = name not in INPUTS or (known is not None and known.writable)
                    reached[first] = Memory(first, first + storage.nbytes(), writable)
        values += [0] * (len(types) - len(values))  # Triton's own scratch, which none asks for
        return values, [reached[first] for first in sorted(reached)]
