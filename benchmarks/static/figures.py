"""The figures of a compiled kernel: counted, held to what is promised, stored and compared."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.static.sass import Instruction

WARP = 32
RESERVED_SHARED = 1024
"""Bytes of each block that the driver takes, from compute capability 8.0."""
_REGISTERS = 65_536  # 32-bit ones, of each compute capability below
_REGISTER_UNIT = 256  # allocated for a warp
_QUARTERS = 4  # a multiprocessor's parts, each with its own registers and scheduler
_SHARED_UNIT = 128


LIMITS = {
    80: (64, 32, 164 * 1024),
    90: (64, 32, 228 * 1024),
    100: (64, 32, 228 * 1024),
    120: (48, 24, 100 * 1024),
}
"""Warps, blocks and bytes of shared memory of a multiprocessor, by compute capability, as ``80``
for 8.0. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""


def resident_warps(cc: int, registers: int, shared: int, warps: int) -> int:
    """Warps of one kernel that a multiprocessor holds, by the rules of ``cuda_occupancy.h``.

    Args:
        cc: compute capability, of :data:`LIMITS`.
        registers: per thread.
        shared: bytes per block, without :data:`RESERVED_SHARED`.
        warps: per block.
    """
    most_warps, most_blocks, most_shared = LIMITS[cc]
    for_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // _QUARTERS // for_warp * _QUARTERS // warps
    for_block = -(-(shared + RESERVED_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    by_shared = most_shared // for_block
    return warps * min(most_blocks, most_warps // warps, by_registers, by_shared)


class Unit(NamedTuple):
    """One kernel of one case for one compute capability, by a version of a compiler."""

    compiler: str
    case: str
    kernel: str
    cc: int

    def __str__(self) -> str:
        return f"{self.case}/{self.kernel} cc {self.cc}"


class Figures(NamedTuple):
    """Counts are of instructions in the code, run or not.

    ``6x16 2x4`` in the last three: six accesses to global memory of 16 bytes a thread, two of 4.
    Triton's kernels have none there: theirs are counted as they are executed (docs/ptx.md).
    """

    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers and local arrays
    local: int  # loads and stores of the stack
    shared: int  # bytes per block
    blocks: int  # of a cluster; 1 where there is none
    resident_warps: int
    barriers: int
    membars: int  # that wait for device memory
    l1_invalidations: int
    instructions: int
    atomics: int
    logits_loads: str
    other_loads: str
    stores: str


def accesses(text: str) -> dict[int, int]:
    """How many there are by bytes a thread, as :class:`Figures` writes them."""
    pairs = (one.split("x") for one in text.split())
    return {int(size): int(n) for n, size in pairs}


def count(
    code: Sequence[Instruction],
    resources: Mapping[str, int],
    cc: int,
    shared: int,
    warps: int,
    reads_logits: Callable[[Instruction], object] | None = None,
    blocks: int = 1,
) -> Figures:
    """The figures of a kernel, given its resources by cuobjdump's names.

    Without ``reads_logits`` accesses to memory are left out. Generic ones are not of global memory.
    """

    def number(*stems: str) -> int:
        return sum(i.stem in stems for i in code)

    def widths(instructions: Iterable[Instruction]) -> str:
        sizes = [i.access_bytes for i in instructions]
        return " ".join(f"{sizes.count(n)}x{n}" for n in sorted(set(sizes), reverse=True))

    looked_at = code if reads_logits is not None else ()
    is_logits = reads_logits or bool
    loads = [i for i in looked_at if i.stem == "LDG"]
    return Figures(
        registers=resources["REG"],
        stack=resources["STACK"],
        local=number("LDL", "STL"),
        shared=shared,
        blocks=blocks,
        resident_warps=resident_warps(cc, resources["REG"], shared, warps),
        barriers=number("BAR"),
        membars=sum(i.stem == "MEMBAR" and not i.opcode.endswith(".CTA") for i in code),
        l1_invalidations=sum(i.opcode == "CCTL.IVALL" for i in code),
        instructions=len(code),
        atomics=number("ATOM", "ATOMG", "RED", "REDG"),
        logits_loads=widths(i for i in loads if is_logits(i)),
        other_loads=widths(i for i in loads if not is_logits(i)),
        stores=widths(i for i in looked_at if i.stem == "STG"),
    )


class Promise(NamedTuple):
    """What a kernel may take; it spills nothing but where ``stack`` says so.

    Spills go through the memory that the logits come from.
    """

    registers: int
    shared: int
    wide: bool
    """Whether all logits that are counted are loaded by 16 bytes a thread."""
    stack: int = 0
    """Bytes a thread."""


def broken(figures: Figures, promise: Promise) -> Iterator[str]:
    """What a kernel takes that it may not, and what it does not do as promised."""
    budget = {"registers": promise.registers, "shared": promise.shared}
    budget |= {"stack": promise.stack, "local": promise.stack // 2}  # each stored, and loaded once
    for name, most in budget.items():
        if (got := getattr(figures, name)) > most:
            yield f"{name} {got}, the budget is {most}"
    if promise.wide and set(accesses(figures.logits_loads)) != {16}:
        yield f"logits are not read in loads of 16 bytes: {figures.logits_loads or 'none'}"


def worse(now: Figures, before: Figures) -> Iterator[str]:
    """Each figure that got worse, with both values.

    No tolerance: one version of a compiler makes the same code of the same source wherever it runs.
    The code's length is not compared.
    """

    def cost(figures: Figures, name: str) -> int:
        value: Any = getattr(figures, name)
        if isinstance(value, str):
            return sum(accesses(value).values())
        return -int(value) if name == "resident_warps" else int(value)

    for name in Figures._fields:
        if name not in ("blocks", "instructions") and cost(now, name) > cost(before, name):
            yield f"{name} {getattr(now, name)}, was {getattr(before, name)}"


def compare(
    now: Mapping[Unit, Figures], stored: Mapping[Unit, Figures], complete: bool
) -> tuple[list[str], list[str]]:
    """What got worse or is on one side only, and summaries; ``complete``: all were compiled."""
    complaints: list[str] = []
    summaries: list[str] = []
    for compiler in dict.fromkeys(unit.compiler for unit in now):
        new = {unit: one for unit, one in now.items() if unit.compiler == compiler}
        old = {unit: one for unit, one in stored.items() if unit.compiler == compiler}
        if not old:
            summaries.append(f"No figures of {compiler} are stored: budgets alone are checked.")
            continue
        complaints += [f"{unit}: no figures are stored" for unit in new if unit not in old]
        if complete:
            gone = "figures are stored, but there is no such kernel"
            complaints += [f"{unit}: {gone}" for unit in old if unit not in new]
        both = [unit for unit in new if unit in old]
        complaints += [f"{unit}: {what}" for unit in both for what in worse(new[unit], old[unit])]
        changed = sum(new[unit] != old[unit] for unit in both)
        summaries.append(
            f"{len(both)} kernels of {compiler} compared, {changed} have other figures than stored."
        )
    return complaints, summaries


def write_figures(path: Path, figures: Mapping[Unit, Figures]) -> None:
    """Write CSV: no date and no machine, so that the same code gives the same file."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow((*Unit._fields, *Figures._fields))
        rows.writerows((*unit, *one) for unit, one in figures.items())


def read_figures(path: Path) -> dict[Unit, Figures]:
    """What :func:`write_figures` wrote."""
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    cells = [[int(cell) if cell.isdigit() else cell for cell in row] for row in rows]
    names = len(Unit._fields)
    return {Unit._make(row[:names]): Figures._make(row[names:]) for row in cells}
