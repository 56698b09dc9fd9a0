"""The figures of a compiled kernel, and the files that hold those of a commit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.static.sass import Code, Instruction

WARP = 32
RESERVED_SHARED = 1024
"""Bytes of each block that the driver takes, from compute capability 8.0."""
_REGISTERS = 65_536  # 32-bit ones, of each compute capability below
_REGISTER_UNIT = 256  # allocated for a warp
_QUARTERS = 4  # a multiprocessor's parts, each with its own registers and scheduler
_SHARED_UNIT = 128


class Limits(NamedTuple):
    """What a multiprocessor holds at most."""

    warps: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    80: Limits(64, 32, 164 * 1024),
    90: Limits(64, 32, 228 * 1024),
    100: Limits(64, 32, 228 * 1024),
    120: Limits(48, 24, 100 * 1024),
}
"""By compute capability, as ``80`` for 8.0. Source: CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"."""


def resident_warps(cc: int, registers: int, shared: int, warps: int) -> int:
    """Warps of one kernel that a multiprocessor holds, by the rules of ``cuda_occupancy.h``.

    Args:
        cc: compute capability, of :data:`LIMITS`.
        registers: per thread.
        shared: bytes per block, without :data:`RESERVED_SHARED`.
        warps: per block.
    """
    limits = LIMITS[cc]
    for_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // _QUARTERS // for_warp * _QUARTERS // warps
    for_block = -(-(shared + RESERVED_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    blocks = min(limits.blocks, limits.warps // warps, by_registers, limits.shared // for_block)
    return warps * blocks


class Unit(NamedTuple):
    """One kernel of one case for one compute capability."""

    case: str
    kernel: str
    cc: int

    def __str__(self) -> str:
        return f"{self.case}/{self.kernel} cc {self.cc}"


@dataclass(frozen=True)
class RouteFigures:
    """What a thread does for a token on one route."""

    instructions: float
    logits_loads: float
    logits_bytes: float


@dataclass(frozen=True)
class Figures:
    """One kernel for one compute capability. Counts are of instructions in the code, run or not."""

    registers: int
    stack: int
    local: int
    """Loads and stores of the stack."""
    shared: int
    resident_warps: int
    instructions: int
    logits_loads: dict[str, int]
    """By bytes a thread, as the following two."""
    other_loads: dict[str, int]
    stores: dict[str, int]
    atomics: int
    barriers: int
    routes: dict[str, RouteFigures]
    blocks: int = 1
    """Of a cluster."""

    @property
    def narrowest(self) -> int | None:
        """Bytes of the narrowest load of logits; None where there is none."""
        return min(map(int, self.logits_loads), default=None)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one compute capability."""

    code: Code
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers and local arrays
    shared: int = 0  # bytes per block
    warps: int = 0  # per block
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What Triton's launcher passed by name: the kernel's constants and options."""


def count(
    compiled: Compiled,
    cc: int,
    reads_logits: Callable[[Instruction], object],
    routes: dict[str, RouteFigures],
    loads: tuple[str, ...] = ("LDG", "LD"),
    stores: tuple[str, ...] = ("STG", "ST"),
) -> Figures:
    """The figures of a kernel, given those of its routes.

    ``loads`` and ``stores`` are the instructions that reach global memory.
    """
    code = compiled.code

    def widths(accesses: Iterable[Instruction]) -> dict[str, int]:
        """How many there are by bytes a thread, the widest first."""
        sizes = [i.access_bytes for i in accesses]
        return {str(size): sizes.count(size) for size in sorted(set(sizes), reverse=True)}

    loading = [i for i in code.instructions if i.stem in loads]
    return Figures(
        registers=compiled.registers,
        stack=compiled.stack,
        local=code.count("LDL", "STL"),
        shared=compiled.shared,
        resident_warps=resident_warps(cc, compiled.registers, compiled.shared, compiled.warps),
        instructions=len(code.instructions),
        logits_loads=widths(i for i in loading if reads_logits(i)),
        other_loads=widths(i for i in loading if not reads_logits(i)),
        stores=widths(i for i in code.instructions if i.stem in stores),
        atomics=code.count("ATOM", "ATOMG", "RED", "REDG"),
        barriers=code.count("BAR"),
        routes=routes,
    )


@dataclass(frozen=True)
class Stored:
    """Figures, and the compiler that they were obtained with."""

    compiler: str
    figures: Mapping[Unit, Figures]

    def write(self, path: Path) -> None:
        """Write JSON: no date and no machine, so that the same code gives the same file."""
        records = [{**unit._asdict(), **asdict(f)} for unit, f in self.figures.items()]
        lines = ",\n".join(json.dumps(record) for record in records)
        path.write_text(f'{{"compiler": "{self.compiler}", "kernels": [\n{lines}\n]}}\n')

    @staticmethod
    def read(path: Path) -> Stored:
        """What :meth:`write` wrote."""
        content: dict[str, Any] = json.loads(path.read_text())
        figures = {}
        for record in content["kernels"]:
            unit = Unit(*(record.pop(field) for field in Unit._fields))
            routes = {name: RouteFigures(**route) for name, route in record.pop("routes").items()}
            figures[unit] = Figures(**record, routes=routes)
        return Stored(content["compiler"], figures)


def _numbers(figures: Figures) -> dict[str, float]:
    """By name, all that is compared and of which more is worse."""
    plain = ("registers", "stack", "local", "shared", "atomics", "barriers")
    numbers: dict[str, float] = {name: getattr(figures, name) for name in plain}
    accesses = ("logits_loads", "other_loads", "stores")
    numbers |= {name: sum(getattr(figures, name).values()) for name in accesses}
    if figures.routes:  # by token, whatever a thread has of them
        del numbers["logits_loads"]
    for name, route in figures.routes.items():
        numbers[f"{name}: instructions a token"] = route.instructions
        numbers[f"{name}: loads of logits a token"] = route.logits_loads
    return numbers


def worse(now: Figures, before: Figures) -> Iterator[str]:
    """Each figure that got worse, with both values.

    No tolerance: one version of a compiler makes the same code of the same source wherever it runs.
    The code's length is not compared: it is what it is where no route is counted.
    """
    old = _numbers(before)
    for name, value in _numbers(now).items():
        if name in old and value > old[name]:
            yield f"{name} {value:g}, was {old[name]:g}"
    for name in ("resident_warps", "narrowest"):
        new_value, old_value = getattr(now, name), getattr(before, name)
        if None not in (new_value, old_value) and new_value < old_value:
            yield f"{name.replace('_', ' ')} {new_value}, was {old_value}"


def compare(now: Stored, stored: Stored, complete: bool) -> tuple[list[str], str]:
    """What got worse or is on one side only, and a summary; ``complete``: all were compiled."""
    if now.compiler != stored.compiler:
        return [], (
            f"The stored figures are {stored.compiler}'s, these are {now.compiler}'s: they are not "
            "compared, budgets alone are checked."
        )
    complaints, changed = [], 0
    for unit, figures in now.figures.items():
        if unit not in stored.figures:
            complaints.append(f"{unit}: no figures are stored")
            continue
        changed += figures != stored.figures[unit]
        complaints += [f"{unit}: {what}" for what in worse(figures, stored.figures[unit])]
    if complete:
        gone = stored.figures.keys() - now.figures.keys()
        complaints += [f"{unit}: figures are stored, but there is no such kernel" for unit in gone]
    summary = (
        f"{len(now.figures)} kernels of {now.compiler} compared, {changed} have other figures than "
        "stored."
    )
    if changed or complaints:
        summary += " `python -m benchmarks.static --write` stores them."
    return complaints, summary
