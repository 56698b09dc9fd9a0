"""The CUDA C++ kernels, compiled by nvcc for GPUs that are not here.

Their code is the same for every shape; the size of a cluster, and with it a block's shared memory
and how many blocks a multiprocessor holds, is not. So a case here is a shape.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import build_cuda
from benchmarks.roofline import GPUS
from benchmarks.static import sass
from benchmarks.static.figures import LIMITS, RESERVED_SHARED, WARP, Figures, Promise, Unit, count
from benchmarks.static.triton_kernels import tool

KERNELS = {
    "sample": "sample_kernelILb0E",
    "sample_top": "sample_kernelILb1E",
    "coupled": "verify_kernelILi0E",
    "rejection": "verify_kernelILi1E",
}
"""Kernels by name, and what their symbols hold."""

REGISTERS = {"sample": 128, "sample_top": 128, "coupled": 128, "rejection": 255}
"""The budgets: with 256 threads a block, two blocks a multiprocessor. Rejection's two rows leave
shared memory for one."""

LARGEST = {90: 16, 100: 16, 120: 8}
"""Blocks of a cluster by compute capability, of those in ``LIMITS`` that have clusters: 8 is what
every device has; an H100 and a B200 have 16."""

SHAPES = {
    "V=128256": (128_256, 256),
    "V=128256 B=1": (128_256, 1),
    "V=151936": (151_936, 256),
    "V=262208": (262_208, 256),
    "V=32000": (32_000, 256),
}
"""Cases: vocabulary and rows; B is 256 unless the name says otherwise."""

_SECTION = re.compile(r"^//-+ \.text\.(\S+) -+$", re.MULTILINE)

Kernel = tuple[Sequence[sass.Instruction], dict[str, int]]
"""Code and resources."""


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    try:
        build_cuda.find_nvcc()
    except build_cuda.Unavailable as error:
        return str(error)
    return None if shutil.which(_host_compiler()) else f"{_host_compiler()} is not installed"


def _host_compiler() -> str:
    return os.environ.get("CXX", "c++")


def units(ccs: Iterable[int]) -> list[Unit]:
    """All shapes, kernels and compute capabilities that there are clusters for."""
    said = subprocess.check_output([build_cuda.find_nvcc().path, "--version"], text=True)
    version = re.search(r"V([\d.]+)$", said, re.MULTILINE)
    compiler = f"nvcc {version[1]}" if version else "nvcc"
    return [
        Unit(compiler, case, kernel, cc)
        for case, (_, rows) in SHAPES.items()
        for kernel in KERNELS
        for cc in ccs
        if cc in LARGEST and (kernel == "sample" or rows > 1)
    ]


def measure(wanted: Sequence[Unit]) -> dict[Unit, Figures]:
    """Compile and count; without the units whose rows no cluster of the device holds."""
    compiled = compile_for(sorted({unit.cc for unit in wanted}))
    figures = {}
    for unit, (blocks, threads, shared) in zip(wanted, clusters(wanted), strict=True):
        if blocks:
            warps, kernel = threads // WARP, compiled[unit.cc][unit.kernel]
            figures[unit] = count(*kernel, unit.cc, shared, warps, is_vector, blocks)
    return figures


def compile_for(ccs: Sequence[int]) -> dict[int, dict[str, Kernel]]:
    """The kernels' code for compute capabilities, by the names of :data:`KERNELS`."""
    try:
        built = build_cuda.find_nvcc().kernels(list(map(build_cuda.device, map(str, ccs))))
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"nvcc: {error.stderr.strip()}") from error
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xelf", "all", str(built), folder=folder)
        for cc in ccs:
            [cubin] = map(str, Path(folder).glob(f"*.sm_{cc}.cubin"))
            usage = tool("cuobjdump", "-res-usage", cubin)
            found[cc] = read(tool("nvdisasm", "-c", cubin), usage)
    return found


def read(text: str, usage: str) -> dict[str, Kernel]:
    """Kernels of what ``nvdisasm -c`` and ``cuobjdump -res-usage`` print, by name."""
    _, *parts = _SECTION.split(text)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    found = {}
    for name, symbol in KERNELS.items():
        full = next((own for own in sections if symbol in own), None)
        if full is None or f"Function {full}:" not in usage:
            raise ValueError(f"the code holds no kernel {symbol}")
        resources = sass.parse_resources(usage.split(f"Function {full}:")[1])
        found[name] = sass.parse(sections[full]), resources
    return found


def clusters(wanted: Sequence[Unit]) -> list[list[int]]:
    """A cluster's blocks (0: none holds the row), a block's threads, its bytes of shared memory.

    As ``csrc/cuda/blocks.h``, compiled for this processor, chooses them. The first GPU of a compute
    capability in the roofline's list stands for all.
    """
    lines = []
    for _, case, kernel, cc in wanted:
        vocab_size, rows = SHAPES[case]
        sms = next(g.sms for g in GPUS.values() if g.compute_capability == f"{cc / 10:.1f}")
        kilobytes = (LIMITS[cc][2] - RESERVED_SHARED) // 1024
        numbers = (vocab_size, rows, int(kernel == "rejection"), sms, kilobytes, LARGEST[cc])
        lines.append(" ".join(map(str, numbers)))
    with tempfile.TemporaryDirectory() as folder:
        program, source = Path(folder, "blocks"), Path(__file__).with_name("blocks.cpp")
        subprocess.run([_host_compiler(), "-std=c++20", source, "-o", program], check=True)
        done = subprocess.run(
            [program], input="\n".join(lines), capture_output=True, text=True, check=True
        )
    return [[int(n) for n in line.split()[:3]] for line in done.stdout.splitlines()]


def is_vector(i: sass.Instruction) -> bool:
    """Whether it loads logits: nothing else asks for no place in L1."""
    return i.stem == "LDG" and ".NA" in i.opcode


def promise(unit: Unit) -> Promise:
    """What the design promises of a kernel; that shared memory suffices is up to blocks.h."""
    return Promise(REGISTERS[unit.kernel], LIMITS[unit.cc][2], wide=True)
