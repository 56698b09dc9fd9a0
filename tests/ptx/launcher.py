"""Every operator's launches through Triton's own launcher, into a libcuda that launches nothing.

``python -m tests.ptx.launcher [CAPABILITY]``, in a process of its own: which libcuda is loaded, the
first decides. Grid, block, shared memory, stream and every parameter's bits must be those that the
machine would carry out. ``python -m tests.ptx.launcher time`` measures the host's part of sample.
"""

from __future__ import annotations

import ctypes
import os
import sys
import timeit
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import compiler
from triton.runtime.driver import driver

import proxytune_kernels as ptk
from benchmarks.static.cases import CASES
from proxytune_kernels.kernels import common, launches, workspace
from proxytune_kernels.kernels.sample import launch_sample
from tests.ptx import build
from tests.ptx.device import RUN, Device, Launched
from tests.ptx.program import Report

CALLS = (
    "sample bias+mask", "top_logprobs", "hidden B=16", "combine", "attention", "lora", "score",
    "coupled", "rejection", "shards", "shards rejection",
)  # fmt: skip
"""Every operator, by the cases of ``make static``."""
STREAM = 0x77
OPS: Any = ptk  # called with roles unpacked
SHARED = 232_448  # bytes that a block may ask for


class Noted(ctypes.Structure):
    """The last launch (libcuda.cpp)."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32),
        ("num_attributes", ctypes.c_uint32), ("stream", ctypes.c_uint64),
        ("launches", ctypes.c_int64), ("parameters", ctypes.c_uint64 * 256),
    ]  # fmt: skip


class Checked(Device):
    """Hands each launch to Triton's launcher in place of the machine, and compares."""

    checked = 0

    def __enter__(self) -> Checked:
        os.environ["TRITON_LIBCUDA_PATH"] = str(build.libcuda().parent)
        self._libcuda = ctypes.CDLL(str(build.libcuda()), mode=ctypes.RTLD_GLOBAL)
        self._libcuda.last_launch.restype = ctypes.c_void_p
        self.on_launch.append(self._note)
        super().__enter__()
        real = CudaDriver()
        capability = self.capability
        real.get_current_device = lambda: capability
        real.get_current_stream = lambda device: STREAM
        real.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        driver.set_active(real)
        self._stack.enter_context(mock.patch.object(compiler, "max_shared_mem", lambda d: SHARED))
        return self

    def _carry_out(self, *launch: Any) -> Report:
        nothing = np.zeros(0, dtype=np.int64)
        return Report(nothing, nothing, nothing, 0, 0, 0, 0, [])

    def _note(self, one: Launched) -> None:
        self._carried_out = one

    def _launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = super()._launch(kernel, *args, grid=grid, warmup=warmup, **options)
        wanted = self._carried_out
        sizes = [8 if "64" in t else 4 for t in wanted.program.parameter_types]
        self._libcuda.expect((ctypes.c_int * len(sizes))(*sizes), len(sizes))
        RUN(kernel, *args, grid=grid, warmup=False, **options)
        self._compare(wanted, sizes)
        if len(args) == len(kernel.params):  # what is launched by its kind; the same again
            launches.COMPILED["kernel", None, "kind"] = compiled
            name = mock.patch.object(kernel, "__name__", "kernel")
            with name, mock.patch.object(launches, "REMEMBERS", True):
                launches.launch(kernel, "kind", torch.device("cpu"), grid, *args, **options)
            self._compare(wanted, sizes)
        return compiled

    def _compare(self, wanted: Launched, sizes: list[int]) -> None:
        last = Noted.from_address(self._libcuda.last_launch())
        self.checked += 1
        assert last.launches == self.checked
        assert tuple(last.grid) == (*wanted.grid, 1, 1)[:3]
        assert tuple(last.block) == (32 * wanted.program.warps, 1, 1)
        assert (last.shared, last.stream, last.num_attributes) == (wanted.shared, STREAM, 0)
        assert list(last.parameters[: len(sizes)]) == wanted.values, wanted.name


def host_times(repeats: int = 200, calls: int = 50) -> dict[str, float]:
    """Microseconds of an eager call and of its four launches: the least mean of ``calls`` calls.

    Rows are on the CPU, whose allocations take longer than those of a GPU's caching allocator; the
    driver's own part of a launch is not in it.
    """
    B, V = 8, 128_256
    roles = [torch.zeros((B, V), dtype=torch.bfloat16) for _ in range(3)]
    params = ptk.RowParams.make(B, top_p=0.9)
    logits, out = common.inputs(*roles), workspace.outputs_of(B, params.alpha.device)
    timed: dict[str, Any] = {
        "sample": lambda: OPS.sample(*roles, params, backend="triton"),
        "its workspace and launches": lambda: launch_sample(logits, params, out, V, 1, 0),
    }
    with Checked(90) as device, mock.patch.object(launches, "REMEMBERS", True):
        timed["sample"]()
        device._libcuda.expect(None, 0)
        return {
            name: 1e6 * min(timeit.repeat(call, number=calls, repeat=repeats)) / calls
            for name, call in timed.items()
        }


def main(capability: int = 90) -> None:
    with Checked(capability) as device:
        for name in CALLS:
            CASES[name].launch(CASES[name])
    print(f"{device.checked} launches")


if __name__ == "__main__":
    if sys.argv[1:] == ["time"]:
        for what, microseconds in host_times().items():
            print(f"{what}: {microseconds:.0f} us")
    else:
        main(*map(int, sys.argv[1:]))
