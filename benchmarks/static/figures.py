"""Figures of a compiled kernel."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.static.compiling import Compiled
from benchmarks.static.occupancy import WARP, resident_warps
from benchmarks.static.sass import CannotFollow, Code, Instruction

LOGITS = re.compile(r"\b(base|expert|anti) = tl\.load\(")
"""Source lines that read the roles' logits (`combined` in kernels/_common.py)."""
BASE = re.compile(r"\bbase = tl\.load\(")


@dataclass(frozen=True)
class Mark:
    """Instructions of one name that were made for source lines with this text."""

    stem: str
    text: str

    def __call__(self, i: Instruction) -> bool:
        """Whether an instruction is one of them."""
        return i.stem == self.stem and self.text in i.source


@dataclass(frozen=True)
class Route:
    """A way through a kernel: of those that fit, with the fewest masked loads, the longest.

    All of a row but its end is read without a mask. A compiler may make predicates of branches, so
    that loads without a mask look like others; but the way by them still has fewer.
    """

    name: str
    tokens: Callable[[Mapping[str, Any]], int]
    """Tokens that a block reads, of what the launcher passed by name."""
    passes: tuple[Mark, ...] = ()
    avoids: tuple[Mark, ...] = ()
    seldom: tuple[Mark, ...] = ()
    """What few rows need: avoided where there is a way around it."""


@dataclass(frozen=True)
class RouteFigures:
    """What a thread does for a token on one route."""

    instructions: float
    logits_loads: float
    logits_bytes: float
    parts: dict[str, float]
    """Instructions by the source's function, most first."""


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

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> Figures:
        """What :meth:`record` made."""
        routes = {name: RouteFigures(**route) for name, route in record["routes"].items()}
        return Figures(**{**record, "routes": routes})


def figures_of(compiled: Compiled, cc: int, routes: Iterable[Route]) -> Figures:
    """Count.

    Raises:
        CannotFollow: a route can't be found.
    """
    code = compiled.code
    loads = [i for i in code.instructions if i.stem in ("LDG", "LD")]
    return Figures(
        registers=compiled.registers,
        stack=compiled.stack,
        local=code.count("LDL", "STL"),
        shared=compiled.shared,
        resident_warps=resident_warps(cc, compiled.registers, compiled.shared, compiled.warps),
        instructions=len(code.instructions),
        logits_loads=widths(i for i in loads if _reads_logits(i)),
        other_loads=widths(i for i in loads if not _reads_logits(i)),
        stores=widths(i for i in code.instructions if i.stem in ("STG", "ST")),
        atomics=code.count("ATOM", "ATOMG", "RED", "REDG"),
        barriers=code.count("BAR"),
        routes={route.name: _route_figures(compiled, route) for route in routes},
    )


def widths(accesses: Iterable[Instruction]) -> dict[str, int]:
    """How many there are by bytes a thread, the widest first."""
    sizes = [i.access_bytes for i in accesses]
    return {str(size): sizes.count(size) for size in sorted(set(sizes), reverse=True)}


def _reads_logits(i: Instruction) -> bool:
    return LOGITS.search(i.source) is not None


def _route_figures(compiled: Compiled, route: Route) -> RouteFigures:
    path = follow(compiled.code, route)
    loads = [i for i in path if i.stem == "LDG" and _reads_logits(i)]
    tokens = route.tokens(compiled.arguments) / (compiled.warps * WARP)
    parts = Counter(function_at(i.file, i.line) for i in path)
    return RouteFigures(
        instructions=len(path) / tokens,
        logits_loads=len(loads) / tokens,
        logits_bytes=sum(i.access_bytes for i in loads) / tokens,
        parts={name: count / tokens for name, count in parts.most_common()},
    )


def follow(code: Code, route: Route) -> Sequence[Instruction]:
    """The instructions of a route.

    Raises:
        CannotFollow: there is none; or nothing in the code is marked so, as after a renaming.
    """
    for mark in (*route.passes, *route.avoids):
        if not any(map(mark, code.instructions)):
            raise CannotFollow(f"route {route.name!r}: no {mark.stem} from {mark.text!r}")

    def unwanted(i: Instruction) -> bool:
        masked = i.stem == "LDG" and i.predicate != "" and BASE.search(i.source) is not None
        return masked or any(mark(i) for mark in route.seldom)

    def excluded(i: Instruction) -> bool:
        return any(mark(i) for mark in route.avoids)

    return code.longest_path(route.passes, excluded, unwanted)


@cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    """First line, last line and name of a source file's functions."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return [
        (node.lineno, node.end_lineno or node.lineno, node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


def function_at(file: str, line: int) -> str:
    """Name of the function that a line of a source file is in."""
    around = [(first, name) for first, last, name in _functions(file) if first <= line <= last]
    return max(around)[1] if around else "?"
