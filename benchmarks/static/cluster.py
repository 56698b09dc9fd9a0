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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import build_cuda
from benchmarks.static import sass
from benchmarks.static.compiling import tool
from benchmarks.static.figures import (
    LIMITS,
    RESERVED_SHARED,
    WARP,
    Compiled,
    Figures,
    RouteFigures,
    Unit,
    count,
)
from benchmarks.static.report import example_gpu

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
    "V=32000": (32_000, 256),
}
"""Cases: vocabulary and rows; B is 256 unless the name says otherwise."""

_SECTION = re.compile(r"^//-+ \.text\.(\S+) -+$", re.MULTILINE)
_TOKENS, _ROLES = 8, 3  # of 16 bits, in a vector of 16 bytes
_TOKENS_OF_LANE = 4  # in a tile of shared memory


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    try:
        build_cuda.find_nvcc()
    except build_cuda.Unavailable as error:
        return str(error)
    return None if shutil.which(_host_compiler()) else f"{_host_compiler()} is not installed"


def _host_compiler() -> str:
    return os.environ.get("CXX", "c++")


def version() -> str:
    """The compiler's name and version."""
    said = subprocess.run(
        [build_cuda.find_nvcc().path, "--version"], capture_output=True, text=True, check=True
    )
    found = re.search(r"V([\d.]+)$", said.stdout, re.MULTILINE)
    return f"nvcc {found[1]}" if found else "nvcc"


def units(ccs: Iterable[int]) -> list[Unit]:
    """All shapes, kernels and compute capabilities that there are clusters for."""
    return [
        Unit(case, kernel, cc)
        for case, (_, rows) in SHAPES.items()
        for kernel in KERNELS
        for cc in ccs
        if cc in LARGEST and (kernel == "sample" or rows > 1)
    ]


def measure(wanted: Sequence[Unit]) -> dict[Unit, Figures]:
    """Compile and count; without the units whose rows no cluster of the device holds."""
    ccs = sorted({unit.cc for unit in wanted})
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        compiled = dict(zip(ccs, pool.map(compile_for, ccs), strict=True))
    figures = {}
    for unit, cluster in zip(wanted, clusters(wanted), strict=True):
        if cluster.blocks:
            one = compiled[unit.cc][unit.kernel]
            try:
                figures[unit] = _figures(one, cluster, unit.cc)
            except sass.CannotFollow as error:
                raise RuntimeError(f"{unit}: {error}") from error
    return figures


