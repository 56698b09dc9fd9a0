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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import build_cuda
from benchmarks.static import sass
from benchmarks.static.compiling import parse_resources, tool
from benchmarks.static.figures import Figures, RouteFigures, widths
from benchmarks.static.occupancy import LIMITS, RESERVED_SHARED, WARP, resident_warps
from benchmarks.static.report import example_gpu
from benchmarks.static.run import Unit

CCS = (90, 100, 120)
"""Compute capabilities with clusters, of those in ``occupancy.LIMITS``."""

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

_LARGEST = {90: 16, 100: 16, 120: 8}
"""Blocks of a cluster: 8 is what every device has; an H100 and a B200 have 16."""

_SECTION = re.compile(r"^//-+ \.text\.(\S+) -+$", re.MULTILINE)


class Shape(NamedTuple):
    """Rows of logits, and how many of them at once."""

    vocab_size: int
    rows: int


SHAPES = {
    "V=128256": Shape(128_256, 256),
    "V=128256 B=1": Shape(128_256, 1),
    "V=151936": Shape(151_936, 256),
    "V=32000": Shape(32_000, 256),
}
"""Cases; B is 256 unless the name says otherwise."""


@dataclass(frozen=True)
class Code:
    """One kernel for one compute capability."""

    code: sass.Code
    registers: int
    stack: int


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    try:
        build_cuda.find_nvcc()
    except build_cuda.Unavailable as error:
        return str(error)
    return None if shutil.which(_host_compiler()) else f"{_host_compiler()} is not installed"


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
        Unit(shape, kernel, cc)
        for shape in SHAPES
        for kernel in KERNELS
        for cc in ccs
        if cc in CCS and not (kernel != "sample" and SHAPES[shape].rows == 1)
    ]


def measure(wanted: Sequence[Unit]) -> dict[Unit, Figures]:
    """Compile and count; without the units whose rows no cluster of the device holds.

    Raises:
        RuntimeError: nvcc refuses the code, or it can't be followed; says why.
    """
    ccs = sorted({unit.cc for unit in wanted})
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        compiled = dict(zip(ccs, pool.map(compile_for, ccs), strict=True))
    figures = {}
    for unit, cluster in zip(wanted, clusters(wanted), strict=True):
        if cluster.blocks == 0:
            continue
        try:
            figures[unit] = _figures(compiled[unit.cc][unit.kernel], cluster, unit.cc)
        except sass.CannotFollow as error:
            raise RuntimeError(f"{unit}: {error}") from error
    return figures


