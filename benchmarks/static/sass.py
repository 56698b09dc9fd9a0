"""Machine code: nvdisasm's text as instructions, and the longest path through them.

Only what the figures need is understood: addresses, predicates, branches and source lines. The
instructions' names are in NVIDIA's CUDA Binary Utilities, "Instruction Set Reference".
"""

from __future__ import annotations

import linecache
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_LINE = re.compile(r'//## File "(?P<file>[^"]+)", line (?P<line>\d+)')
_LABEL = re.compile(r"(?P<label>[.$]\w+):")
_CODE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(@(?P<predicate>!?U?P[0-9T]+)\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.]*)\s*(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
_WIDTH = re.compile(r"\.[US]?(?P<bits>8|16|32|64|128|256)(?=\.|$)")


class CannotFollow(ValueError):
    """Code whose paths are not found: it has a loop, or no path of the kind asked for."""


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    predicate: str  # "" where it always runs
    opcode: str
    operands: str
    file: str  # of the source, "" where unknown
    line: int

    @property
    def stem(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def access_bytes(self) -> int:
        """Bytes that a memory access moves for a thread; 4 where the opcode names no width."""
        match = _WIDTH.search(self.opcode)
        return 4 if match is None else int(match["bits"]) // 8

    @property
    def source(self) -> str:
        """The source line that it was made for."""
        return linecache.getline(self.file, self.line).strip()


Condition = Callable[[Instruction], bool]


class _Jump(NamedTuple):
    """Where an instruction may lead to other than the next one."""

    exits: bool
    always: bool
    targets: list[int]


class _Path(NamedTuple):
    """From some instruction to an exit."""

    unwanted: int
    code: Sequence[Instruction]


@dataclass(frozen=True)
class Code:
    """A kernel's instructions by address, and the addresses of its labels."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]

    def count(self, *stems: str) -> int:
        """How many instructions have one of these names."""
        return sum(i.stem in stems for i in self.instructions)

    def longest_path(
        self, required: Sequence[Condition], excluded: Condition, unwanted: Condition
    ) -> Sequence[Instruction]:
        """The longest way from the start to an exit, through code without loops; none with a call.

        Args:
            required: for each, the path has an instruction that it holds for.
            excluded: the path has no instruction that it holds for.
            unwanted: the path has as few instructions as can be that it holds for; of those paths,
                the longest.
        """
        goal = (1 << len(required)) - 1
        known: dict[tuple[int, int], _Path | None] = {}

        def search(start: int, met: int, before: frozenset[int]) -> _Path | None:
            if start in before:
                raise CannotFollow("the code has a loop")
            if (start, met) not in known:
                known[start, met] = extend(start, met, before | {start})
            return known[start, met]

        def extend(start: int, met: int, before: frozenset[int]) -> _Path | None:
            code, may_end, following = self._block(start)
            if any(map(excluded, code)):
                return None
            for bit, condition in enumerate(required):
                met |= any(map(condition, code)) << bit
            paths = [search(index, met, before) for index in following]
            if may_end and met == goal:
                paths.append(_Path(0, []))
            found = [path for path in paths if path is not None]
            if not found:
                return None
            rest = max(found, key=lambda path: (-path.unwanted, len(path.code)))
            return _Path(rest.unwanted + sum(map(unwanted, code)), [*code, *rest.code])

        path = search(0, 0, frozenset())
        if path is None:
            raise CannotFollow("no path through the code is of the kind asked for")
        return path.code

    def loops(self) -> list[range]:
        """Instructions, by index, from the target of each jump backwards to the jump."""
        found = []
        for end, instruction in enumerate(self.instructions):
            jump = self._jump(instruction) if instruction.stem == "BRA" else None
            if jump is not None:
                found += [range(start, end + 1) for start in jump.targets if start <= end]
        return found

    @cached_property
    def _index(self) -> dict[str, int]:
        """Labels as indices of instructions."""
        addresses = [i.address for i in self.instructions]
        return {label: bisect_left(addresses, address) for label, address in self.labels.items()}

    def _block(self, start: int) -> tuple[Sequence[Instruction], bool, list[int]]:
        """What runs in one go, whether a thread may exit after it, and what may come next."""
        heads = set(self._index.values())
        for end, instruction in enumerate(self.instructions[start:], start + 1):
            if (jump := self._jump(instruction)) is not None:
                following = jump.targets if jump.always else [*jump.targets, end]
                return self.instructions[start:end], jump.exits, following
            if end in heads:
                return self.instructions[start:end], False, [end]
        raise CannotFollow("the code ends without an exit")

    def _jump(self, i: Instruction) -> _Jump | None:
        if i.stem == "EXIT":
            return _Jump(True, not i.predicate, [])
        if i.stem == "CALL":  # to slow forms of arithmetic, for operands near fp32's limits
            return _Jump(False, True, [])
        if i.stem in ("RET", "BRX", "BRXU", "JMP", "JMX", "JMXU"):
            raise CannotFollow(f"the code has {i.opcode}")
        # BRA.DIV leads warps that have diverged to a slow form of what follows it.
        if i.stem != "BRA" or i.opcode.startswith("BRA.DIV"):
            return None
        match = _TARGET.search(i.operands)
        if match is None or match["label"] not in self._index:
            raise CannotFollow(f"the code has {i.opcode} {i.operands.strip()}")
        conditions = i.predicate + i.operands[: match.start()].strip(" ,")
        return _Jump(False, not conditions, [self._index[match["label"]]])


def parse(text: str) -> Code:
    """What ``nvdisasm -g -c`` prints of a file with one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    file, line = "", 0
    for row in text.splitlines():
        if match := _LINE.search(row):
            file, line = sys.intern(match["file"]), int(match["line"])
        elif match := _LABEL.match(row):
            waiting.append(match["label"])
        elif match := _CODE.search(row):
            address, predicate = int(match["address"], 16), match["predicate"] or ""
            opcode, operands = match["opcode"], match["operands"].strip()
            instructions.append(Instruction(address, predicate, opcode, operands, file, line))
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
    # What fills the code up: a jump to itself, and instructions that do nothing.
    while instructions and instructions[-1].stem == "NOP":
        instructions.pop()
    if not instructions:
        raise ValueError("the disassembly holds no instruction")
    last = instructions[-1]
    to_itself = {f"`({label})" for label, address in labels.items() if address == last.address}
    if last.stem == "BRA" and last.operands in to_itself:
        instructions.pop()
    return Code(instructions, labels)


def parse_resources(text: str) -> dict[str, int]:
    """What ``cuobjdump -res-usage`` prints of one kernel, by name: ``REG``, ``STACK``."""
    line = re.search(r"^ *(REG:.*)$", text, re.MULTILINE)
    if line is None:
        raise ValueError(f"cuobjdump names no resources: {text.strip()!r}")
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line[1])}
