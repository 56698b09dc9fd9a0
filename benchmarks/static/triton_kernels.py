"""Compiles Triton's kernels as a launch on a GPU would, without one, and counts what came out.

The operators run on CPU tensors up to their launches, and Triton specialises and compiles what they
pass. Only the driver is replaced, by one that names a GPU which isn't there; nothing is launched.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.harness.report import progress_bar
from benchmarks.static import sass
from benchmarks.static.cases import CASES
from benchmarks.static.figures import WARP, Figures, Promise, Unit, count
from proxytune_kernels.kernels import common

COMPILER = f"Triton {triton.__version__}"
PROCESSORS = 132  # of an H100; what launchers ask the device for

KERNELS = tuple(dict.fromkeys(kernel for case in CASES.values() for kernel in case.kernels))

# Bound by memory: 32 warps, half of what a multiprocessor can hold (cc 12.0: two thirds). When each
# of their lanes waits for one 16-byte load, 16 KiB are under way; an H100 needs 13 KB a
# multiprocessor to draw 3.35 TB/s where a trip takes 0.5 us (docs/roofline.md).
_STREAMS = dict.fromkeys(("combine", "shard_scan", "shard_keys", "shard_histogram"), 64)
# They read flat rows again, with more arithmetic a token: 12 warps.
_SPREAD = dict.fromkeys(("pivots", "residual", "shard_draw", "shard_residual"), 168)

REGISTERS = {**_STREAMS, **_SPREAD, "scan": 112}
"""Registers a thread. scan has 16 warps, but two loads a lane and role: 16 KiB are under way when
only base's are. Others may take all 255: kernels of one block a row, where a batch seldom fills the
device, and draw, whose code holds routes for awkward rows that few blocks take."""

SHARED = dict.fromkeys(("sample_hidden", "decode_attention", "add_lora"), 99 * 1024)
"""Bytes of shared memory a block, where it is not the 48 KiB that a block gets without asking.
sample_hidden has two accumulators of 64 rows by 128 tokens, and four stages of both operands;
decode_attention holds up to 64 queries of 256 beside keys and values, add_lora three stages of A
and x: what the smallest of these devices (cc 12.0) gives a block when asked."""


STACK = {("sample V=262208", "select"): 96}
"""Bytes a thread that are spilled, by case and kernel. Above 262,144 tokens select holds twice the
summaries in all registers of a multiprocessor: some numbers of the row wait outside the loops."""


def compile_kernel(launch: Callable[[], object], name: str, cc: int) -> Any:
    """Compile one of the kernels that a call launches; the first, where one is launched twice.

    ``name`` is ``scan`` for ``_scan_kernel``.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_it(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if str(kernel.__name__).strip("_").removesuffix("_kernel") == name and not compiled:
            # Warming up stops where the machine code is there.
            compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    no_device = SimpleNamespace(  # Triton's driver as far as compiling asks it
        get_current_device=lambda: cc,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", cc, WARP),
    )
    driver.set_active(no_device)
    processors = mock.patch.object(common, "processors", lambda device: PROCESSORS)
    with mock.patch.object(JITFunction, "run", compile_it), processors:
        launch()
    if not compiled:
        raise KeyError(f"no kernel {name!r} is launched")
    return compiled[0]


def tool(name: str, *arguments: str, folder: str | None = None) -> str:
    """What a program of Triton's package prints, run in a folder."""
    command = [getattr(triton.knobs.nvidia, name).path, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _measure(unit: Unit) -> Figures:
    case = CASES[unit.case]
    try:
        kernel = compile_kernel(lambda: case.launch(case), unit.kernel, unit.cc)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            resources = sass.parse_resources(tool("cuobjdump", "-res-usage", cubin.name))
            code = sass.parse(tool("nvdisasm", "-c", cubin.name))
    except Exception as error:
        raise RuntimeError(f"{unit}: {type(error).__name__}: {error}") from error
    metadata = kernel.metadata
    return count(code, resources, unit.cc, metadata.shared, metadata.num_warps)


def units(ccs: Iterable[int], kernels: Iterable[str] = KERNELS) -> list[Unit]:
    """All that is compiled of these kernels."""
    return [
        Unit(COMPILER, case.name, kernel, cc)
        for case in CASES.values()
        for kernel in case.kernels
        for cc in ccs
        if kernel in set(kernels)
    ]


def measure(wanted: Sequence[Unit]) -> dict[Unit, Figures]:
    """Compile and count, with a progress bar; in as many processes as there are cores."""
    spawn = multiprocessing.get_context("spawn")  # compilers' threads do not survive a fork
    figures: dict[Unit, Figures] = {}
    with (
        progress_bar(len(wanted), "Compiling") as tick,
        ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn) as pool,
    ):
        for unit, one in zip(wanted, pool.map(_measure, wanted), strict=True):
            figures[unit] = one
            tick(f"Compiled {unit}")
    return figures


def promise(unit: Unit) -> Promise:
    """What the design promises of a kernel, with any version of Triton."""
    shared = SHARED.get(unit.kernel, 48 * 1024)
    stack = STACK.get((unit.case, unit.kernel), 0)
    return Promise(REGISTERS.get(unit.kernel, 255), shared, wide=False, stack=stack)