def compile_for(cc: int) -> dict[str, Compiled]:
    """The kernels' code for a compute capability, by the names of :data:`KERNELS`."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        try:
            build_cuda.find_nvcc().compile(cubin, [f"-arch=sm_{cc}"], "-cubin")
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"nvcc for cc {cc}: {error.stderr.strip()}") from error
        usage = tool("cuobjdump", "-res-usage", str(cubin))
        return read(tool("nvdisasm", "-c", str(cubin)), usage)


def read(text: str, usage: str) -> dict[str, Compiled]:
    """Kernels of what ``nvdisasm -c`` and ``cuobjdump -res-usage`` print, by name."""
    _, *parts = _SECTION.split(text)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    found = {}
    for name, symbol in KERNELS.items():
        full = next((own for own in sections if symbol in own), None)
        if full is None or f"Function {full}:" not in usage:
            raise ValueError(f"the code holds no kernel {symbol}")
        resources = sass.parse_resources(usage.split(f"Function {full}:")[1])
        code = sass.parse(sections[full])
        found[name] = Compiled(code, resources["REG"], resources["STACK"])
    return found


class Cluster(NamedTuple):
    """What a row takes."""

    blocks: int  # 0: no cluster of the device holds it
    threads: int  # of a block
    shared: int  # bytes of a block
    widest: int  # row that some cluster holds, in tokens


def clusters(wanted: Sequence[Unit]) -> list[Cluster]:
    """The clusters that ``csrc/cuda/blocks.h`` chooses, compiled for this processor."""
    lines = []
    for case, kernel, cc in wanted:
        vocab_size, rows = SHAPES[case]
        kilobytes = (LIMITS[cc].shared - RESERVED_SHARED) // 1024
        numbers = (vocab_size, rows, int(kernel == "rejection"), example_gpu(cc).sms, kilobytes)
        lines.append(" ".join(map(str, (*numbers, LARGEST[cc]))))
    with tempfile.TemporaryDirectory() as folder:
        program, source = Path(folder, "blocks"), Path(__file__).with_name("blocks.cpp")
        subprocess.run([_host_compiler(), "-std=c++20", source, "-o", program], check=True)
        done = subprocess.run(
            [program], input="\n".join(lines), capture_output=True, text=True, check=True
        )
    return [Cluster(*map(int, line.split())) for line in done.stdout.splitlines()]


def is_vector(i: sass.Instruction) -> bool:
    """Whether it loads logits: nothing else asks for no place in L1."""
    return i.stem == "LDG" and ".NA" in i.opcode


def reading(code: sass.Code) -> RouteFigures:
    """The longest loop that loads a multiple of three vectors: that of bf16 or fp16 logits.

    fp32 logits are half as many tokens to a vector, and one role's come one by one.
    """
    loops, loads = code.loops(), dict[range, int]()
    for index, instruction in enumerate(code.instructions):
        around = [loop for loop in loops if index in loop]
        if is_vector(instruction) and around:
            innermost = min(around, key=len)
            loads[innermost] = loads.get(innermost, 0) + 1
    steered = {loop: loaded for loop, loaded in loads.items() if loaded % _ROLES == 0}
    if not steered:
        raise sass.CannotFollow("no loop loads vectors of three roles")
    loop = max(steered, key=lambda one: len(one) / steered[one])
    tokens = steered[loop] // _ROLES * _TOKENS
    per_token = steered[loop] / tokens
    return RouteFigures(len(loop) / tokens, per_token, 16 * per_token)


def over_tiles(code: sass.Code) -> dict[str, RouteFigures]:
    """The loops over x in shared memory: those that summarise tiles, and add up their masses.

    The first is all rows', the second runs where top_p or an unfiltered logprob asks for it. They
    are the shortest that take an exponential by the GPU's instruction, and that have two sums, of a
    mass's digits, for each load of four tokens.
    """
    shortest: dict[str, float] = {}
    for loop in sorted(code.loops(), key=len, reverse=True):
        names = [code.instructions[i].opcode for i in loop]
        tiles = sum(name.startswith("LDS.128") for name in names)
        sums = sum("REDUX.SUM" in name for name in names)
        if tiles and any("EX2" in name for name in names):
            shortest["summarise"] = len(loop) / (tiles * _TOKENS_OF_LANE)
        elif tiles and sums == 2 * tiles:
            shortest["mass"] = len(loop) / (tiles * _TOKENS_OF_LANE)
    for name in ("summarise", "mass"):
        if name not in shortest:
            raise sass.CannotFollow(f"no loop over tiles is that of {name}")
    logits_bytes = float(_ROLES * 16 // _TOKENS)
    return {name: RouteFigures(n, 0.0, logits_bytes) for name, n in shortest.items()}


def _figures(compiled: Compiled, cluster: Cluster, cc: int) -> Figures:
    routes = {"reading": reading(compiled.code), **over_tiles(compiled.code)}
    placed = replace(compiled, shared=cluster.shared, warps=cluster.threads // WARP)
    # Generic loads and stores are of other blocks' memory.
    figures = count(placed, cc, is_vector, routes, loads=("LDG",), stores=("STG",))
    return replace(figures, blocks=cluster.blocks)


def broken_promises(figures: Mapping[Unit, Figures]) -> Iterator[str]:
    """What the design promises of these kernels and is not so."""
    for unit, one in figures.items():
        budget = {"registers": REGISTERS[unit.kernel], "stack": 0, "local": 0}
        for name, most in budget.items():
            if (got := getattr(one, name)) > most:
                yield f"{unit}: {name} {got}, the budget is {most}"
        if one.narrowest != 16:
            yield f"{unit}: logits are not read in loads of 16 bytes, but of {one.narrowest}"