def compile_for(cc: int) -> dict[str, Code]:
    """The kernels' code for a compute capability, by the names of :data:`KERNELS`.

    Raises:
        RuntimeError: nvcc refuses it; says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        try:
            build_cuda.find_nvcc().compile(cubin, [f"-arch=sm_{cc}a"], "-cubin")
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"nvcc for cc {cc}: {error.stderr.strip()}") from error
        usage = tool("cuobjdump", "-res-usage", str(cubin))
        text = tool("nvdisasm", "-c", str(cubin))
    return read(text, usage)


def read(text: str, usage: str) -> dict[str, Code]:
    """Kernels of what ``nvdisasm -c`` and ``cuobjdump -res-usage`` print, by name.

    Raises:
        ValueError: a kernel is not in it.
    """
    _, *parts = _SECTION.split(text)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    found = {}
    for name, symbol in KERNELS.items():
        full = next((own for own in sections if symbol in own), None)
        if full is None or f"Function {full}:" not in usage:
            raise ValueError(f"the code holds no kernel {symbol}")
        resources = parse_resources(usage.split(f"Function {full}:")[1])
        code = sass.parse(sections[full])
        found[name] = Code(code, resources["REG"], resources["STACK"])
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
    for unit in wanted:
        shape, rejection = SHAPES[unit.case], int(unit.kernel == "rejection")
        most = LIMITS[unit.cc].shared - RESERVED_SHARED
        sms = example_gpu(unit.cc).sms
        lines.append(f"{shape.vocab_size} {shape.rows} {rejection} {sms} {most // 1024} "
                     f"{_LARGEST[unit.cc]}")  # fmt: skip
    source = Path(__file__).with_name("blocks.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "blocks")
        command = [_host_compiler(), "-std=c++20", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        done = subprocess.run(
            [program], input="\n".join(lines), capture_output=True, text=True, check=True
        )
    return [Cluster(*map(int, line.split())) for line in done.stdout.splitlines()]


def _host_compiler() -> str:
    return os.environ.get("CXX", "c++")


READING = "reading"
"""The route that is counted: the loop over vectors of three roles of 16 bits a logit."""

_TOKENS = 8  # of 16 bits, in a vector of 16 bytes
_ROLES = 3


def is_vector(i: sass.Instruction) -> bool:
    """Whether it loads logits: nothing else asks for no place in L1."""
    return i.stem == "LDG" and ".NA" in i.opcode


def reading(code: sass.Code) -> RouteFigures:
    """The longest loop that loads a multiple of three vectors: that of bf16 or fp16 logits.

    fp32 logits are half as many tokens to a vector, and one role's come one by one.

    Raises:
        sass.CannotFollow: there is no such loop.
    """
    loops = code.loops()
    loads: dict[range, int] = {}
    for index, instruction in enumerate(code.instructions):
        around = [loop for loop in loops if index in loop]
        if is_vector(instruction) and around:
            innermost = min(around, key=len)
            loads[innermost] = loads.get(innermost, 0) + 1
    steered = {loop: count for loop, count in loads.items() if count % _ROLES == 0}
    if not steered:
        raise sass.CannotFollow("no loop loads vectors of three roles")
    loop = max(steered, key=lambda one: len(one) / steered[one])
    tokens = steered[loop] // _ROLES * _TOKENS
    return RouteFigures(
        instructions=len(loop) / tokens,
        logits_loads=steered[loop] / tokens,
        logits_bytes=16 * steered[loop] / tokens,
        parts={},
    )


SUMMARISE, MASS = "summarise", "mass"
"""Routes over x in shared memory, by tiles of 4 tokens a lane: all rows', and where top_p or an
unfiltered logprob asks for it."""

_TOKENS_OF_LANE = 4


def over_tiles(code: sass.Code) -> dict[str, RouteFigures]:
    """The loops that summarise tiles, and that add up their masses.

    The shortest that take an exponential by the GPU's instruction, and that have two sums, of a
    mass's digits, for each load of four tokens.

    Raises:
        sass.CannotFollow: there is no such loop.
    """
    shortest: dict[str, tuple[int, int]] = {}
    for loop in sorted(code.loops(), key=len, reverse=True):
        names = [code.instructions[i].opcode for i in loop]
        tiles = sum(name.startswith("LDS.128") for name in names)
        if not tiles:
            continue
        sums = sum("REDUX.SUM" in name for name in names)
        if any("EX2" in name for name in names):
            shortest[SUMMARISE] = len(loop), tiles
        elif sums == 2 * tiles:
            shortest[MASS] = len(loop), tiles
    for name in (SUMMARISE, MASS):
        if name not in shortest:
            raise sass.CannotFollow(f"no loop over tiles is that of {name}")
    return {
        name: RouteFigures(
            instructions=length / (tiles * _TOKENS_OF_LANE),
            logits_loads=0.0,
            logits_bytes=float(_ROLES * 16 // _TOKENS),
            parts={},
        )
        for name, (length, tiles) in shortest.items()
    }


def _figures(compiled: Code, cluster: Cluster, cc: int) -> Figures:
    code, warps = compiled.code, cluster.threads // WARP
    loads = [i for i in code.instructions if i.stem == "LDG"]
    # Generic loads, LD, are of other blocks' memory.
    logits = [i for i in loads if is_vector(i)]
    return Figures(
        registers=compiled.registers,
        stack=compiled.stack,
        local=code.count("LDL", "STL"),
        shared=cluster.shared,
        resident_warps=resident_warps(cc, compiled.registers, cluster.shared, warps),
        instructions=len(code.instructions),
        logits_loads=widths(logits),
        other_loads=widths(i for i in loads if i not in logits),
        stores=widths(i for i in code.instructions if i.stem == "STG"),
        atomics=code.count("ATOM", "ATOMG", "RED", "REDG"),
        barriers=code.count("BAR"),
        routes={READING: reading(code), **over_tiles(code)},
        blocks=cluster.blocks,
    )


def broken_promises(figures: Mapping[Unit, Figures]) -> Iterator[str]:
    """What the design promises of these kernels and is not so."""
    for unit, one in figures.items():
        if one.registers > (most := REGISTERS[unit.kernel]):
            yield f"{unit}: registers {one.registers}, the budget is {most}"
        for name in ("stack", "local"):
            if getattr(one, name) > 0:
                yield f"{unit}: {name} {getattr(one, name)}, the budget is 0"
        if one.narrowest != 16:
            yield f"{unit}: logits are not read in loads of 16 bytes, but of {one.narrowest}"
